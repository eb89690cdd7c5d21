"""The transfer service's RPCs."""

from collections.abc import AsyncIterator, Callable

from grpc import StatusCode

from duohuo.internal.v1.log_pb2 import POSTING_KIND_MOVE_IN, POSTING_KIND_MOVE_OUT
from duohuo.internal.v1.peer_services_pb2 import (
    DECIDE_INTENT_CANCEL,
    BookDepositRequest,
    BookDepositResponse,
    DecideRequest,
    DecideResponse,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_CANCELLING,
    APPLICATION_STATE_QUEUED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    Application,
    ApplyTransferRequest,
    Balance,
    CancelApplicationRequest,
    Entry,
    GetApplicationRequest,
    GetBalanceRequest,
    ListApplicationsRequest,
    ListApplicationsResponse,
    ListEntriesRequest,
    ListEntriesResponse,
    TransferRequest,
    TransferResult,
    WatchApplicationsRequest,
)
from runtime import telemetry
from runtime.clock import milliseconds, timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import HOME, STALENESS_MS, ask
from runtime.errors import RpcError, invalid, unreachable
from runtime.ids import application_id, is_client_made, place_of
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Store, Unit
from sync_bus import audit, homes
from sync_bus.homes import Homes, Present
from sync_bus.log import Stamp
from sync_bus.site import Site
from transfer_svc import applications, holds, ledger, rules, transfers
from transfer_svc.applications import ApplicationRow
from transfer_svc.dispatch import transfer_of
from transfer_svc.ledger import LedgerAccount
from transfer_svc.payees import Payees
from transfer_svc.rules import Order
from transfer_svc.states import (
    APPLICATION_OPEN,
    APPLICATION_UNDECIDED,
    decision_of,
    next_application_state,
)
from transfer_svc.transfers import TransferRow

SETTLE_TIMEOUT_S = 2.5  # less than a stopping center waits for its running calls
SETTLE_MARGIN_S = 0.2
PEER_TIMEOUT_S = 2.0
WATCH_CHANGES_MAX = 100
_DECIDE = peer_method("transfer", "Decide")


