"""The RPCs about holds, and the duty to end those that have expired."""

import asyncio
from collections.abc import Awaitable, Callable

from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_REFUSED,
    HOLD_STATE_RELEASED,
    TRANSFER_STATE_DEBITED,
    CaptureHoldRequest,
    CaptureHoldResponse,
    Hold,
    ReleaseHoldRequest,
    ReserveFundsRequest,
    TransferRequest,
)
from runtime import telemetry
from runtime.dispatcher import Incoming
from runtime.endpoint import HOME
from runtime.errors import RpcError
from runtime.signal import Signal
from runtime.store import Store
from sync_bus.homes import Homes
from sync_bus.site import Site
from transfer_svc import holds, reservations, rules
from transfer_svc.holds import HoldRow
from transfer_svc.payees import Payees
from transfer_svc.rules import Order
from transfer_svc.transfers import TransferRow

EXPIRED_AT_ONCE_MAX = 200
WAIT_S_MAX = 60.0
"""So late does a wall clock that was set forward make itself felt; decisions feel it at once."""
RETRY_DELAY_S = 0.5

Settled = Callable[[TransferRow, float], Awaitable[TransferRow]]


class HoldService:
    """Serves the part of TransferService that is about holds, at the payer's home.

    `settled` waits for a debited transfer as Transfer does.
    """

    def __init__(
        self, site: Site, database: Store, payees: Payees, settled: Settled, slots: Homes
    ) -> None:
        self._homes = slots
        self._site = site
        self._store = database
        self._payees = payees
        self._settled = settled

    async def ReserveFunds(self, request: ReserveFundsRequest, incoming: Incoming) -> Hold:
        rules.check_reserve(request)
        slot = self._site.slot_of(request.payer_account_id)
        known = holds.find(request.payer_account_id, request.hold_id)
        hold = await self._store.read(self._homes.acting(slot, known))
        if hold is None:
            hold = await self._reserve(request, slot)
        if hold.body_hash != rules.body_hash(request):
            raise rules.refusal("IDEMPOTENCY_CONFLICT")
        if hold.state == HOLD_STATE_REFUSED:
            raise rules.refusal(hold.reason)
        incoming.reply_metadata[HOME] = self._site.here
        return hold.message()

    async def CaptureHold(
        self, request: CaptureHoldRequest, incoming: Incoming
    ) -> CaptureHoldResponse:
        rules.check_capture(request)
        telemetry.annotate({"duohuo.transfer_id": request.transfer_id})
        payer, body_hash = request.payer_account_id, rules.capture_hash(request)
        slot = self._site.slot_of(payer)
        known = holds.find(payer, request.hold_id)
        hold = await self._store.read(self._homes.acting(slot, known))
        if hold is None or hold.state == HOLD_STATE_REFUSED:
            raise rules.refusal("HOLD_NOT_FOUND")
        wanted = request.amount.currency_code, request.amount.minor_units
        unit = reservations.capture(
            self._site.here,
            payer,
            request.hold_id,
            request.transfer_id,
            wanted if request.HasField("amount") else None,
            body_hash,
            self._site.stamps.now(),
        )
        captured = await self._store.write("capture hold", self._homes.acting(slot, unit))
        transfer = captured.transfer
        if transfer is None or captured.hold is None:
            raise rules.refusal(captured.refused)
        if transfer.body_hash != body_hash:
            raise rules.refusal("IDEMPOTENCY_CONFLICT")
        if transfer.state == TRANSFER_STATE_DEBITED:
            transfer = await self._settled(transfer, incoming.timeout_s)
        incoming.reply_metadata[HOME] = self._site.here
        result = rules.answer(transfer.result())
        return CaptureHoldResponse(hold=captured.hold.message(), transfer=result)

    async def ReleaseHold(self, request: ReleaseHoldRequest, incoming: Incoming) -> Hold:
        rules.check_client_made("hold_id", request.hold_id)
        release = reservations.release(
            request.payer_account_id, request.hold_id, self._site.stamps.now()
        )
        unit = self._homes.acting(self._site.slot_of(request.payer_account_id), release)
        hold: HoldRow | None = await self._store.write("release hold", unit)
        if hold is None or hold.state != HOLD_STATE_RELEASED:
            raise rules.refusal(reservations.ended(hold))
        incoming.reply_metadata[HOME] = self._site.here
        return hold.message()

    async def _reserve(self, request: ReserveFundsRequest, slot: int) -> HoldRow:
        expire_ms = rules.hold_expiry_ms(request, self._site.clock.wall_ms())
        payee, refused = await self._payee(request)
        order = Order(
            "",
            request.payer_account_id,
            payee,
            request.amount.currency_code,
            request.amount.minor_units,
            request.memo,
            rules.body_hash(request),
        )
        unit = reservations.reserve(
            self._site.here, request.hold_id, order, refused, expire_ms, self._site.stamps.now()
        )
        return await self._store.write("reserve funds", self._homes.acting(slot, unit))

    async def _payee(self, request: ReserveFundsRequest) -> tuple[str, str]:
        named = TransferRequest(payer_account_id=request.payer_account_id)
        if kind := request.WhichOneof("payee"):
            setattr(named, kind, getattr(request, kind))
        try:
            return await self._payees.resolve(named)
        except RpcError as error:
            error.advice = "Ask again with the same hold_id once that center answers."
            raise


class HoldExpiry:
    """Ends the holds of this home that have expired, when the next one is due or sooner."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database
        self._changed = Signal()
        database.on_commit(self._changed.notify)

    async def run(self) -> None:
        while True:
            try:
                await self._work()
            except RpcError:
                # The store does not take writes now. Decisions do not count what has expired.
                await asyncio.sleep(RETRY_DELAY_S)

    async def _work(self) -> None:
        """One round: some of what is due now, or waiting until something is."""
        changed = self._changed.next()
        now_ms = self._site.clock.wall_ms()
        next_ms = await self._store.read(holds.next_due_ms(self._site.here))
        if next_ms is not None and next_ms <= now_ms:
            unit = holds.expire_all_due(
                self._site.here, self._site.stamps.now(), EXPIRED_AT_ONCE_MAX
            )
            await self._store.write("expire holds", unit)
            return
        due_s = WAIT_S_MAX if next_ms is None else (next_ms - now_ms) / 1000
        await self._changed.wait(changed, min(due_s, WAIT_S_MAX))
