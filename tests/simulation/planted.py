"""Bugs that the simulator must find: at least one for each guarantee, switched on in tests only."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from grpc import StatusCode

import transfer_svc.app
from account_svc import announcement, registry, revoker, rules
from account_svc import store as account_store
from account_svc.announcement import Raised
from account_svc.identifier_service import IdentifierService
from duohuo.internal.v1.log_pb2 import AnnouncementChanged, Leg, LogEntry, LogRecord, Posting
from duohuo.internal.v1.peer_services_pb2 import (
    ClaimIdentifierRequest,
    ClaimIdentifierResponse,
    LookupContactRequest,
    LookupContactResponse,
    ShareFailuresRequest,
)
from duohuo.v1.operator_service_pb2 import DELIVERY_STATE_DELIVERED
from duohuo.v1.routing_pb2 import POLICY_HOME
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_DEBITED,
)
from gateway import router, routes
from gateway.routes import Target
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.hlc import COUNTER_BITS, HybridClock
from runtime.ids import account_slot
from runtime.methods import peer_method
from runtime.placement import Placement, slot_of
from runtime.store import Unit, query
from runtime.token_seal import TokenSeal
from session_svc import sessions
from session_svc.guard import Guard
from session_svc.service import SessionService
from sync_bus import homes, inbox, log
from sync_bus.anti_entropy import AntiEntropy
from sync_bus.inbox import Outcome
from sync_bus.log import Stamp
from sync_bus.recovery import Recovery
from transfer_svc import chain, controls, dispatch, holds, ledger, notifications, transfers
from transfer_svc.hold_service import HoldExpiry
from transfer_svc.inbound import Inbound
from transfer_svc.notifier import Notifier
from transfer_svc.service import TransferService
from transfer_svc.states import HoldEvent, TransferEvent

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Planted:
    """A bug, the guarantee that it breaks, and how to switch it on."""

    guarantee: str
    name: str
    plant: Callable[[Patch], None]


def uniqueness_checked_locally_only(patch: Patch) -> None:
    """Any center registers any identifier."""
    patch.setattr(homes, "require", _anybody_is_home)
    patch.setattr(router, "targets", _home_means_here)


def registered_although_it_was_claimed(patch: Patch) -> None:
    """Registering looks at what was registered, not at what accounts have claimed later."""

    def holder(identifier: str) -> Unit[str | None]:
        found = yield from registry.find_registered(identifier)
        return found.account_id if found else None

    patch.setattr(registry, "holder", holder)


def claimed_where_it_is_asked_for(patch: Patch) -> None:
    """Any center claims any identifier for the accounts that it has."""

    async def claim(
        self: IdentifierService, identifier: str, account: str, _timeout_s: float
    ) -> None:
        unit = registry.claim(identifier, account, self._site.here, self._site.stamps.now())
        if await self._store.write("claim", unit) != account:
            raise rules.identifier_taken()

    patch.setattr(IdentifierService, "_claim", claim)


def claim_without_a_word(patch: Patch) -> None:
    """Home answers that it has claimed an identifier, and does not keep it."""

    async def claim(
        _self: IdentifierService, request: ClaimIdentifierRequest, _incoming: Any
    ) -> ClaimIdentifierResponse:
        return ClaimIdentifierResponse(holder_account_id=request.account_id)

    patch.setattr(IdentifierService, "ClaimIdentifier", claim)


def what_comes_late_is_kept(patch: Patch) -> None:
    """Erased is what was there; what arrives afterwards is taken as always."""

    def never(_anything: object) -> Unit[bool]:
        yield from ()
        return False

    patch.setattr(account_store, "_is_of_erased", never)


def erased_at_home_alone(patch: Patch) -> None:
    """Other centers are told, and do nothing."""
    original = account_store.apply

    def apply(source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
        if not record.HasField("account_erased"):
            yield from original(source, record, stamp)

    patch.setattr(account_store, "apply", apply)


def login_asks_home_always(patch: Patch) -> None:
    """The local copy is not trusted."""

    original = SessionService._prove

    async def prove(self: SessionService, identifier: str, *rest: Any) -> str:
        home = self._site.placement.home(slot_of(identifier))
        if not self._site.mesh.reachable(home):
            raise RpcError(StatusCode.UNAVAILABLE, "HOME_CENTER_UNAVAILABLE", "home is away")
        return await original(self, identifier, *rest)

    patch.setattr(SessionService, "_prove", prove)


def a_full_disk_keeps_users_out(patch: Patch) -> None:
    """There is no memory for a session that the disk has no room for."""
    patch.setattr(sessions, "UNSTORED_MAX", 0)


def unknown_outcome_taken_for_failure(patch: Patch) -> None:
    """A transfer whose credit is late is refunded at once."""
    original = TransferService.settled

    async def settled(self: TransferService, row: Any, timeout_s: float) -> Any:
        row = await original(self, row, min(timeout_s, 0.25))
        if row.state != TRANSFER_STATE_DEBITED:
            return row
        return await self._store.write(
            "refund",
            transfers.settle(
                self._site.here,
                row.payer_account_id,
                row.transfer_id,
                TransferEvent.REFUSED,
                "INSUFFICIENT_FUNDS",
                self._site.stamps.now(),
            ),
        )

    patch.setattr(TransferService, "settled", settled)


def balance_checked_before_the_transaction(patch: Patch) -> None:
    """Read, decide, then write: two transfers at once both find the money there."""
    original = TransferService._decide

    async def decide(self: TransferService, request: Any, refused: str, application: str) -> Any:
        payer = await self._store.read(ledger.find(request.payer_account_id))
        money = request.amount
        enough = payer is not None and payer.balance >= money.minor_units
        await asyncio.sleep(0.02)
        return await original(
            self, request, refused or ("" if enough else "INSUFFICIENT_FUNDS"), application
        )

    def move(
        center: str,
        posting: Posting,
        account_id: str,
        minor_units: int,
        counterparty: str,
        stamp: Stamp,
    ) -> Unit[Any]:
        yield from query(
            "INSERT INTO ledger_account VALUES (?, ?, 0, 0, ?, 0, 0, ?) ON CONFLICT DO NOTHING",
            account_id,
            posting.currency_code,
            center,
            chain.START,
        )
        last = yield from chain.last(account_id, center)
        leg = Leg(
            account_id=account_id,
            minor_units=minor_units,
            balance_after=last.balance + minor_units,
            number=last.number + 1,
        )
        entry = ledger._entry(center, posting, leg, counterparty, stamp.time_ms)
        leg.hash = chain.link(last.head, posting.currency_code, entry)
        yield from query(
            "UPDATE ledger_account SET balance = balance + ?, last_number = last_number + 1,"
            " head = ? WHERE account_id = ? AND center = ?",
            minor_units,
            leg.hash,
            account_id,
            center,
        )
        yield from ledger._insert_entry(center, posting, leg, counterparty, stamp.time_ms)
        return leg

    patch.setattr(ledger, "cannot_pay", lambda *_: "")
    patch.setattr(ledger, "_move", move)
    patch.setattr(
        transfer_svc.app,
        "SCHEMA",
        transfer_svc.app.SCHEMA.replace("balance >= held OR account_id LIKE '%.%'", "true"),
    )
    patch.setattr(TransferService, "_decide", decide)


def retry_with_a_new_id(patch: Patch) -> None:
    """Each attempt of an application is a new transfer to home."""
    original = dispatch.transfer_of

    def transfer_of(application: Any) -> Any:
        transfer = original(application)
        transfer.transfer_id += f"-{application.attempts}"
        return transfer

    patch.setattr(dispatch, "transfer_of", transfer_of)


def _nothing(*_: Any) -> Unit[None]:
    yield from query("SELECT 1")


def last_to_arrive_wins(patch: Patch) -> None:
    """Versions are not compared."""
    patch.setattr(account_store, "wins", lambda *_: True)


def last_writer_by_wall_clock(patch: Patch) -> None:
    """Timestamps are the local wall clock, whatever has been seen."""

    def tick(self: HybridClock) -> int:
        self.latest = self._clock.wall_ms() << COUNTER_BITS
        return self.latest

    patch.setattr(HybridClock, "tick", tick)
    patch.setattr(HybridClock, "observe", lambda _clock, _remote: None)


def password_change_keeps_other_sessions(patch: Patch) -> None:
    """Whoever knew the old password stays."""
    patch.setattr(revoker, "note", _nothing)


def failover_of_home_only_calls(patch: Patch) -> None:
    """The next center acts as home, without having become it. Its books have no money of the payer's, so it
    can do no harm; but what it answers says nothing."""
    patch.setattr(homes, "require", _anybody_is_home)

    def targets(policy: Any, place: Any, here: str, placement: Any) -> tuple[Target, ...]:
        if policy == POLICY_HOME:
            return tuple(Target(center, "failed-over") for center in placement.order[place.slot])
        return routes.targets(policy, place, here, placement)

    patch.setattr(router, "targets", targets)


def identifier_in_an_error(patch: Patch) -> None:
    """A helpful message repeats what was typed."""
    original = SessionService._prove

    async def prove(self: SessionService, identifier: str, *rest: Any) -> str:
        try:
            return await original(self, identifier, *rest)
        except RpcError as error:
            error.message += f" ({identifier})"
            raise

    patch.setattr(SessionService, "_prove", prove)


def unknown_outcome_called_definite(patch: Patch) -> None:
    """A call that was not answered in time is said not to have run."""
    original = router.Router._unanswered

    def unanswered(*arguments: Any) -> RpcError:
        error = original(*arguments)
        error.ran = False
        return error

    patch.setattr(router.Router, "_unanswered", unanswered)


def applied_without_cursor(patch: Patch) -> None:
    """Whatever arrives applies, again and again."""
    original = inbox._turn

    def turn(cursor: Any, entry: LogEntry) -> Outcome:
        outcome = original(cursor, entry)
        return Outcome.APPLIED if outcome is Outcome.DUPLICATE else outcome

    patch.setattr(inbox, "_turn", turn)


def lost_store_begins_without_asking(patch: Patch) -> None:
    """An empty store takes itself for a new one."""

    async def seal(self: Recovery) -> tuple[int, dict[str, Any]]:
        return self._stamps.clock.wall_ms(), {}

    patch.setattr(Recovery, "_seal", seal)


def numbers_begin_anew_after_a_loss(patch: Patch) -> None:
    """What came back from the others is not counted."""
    original = log.begin_life
    patch.setattr(log, "begin_life", lambda generation, _positions: original(generation, {}))


def snapshot_without_its_effects(patch: Patch) -> None:
    """Rows are copied, but money on its way to this center is not credited."""

    def reconcile(_inbound: Inbound, _source: str, _topic: str) -> Unit[int]:
        yield from ()
        return 0

    patch.setattr(Inbound, "reconcile", reconcile)


def differences_are_not_repaired(patch: Patch) -> None:
    """Anti-entropy is off."""

    async def compare(*_arguments: Any) -> None:
        return None

    patch.setattr(AntiEntropy, "compare", compare)


def end_is_noted_after_the_decision(patch: Patch) -> None:
    """In a unit of its own, which a crash comes before: here, always."""
    patch.setattr(notifications, "note", _nothing)


def delivered_before_it_is_sent(patch: Patch) -> None:
    """Send, and hope."""

    async def failed(self: Notifier, due: Any, _undelivered: Any) -> None:
        await self._store.write(
            "sent",
            notifications.finish(due.notification_id, due.channel, DELIVERY_STATE_DELIVERED, 0),
        )

    patch.setattr(Notifier, "_failed", failed)


def restored_origin_is_silent(patch: Patch) -> None:
    """What came back of lost applications is not told again."""

    def of_restored(*_: Any) -> Unit[int]:
        yield from ()
        return 0

    patch.setattr(notifications, "of_restored", of_restored)


def nobody_known_means_nobody_wants_it(patch: Patch) -> None:
    """The local copy is believed when it has no setting."""

    async def contact(self: Notifier, account_id: str) -> LookupContactResponse:
        return await ask(
            self._site.mesh.local,
            peer_method("account", "LookupContact"),
            LookupContactRequest(account_id=account_id),
            LookupContactResponse,
            2.0,
        )

    patch.setattr(Notifier, "_contact", contact)


def told_by_every_attempt(patch: Patch) -> None:
    """The text is made when it is sent, from what the center knows by then."""

    async def send(self: Notifier, due: Any, contact: Any) -> None:
        changed = due._replace(body=due.body.replace('"reason": ""', f'"reason": "{due.attempts}"'))
        await original(self, changed, contact)

    original = Notifier._send
    patch.setattr(Notifier, "_send", send)


def held_money_is_not_kept_back(patch: Patch) -> None:
    """Holds are written down, and their money is spent."""
    original = ledger.hold_back
    patch.setattr(ledger, "hold_back", lambda center, account, _: original(center, account, 0))


def a_hold_may_be_captured_twice(patch: Patch) -> None:
    """A hold stays as it is when it is captured, but for what is available."""
    original = holds.end

    def end(row: Any, event: HoldEvent, *arguments: Any) -> Unit[Any]:
        if event is not HoldEvent.CAPTURE:
            return (yield from original(row, event, *arguments))
        yield from query("SELECT 1")
        return row

    patch.setattr(holds, "end", end)


def holds_never_expire(patch: Patch) -> None:
    """Nobody does the duty."""

    async def run(_expiry: HoldExpiry) -> None:
        await asyncio.Event().wait()

    patch.setattr(HoldExpiry, "run", run)


def frozen_accounts_pay(patch: Patch) -> None:
    """Nobody looks whether an account is frozen."""
    patch.setattr(controls, "cannot_pay", lambda *_: "")


def each_center_counts_guesses_alone(patch: Patch) -> None:
    """Nobody tells the others."""

    async def tell(_guard: Guard, _peer: str) -> None: ...

    patch.setattr(Guard, "_tell", tell)


def who_starts_again_is_told_nothing(patch: Patch) -> None:
    """It does not show that it is another process."""
    original = Guard.ShareFailures

    async def share(guard: Guard, request: ShareFailuresRequest, incoming: Any) -> Any:
        request.process = ""
        return await original(guard, request, incoming)

    patch.setattr(Guard, "ShareFailures", share)


def guesses_lock_everybody_out(patch: Patch) -> None:
    """No device is known."""
    patch.setattr(TokenSeal, "device_of", lambda *_: None)


def the_old_home_goes_on(patch: Patch) -> None:
    """Who was home at first acts as home for ever, and nobody hears of another one."""
    patch.setattr(Placement, "learn", lambda *_: False)
    original = homes.require

    def require(center: str, slot: int) -> Unit[None]:
        rows = yield from query("SELECT home FROM first_home WHERE slot = ?", f"{slot:03x}")
        if rows != [(center,)]:
            yield from original(center, slot)

    patch.setattr(homes, "require", require)


def decisions_stay_at_the_old_home(patch: Patch) -> None:
    """The new home knows only what it has decided itself."""
    original = transfers.find

    def find(payer: str, transfer_id: str) -> Unit[Any]:
        row = yield from original(payer, transfer_id)
        slot = account_slot(payer)
        if row is None or slot is None:
            return row
        present = yield from homes.present(slot)
        return row if row.center == present.home else None

    patch.setattr(transfers, "find", find)


def what_came_meanwhile_is_nobodys(patch: Patch) -> None:
    """The new home credits only what arrives from now on."""

    def nothing(_self: Inbound) -> Unit[bool]:
        yield from query("SELECT 1")
        return False

    patch.setattr(Inbound, "answer", nothing)
    patch.setattr(Inbound, "is_unanswered", nothing)


def holds_stay_at_the_old_home(patch: Patch) -> None:
    """Their money moves, and may be spent."""

    def none(*_: Any) -> Unit[list[Any]]:
        yield from query("SELECT 1")
        return []

    patch.setattr(holds, "moved_from", none)


def announced_at_one_center_alone(patch: Patch) -> None:
    """What others hear of an announcement is not told by them."""
    of = announcement.of

    def lifted(changed: AnnouncementChanged) -> Raised:
        return of(changed)._replace(lifted=1)

    patch.setattr(announcement, "of", lifted)


def _anybody_is_home(_center: str, _slot: int) -> Unit[None]:
    yield from query("SELECT 1")


def _home_means_here(policy: Any, place: Any, here: str, placement: Any) -> tuple[Target, ...]:
    if policy == POLICY_HOME:
        return (Target(here, "local"),)
    return routes.targets(policy, place, here, placement)


PLANTED = (
    Planted("UNIQUE", "uniqueness checked locally only", uniqueness_checked_locally_only),
    Planted("UNIQUE", "registered although claimed", registered_although_it_was_claimed),
    Planted("UNIQUE", "claimed where it is asked for", claimed_where_it_is_asked_for),
    Planted("DURABLE", "claim without a word", claim_without_a_word),
    Planted("ERASED", "what comes late is kept", what_comes_late_is_kept),
    Planted("ERASED", "erased at home alone", erased_at_home_alone),
    Planted("LOGIN", "login asks home always", login_asks_home_always),
    Planted("LOGIN", "a full disk keeps users out", a_full_disk_keeps_users_out),
    Planted("CONSERVE", "unknown outcome taken for failure", unknown_outcome_taken_for_failure),
    Planted(
        "NO-OVERDRAFT",
        "balance checked before the transaction",
        balance_checked_before_the_transaction,
    ),
    Planted("NO-OVERDRAFT", "held money is not kept back", held_money_is_not_kept_back),
    Planted("FROZEN", "frozen accounts pay", frozen_accounts_pay),
    Planted("ONCE", "retry with a new id", retry_with_a_new_id),
    Planted("ONCE", "a hold may be captured twice", a_hold_may_be_captured_twice),
    Planted("CONVERGE", "holds never expire", holds_never_expire),
    Planted("CONVERGE", "last to arrive wins", last_to_arrive_wins),
    Planted("CONVERGE", "applied without cursor", applied_without_cursor),
    Planted("DURABLE", "lost store begins without asking", lost_store_begins_without_asking),
    Planted(
        "DURABLE", "password change keeps other sessions", password_change_keeps_other_sessions
    ),
    Planted("CONVERGE", "numbers begin anew after a loss", numbers_begin_anew_after_a_loss),
    Planted("CONVERGE", "snapshot without its effects", snapshot_without_its_effects),
    Planted("CONVERGE", "differences are not repaired", differences_are_not_repaired),
    Planted("MONOTONE", "last writer by wall clock", last_writer_by_wall_clock),
    Planted("CLEAR", "failover of home-only calls", failover_of_home_only_calls),
    Planted("FENCE", "the old home goes on", the_old_home_goes_on),
    Planted("ONCE", "decisions stay at the old home", decisions_stay_at_the_old_home),
    Planted("CONSERVE", "what came meanwhile is nobody's", what_came_meanwhile_is_nobodys),
    Planted("DURABLE", "holds stay at the old home", holds_stay_at_the_old_home),
    Planted("ANNOUNCED", "announced at one center alone", announced_at_one_center_alone),
    Planted("NOTIFY", "end is noted after the decision", end_is_noted_after_the_decision),
    Planted("NOTIFY", "delivered before it is sent", delivered_before_it_is_sent),
    Planted("NOTIFY", "restored origin is silent", restored_origin_is_silent),
    Planted("NOTIFY", "nobody known means nobody wants it", nobody_known_means_nobody_wants_it),
    Planted("NOTIFY", "told by every attempt", told_by_every_attempt),
    Planted("PRIVATE", "identifier in an error", identifier_in_an_error),
    Planted("GUARD", "each center counts guesses alone", each_center_counts_guesses_alone),
    Planted("GUARD", "who starts again is told nothing", who_starts_again_is_told_nothing),
    Planted("GUARD", "guesses lock everybody out", guesses_lock_everybody_out),
    Planted("CLEAR", "unknown outcome called definite", unknown_outcome_called_definite),
)