class TransferService:
    """Serves TransferService, and the transfer part of TransferPeerService.

    `current_ms(source)` tells when the copy of another center's ledger was last complete. `notice(payer)`
    is called when something of a payer's is in the queue.
    """

    def __init__(
        self,
        site: Site,
        database: Store,
        payees: Payees,
        current_ms: Callable[[str], int],
        notice: Callable[[str], None],
        slots: Homes,
    ) -> None:
        self._homes = slots
        self._site = site
        self._store = database
        self._payees = payees
        self._current_ms = current_ms
        self._notice = notice
        self._committed = Signal()
        database.on_commit(self._committed.notify)

    async def GetBalance(self, request: GetBalanceRequest, incoming: Incoming) -> Balance:
        slot = self._site.slot_of(request.account_id)
        account, booked, held, home = await self._store.read(
            self._balance(request.account_id, slot)
        )
        as_of_ms = self._freshness(home, incoming)
        currency = account.currency if account else rules.NO_CURRENCY
        return Balance(
            balance=Money(currency_code=currency, minor_units=booked),
            available=Money(currency_code=currency, minor_units=booked - held),
            stale=incoming.reply_metadata[HOME] != self._site.here,
            as_of=timestamp(as_of_ms),
        )

    async def Transfer(self, request: TransferRequest, incoming: Incoming) -> TransferResult:
        rules.check_transfer(request)
        telemetry.annotate({"duohuo.transfer_id": request.transfer_id})
        row = await self._decide(request, "", "", incoming.gateway)
        if row.body_hash != rules.body_hash(request):
            raise rules.refusal("IDEMPOTENCY_CONFLICT")
        if row.state == TRANSFER_STATE_DEBITED:
            row = await self.settled(row, incoming.timeout_s)
        incoming.reply_metadata[HOME] = self._site.here
        return rules.answer(row.result())

    async def Decide(self, request: DecideRequest, _incoming: Incoming) -> DecideResponse:
        rules.check_transfer(request.transfer)
        telemetry.annotate(
            {
                "duohuo.transfer_id": request.transfer.transfer_id,
                "duohuo.application_id": request.application_id,
            }
        )
        refused = ""
        if request.intent == DECIDE_INTENT_CANCEL:
            refused = "CANCELLED"
        elif 0 < milliseconds(request.expire_time) <= self._site.clock.wall_ms():
            refused = "EXPIRED"
        row = await self._decide(request.transfer, refused, request.application_id)
        result = row.result()
        if row.body_hash != rules.body_hash(request.transfer):
            result.state, result.reason = TRANSFER_STATE_FAILED, "IDEMPOTENCY_CONFLICT"
        return DecideResponse(result=result)

    async def BookDeposit(
        self, request: BookDepositRequest, incoming: Incoming
    ) -> BookDepositResponse:
        if not is_client_made(request.deposit_id):
            raise invalid("deposit_id", "must be 8 to 64 letters, digits, '-' or '_'", "KEY")
        rules.check_amount(request.amount)
        transfer = TransferRequest(
            transfer_id=request.deposit_id,
            payer_account_id=ledger.outside(self._site.here),
            payee_account_id=request.account_id,
            amount=request.amount,
            memo="deposit",
        )
        order = _order(transfer, request.account_id, "")
        slot = self._site.slot_of(request.account_id)
        unit = self._homes.acting(slot, self._deposit(order, incoming.operator))
        row = await self._store.write("deposit", unit)
        if row.body_hash != order.body_hash:
            raise rules.refusal("IDEMPOTENCY_CONFLICT")
        if row.reason:
            raise rules.refusal(row.reason)
        account = await self._store.read(ledger.find(request.account_id))
        balance = account.balance if account else 0
        return BookDepositResponse(balance=Money(currency_code=row.currency, minor_units=balance))

    def _deposit(self, order: Order, who: str) -> Unit[TransferRow]:
        here, stamp = self._site.here, self._site.stamps.now()
        present = yield from transfers.find(order.payer_account_id, order.transfer_id)
        if present is not None:
            return present
        for peer in self._site.mesh.peers:
            # The account may have been at home there when this was asked for the first time.
            earlier = yield from transfers.find(ledger.outside(peer), order.transfer_id)
            if earlier is None or earlier.payee_account_id != order.payee_account_id:
                continue
            return (
                earlier._replace(body_hash=order.body_hash) if earlier.is_same(order) else earlier
            )
        row = yield from transfers.decide(here, order, here, "", stamp)
        after = row.reason or f"{order.minor_units} {order.currency} as {order.transfer_id}"
        target = order.payee_account_id
        yield from audit.record("transfer", here, who, "deposit", target, "", after, stamp)
        return row

    async def ApplyTransfer(
        self, request: ApplyTransferRequest, _incoming: Incoming
    ) -> Application:
        rules.check_transfer(request)
        body_hash = rules.body_hash(request)
        stamp = self._site.stamps.now()
        row = await self._store.read(
            applications.applied_for(request.payer_account_id, request.transfer_id, self._site.here)
        )
        if row is None:
            row = await self._accept(request, body_hash, stamp)
        telemetry.annotate(
            {
                "duohuo.transfer_id": request.transfer_id,
                "duohuo.application_id": row.message.application_id,
            }
        )
        if row.body_hash != body_hash:
            raise rules.refusal("IDEMPOTENCY_CONFLICT")
        return self._shown(row)

    async def _accept(
        self, request: ApplyTransferRequest, body_hash: bytes, stamp: Stamp
    ) -> ApplicationRow:
        slot = self._site.slot_of(request.payer_account_id)
        application = Application(
            application_id=application_id(self._site.here, slot, self._site.ids.unique()),
            transfer_id=request.transfer_id,
            state=APPLICATION_STATE_QUEUED,
            payer_account_id=request.payer_account_id,
            amount=request.amount,
            memo=request.memo,
            origin_center=self._site.here,
            create_time=timestamp(stamp.time_ms),
            expire_time=timestamp(rules.expiry_ms(request, stamp.time_ms)),
        )
        payee = request.WhichOneof("payee")
        assert payee is not None  # noqa: S101 - checked by check_transfer
        setattr(application, payee, getattr(request, payee))
        home = self._site.home_of(request.payer_account_id)
        row = await self._store.write(
            "accept application", applications.accept(application, body_hash, home, stamp)
        )
        self._notice(request.payer_account_id)
        return row

    async def GetApplication(
        self, request: GetApplicationRequest, incoming: Incoming
    ) -> Application:
        return await self._own_application(request.application_id, incoming)

    async def ListApplications(
        self, request: ListApplicationsRequest, _incoming: Incoming
    ) -> ListApplicationsResponse:
        size = rules.page_size(request.page_size)
        found = applications.of_payer(
            request.payer_account_id, rules.page_after(request.page_token), size + 1
        )
        rows = await self._store.read(applications.as_known(found, self._site.here))
        return ListApplicationsResponse(
            applications=[self._shown(row) for row in rows[:size]],
            next_page_token=str(rows[size - 1].change_number) if len(rows) > size else "",
        )

    async def WatchApplications(
        self, request: WatchApplicationsRequest, _incoming: Incoming
    ) -> AsyncIterator[Application]:
        payer, seen = request.payer_account_id, 0
        begun = await self._store.read(applications.last_change(payer))
        while True:
            committed = self._committed.next()
            changed = applications.changed_since(payer, seen, WATCH_CHANGES_MAX)
            rows = await self._store.read(applications.as_known(changed, self._site.here))
            for row in rows:
                seen = row.change_number
                if seen > begun or row.message.state in APPLICATION_OPEN:
                    yield self._shown(row)
            if not rows:
                await self._committed.wait(committed)

    async def CancelApplication(
        self, request: CancelApplicationRequest, incoming: Incoming
    ) -> Application:
        application = await self._own_application(request.application_id, incoming)
        if application.state in APPLICATION_UNDECIDED:
            application = await self._cancel(application)
        if application.state in (APPLICATION_STATE_CANCELLED, APPLICATION_STATE_CANCELLING):
            return application
        raise RpcError(
            StatusCode.FAILED_PRECONDITION,
            "APPLICATION_DECIDED",
            "the application has been decided and cannot be cancelled",
        )

    async def _cancel(self, application: Application) -> Application:
        """The application with home's decision, or in CANCELLING while home does not say."""
        # Only home can promise that the transfer never runs: the same id may be queued elsewhere too.
        try:
            result = await self._cancel_at_home(application)
        except RpcError as error:
            if application.origin_center != self._site.here:
                raise _cannot_cancel_now(application) from error
            unit = applications.withdraw(
                application.application_id, error.reason, self._site.stamps.now()
            )
            withdrawn = await self._store.write("withdraw", unit)
            self._notice(application.payer_account_id)
            return withdrawn or application
        decision = decision_of(result.state, result.reason)
        if application.origin_center != self._site.here:
            application.state = next_application_state(application.state, decision)
            return application
        unit = applications.decide(
            application.application_id,
            decision,
            result.reason,
            result.payee_account_id,
            self._site.stamps.now(),
        )
        decided = await self._store.write("decided", unit)
        self._notice(application.payer_account_id)
        return decided or application

    async def ListEntries(
        self, request: ListEntriesRequest, incoming: Incoming
    ) -> ListEntriesResponse:
        size = rules.page_size(request.page_size)
        before = rules.page_after(request.page_token)
        account = await self._store.read(ledger.find(request.account_id))
        rows = await self._store.read(ledger.entries_before(request.account_id, before, size + 1))
        slot = self._site.slot_of(request.account_id)
        self._freshness(await self._store.read(homes.present(slot)), incoming)
        currency = account.currency if account else rules.NO_CURRENCY
        return ListEntriesResponse(
            entries=[
                Entry(
                    number=row.number,
                    transfer_id=row.transfer_id,
                    amount=Money(currency_code=currency, minor_units=row.minor_units),
                    balance_after=Money(currency_code=currency, minor_units=row.balance_after),
                    counterparty_account_id=row.counterparty,
                    memo=row.memo,
                    create_time=timestamp(row.time_ms),
                    moved=row.kind in (POSTING_KIND_MOVE_OUT, POSTING_KIND_MOVE_IN),
                )
                for row in rows[:size]
            ],
            next_page_token=str(rows[size - 1].number) if len(rows) > size else "",
        )

    def _balance(
        self, account_id: str, slot: int
    ) -> Unit[tuple[LedgerAccount | None, int, int, Present]]:
        """An account, what it has, what is held of that, and its home, at one moment."""
        account = yield from ledger.find(account_id)
        booked = (yield from ledger.booked(account)) if account else 0
        held = yield from holds.held_at(account_id, self._site.clock.wall_ms())
        return account, booked, held, (yield from homes.present(slot))

    def _freshness(self, home: Present, incoming: Incoming) -> int:
        """Notes home and age in the reply; returns the moment at which the data was home's."""
        now_ms = self._site.clock.wall_ms()
        as_of_ms = now_ms if home.home == self._site.here else self._current_ms(home.home)
        incoming.reply_metadata[HOME] = home.home
        incoming.reply_metadata[STALENESS_MS] = str(now_ms - as_of_ms)
        return as_of_ms

    async def _decide(
        self, request: TransferRequest, refused: str, application: str, asked_center: str = ""
    ) -> TransferRow:
        """The decision on a transfer, made now or earlier, at this home of its payer."""
        slot = self._site.slot_of(request.payer_account_id)
        known = transfers.find(request.payer_account_id, request.transfer_id)
        present = await self._store.read(self._homes.acting(slot, known))
        if present is not None:
            return present
        payee = ""
        if not refused:
            payee, refused = await self._payees.resolve(request)
        order = _order(request, payee, application, asked_center)
        unit = self._decided(order, refused, self._site.stamps.now())
        return await self._store.write("decide transfer", self._homes.acting(slot, unit))

    def _decided(self, order: Order, refused: str, stamp: Stamp) -> Unit[TransferRow]:
        """The decision, seen by those who watch an application for it that another center accepted."""
        here = self._site.here
        payee_home = yield from homes.payee_home(order.payee_account_id, here)
        row = yield from transfers.decide(here, order, payee_home, refused, stamp)
        yield from applications.touch(
            row.payer_account_id, row.transfer_id, row.body_hash, self._site.here
        )
        return row

    async def settled(self, row: TransferRow, timeout_s: float) -> TransferRow:
        """The transfer once the payee's home has answered, or as it is when time runs out."""
        loop_end_ms = self._site.clock.monotonic_ms() + 1000 * min(
            SETTLE_TIMEOUT_S, timeout_s - SETTLE_MARGIN_S
        )
        while row.state == TRANSFER_STATE_DEBITED:
            left_s = (loop_end_ms - self._site.clock.monotonic_ms()) / 1000
            if left_s <= 0:
                break
            committed = self._committed.next()
            found = await self._store.read(transfers.find(row.payer_account_id, row.transfer_id))
            row = found or row
            if row.state == TRANSFER_STATE_DEBITED:
                await self._committed.wait(committed, left_s)
        return row

    async def _own_application(self, wanted: str, incoming: Incoming) -> Application:
        found = applications.as_known(applications.find_all(wanted), self._site.here)
        row = next(iter(await self._store.read(found)), None)
        place = place_of(wanted)
        if row is None and place is not None and place.origin not in (None, self._site.here):
            raise RpcError(
                StatusCode.UNAVAILABLE,
                "NOT_COPIED_YET",
                f"only center {place.origin}, which made this id, can say what it is",
                retry_after_ms=1000,
            )
        if row is None or row.message.payer_account_id != incoming.caller_account_id:
            raise RpcError(
                StatusCode.NOT_FOUND, "APPLICATION_NOT_FOUND", "you have no such application"
            )
        return self._shown(row)

    def _shown(self, row: ApplicationRow) -> Application:
        """The application for its user, who shall know why nothing happens: nobody asks a home that is
        known to be away."""
        application = row.message
        home = self._site.home_of(application.payer_account_id)
        if application.state in APPLICATION_UNDECIDED and not self._site.mesh.reachable(home):
            application.last_attempt_error = unreachable(home, ran=False).reason
        return application

    async def _cancel_at_home(self, application: Application) -> TransferResult:
        home = self._site.home_of(application.payer_account_id)
        request = DecideRequest(
            intent=DECIDE_INTENT_CANCEL,
            transfer=transfer_of(application),
            application_id=application.application_id,
        )
        answer = await ask(
            self._site.mesh.at(home), _DECIDE, request, DecideResponse, PEER_TIMEOUT_S
        )
        return answer.result


def _order(request: TransferRequest, payee: str, application: str, asked_center: str = "") -> Order:
    return Order(
        request.transfer_id,
        request.payer_account_id,
        payee,
        request.amount.currency_code,
        request.amount.minor_units,
        request.memo,
        rules.body_hash(request),
        application,
        asked_center,
    )


def _cannot_cancel_now(application: Application) -> RpcError:
    return RpcError(
        StatusCode.UNAVAILABLE,
        "HOME_CENTER_UNAVAILABLE",
        f"neither center {application.origin_center}, which has this application, nor its home answers",
        retry_after_ms=5000,
        advice="The application goes on; try to cancel it again in a moment.",
    )
