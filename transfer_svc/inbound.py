"""The effect of other centers' log records on this center's money, copies and applications."""

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_CREDIT,
    POSTING_KIND_DEBIT,
    POSTING_KIND_TRANSFER,
    CreditRefused,
    LogRecord,
    Posting,
)
from duohuo.v1.transfer_service_pb2 import TRANSFER_STATE_REFUNDED, TransferState
from runtime.ids import account_slot
from runtime.store import Unit
from sync_bus import homes
from sync_bus.log import Stamp
from sync_bus.site import Site
from transfer_svc import applications, controls, holds, ledger, moving, notifications, transfers
from transfer_svc.states import TransferEvent, decision_of

RECONCILED_AT_ONCE_MAX = 200


class Inbound:
    """Applies records as the home center of some accounts; and moves these (`homes.Movement`)."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def apply(self, source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
        """Raises ValueError for a record of an account that is not at home at its source."""
        for account_id in _written(record):
            slot = account_slot(account_id)
            if slot is not None:
                yield from homes.require_speaks(source, ledger.LEDGER.name, slot)
        match record.WhichOneof("body"):
            case "posting":
                posting = record.posting
                yield from ledger.copy(source, posting, record.time_ms)
                yield from transfers.copy_posting(source, posting, record.time_ms)
                if posting.kind in (POSTING_KIND_DEBIT, POSTING_KIND_TRANSFER):
                    payer, transfer_id = posting.payer_account_id, posting.transfer_id
                    here, body_hash = self._site.here, posting.body_hash
                    yield from applications.touch(payer, transfer_id, body_hash, here)
                if posting.kind == POSTING_KIND_DEBIT and (yield from self._receives(posting)):
                    yield from transfers.credit(self._site.here, source, posting, stamp)
                if posting.kind == POSTING_KIND_CREDIT and posting.other_home == self._site.here:
                    yield from self._settle(
                        posting.payer_account_id,
                        posting.transfer_id,
                        TransferEvent.CREDITED,
                        "",
                        stamp,
                    )
            case "credit_refused":
                refused = record.credit_refused
                yield from _require_payees_home(source, refused)
                yield from transfers.copy_refused(source, refused, record.time_ms)
                if refused.payer_home == self._site.here:
                    yield from self._settle(
                        refused.payer_account_id,
                        refused.transfer_id,
                        TransferEvent.REFUSED,
                        refused.reason,
                        stamp,
                    )
            case "transfer_settled":
                settled = record.transfer_settled
                yield from transfers.copy_settled(source, settled)
                if settled.state == TRANSFER_STATE_REFUNDED:
                    yield from self._refund(settled.payer_account_id, settled.transfer_id, stamp)
                yield from self._follow(
                    settled.payer_account_id,
                    settled.transfer_id,
                    settled.body_hash,
                    settled.state,
                    settled.reason,
                    stamp,
                )
            case "hold_changed":
                yield from holds.copy(source, record.hold_changed)
            case "control_changed":
                yield from controls.copy(source, record.control_changed)
            case "application_changed":
                changed = record.application_changed
                yield from applications.copy(changed.application, changed.body_hash)
            case other:
                raise ValueError(f"not a record of this service: {other}")

    def reconcile(self, source: str, topic: str) -> Unit[int]:
        """What a source's entries would have caused here, from its rows (`sync_bus.snapshot`)."""
        here, stamp = self._site.here, self._site.stamps.now()
        if topic == applications.APPLICATIONS.name and source == here:
            return (yield from notifications.of_restored(here, stamp, RECONCILED_AT_ONCE_MAX))
        if topic != ledger.LEDGER.name:
            return 0
        credited = yield from self._answer(source, stamp)
        answered = yield from transfers.unsettled(source, here, RECONCILED_AT_ONCE_MAX)
        for payer, transfer_id, reason in answered:
            event = TransferEvent.REFUSED if reason else TransferEvent.CREDITED
            yield from self._settle(payer, transfer_id, event, reason, stamp)
        decided = yield from applications.decided_elsewhere(here, RECONCILED_AT_ONCE_MAX)
        for application_id, state, reason in decided:
            decision = decision_of(state, reason)
            yield from applications.decide(application_id, decision, reason, "", stamp)
        return credited + len(answered) + len(decided)

    def move_out(self, slot: int, epoch: int, to: str, stamp: Stamp) -> Unit[int]:
        return moving.move_out(self._site.here, slot, epoch, to, stamp)

    def move_in(self, slot: int, epoch: int, source: str, stamp: Stamp) -> Unit[int]:
        return moving.move_in(self._site.here, slot, epoch, source, stamp)

    def is_unanswered(self) -> Unit[bool]:
        """Has somebody sent, or is somebody owed, money that is this center's to credit or to give back?"""
        here = self._site.here
        for center in (here, *self._site.mesh.peers):
            if (yield from transfers.uncredited(center, here, 1)):
                return True
            if (yield from transfers.unrefunded(center, here, 1)):
                return True
        return False

    def answer(self) -> Unit[bool]:
        """Does some of that; False if there was nothing."""
        done = 0
        for center in (self._site.here, *self._site.mesh.peers):
            done += yield from self._answer(center, self._site.stamps.now())
        return done > 0

    def _answer(self, source: str, stamp: Stamp) -> Unit[int]:
        """Credits, or gives back, some of what a source's debits have left to this center to do."""
        here = self._site.here
        debits = yield from transfers.uncredited(source, here, RECONCILED_AT_ONCE_MAX)
        for debit in debits:
            yield from transfers.credit(here, source, debit, stamp)
            if source == here:
                yield from self._settle_own(debit, stamp)
        refused = yield from transfers.unrefunded(source, here, RECONCILED_AT_ONCE_MAX)
        for row in refused:
            yield from transfers.refund(here, row, stamp)
        return len(debits) + len(refused)

    def _settle_own(self, debit: Posting, stamp: Stamp) -> Unit[None]:
        """A debit of this center's own, that it has answered itself."""
        reason = yield from transfers.received_reason(debit.payer_account_id, debit.transfer_id)
        event = TransferEvent.REFUSED if reason else TransferEvent.CREDITED
        yield from self._settle(debit.payer_account_id, debit.transfer_id, event, reason, stamp)

    def _refund(self, payer: str, transfer_id: str, stamp: Stamp) -> Unit[None]:
        if (yield from self._is_home(payer)):
            row = yield from transfers.find(payer, transfer_id)
            assert row is not None  # noqa: S101 - copied in this unit
            yield from transfers.refund(self._site.here, row, stamp)

    def _receives(self, debit: Posting) -> Unit[bool]:
        """Must this center credit or refuse it? Nobody is home of a payee that is no account: then it
        is refused where it was sent, so that the payer gets it back."""
        payee = debit.payee_account_id
        if account_slot(payee) is None:
            return debit.other_home == self._site.here
        return (yield from self._is_home(payee))

    def _is_home(self, account_id: str) -> Unit[bool]:
        slot = account_slot(account_id)
        return slot is not None and (yield from homes.acts_for(self._site.here, slot))

    def _settle(
        self, payer: str, transfer_id: str, event: TransferEvent, reason: str, stamp: Stamp
    ) -> Unit[None]:
        row = yield from transfers.settle(self._site.here, payer, transfer_id, event, reason, stamp)
        yield from self._follow(payer, transfer_id, row.body_hash, row.state, row.reason, stamp)

    def _follow(
        self,
        payer: str,
        transfer_id: str,
        body_hash: bytes,
        state: TransferState.ValueType,
        reason: str,
        stamp: Stamp,
    ) -> Unit[None]:
        """Moves the applications of this origin that wait for the transfer."""
        waiting = yield from applications.waiting_for(
            payer, transfer_id, body_hash, self._site.here
        )
        for application_id in waiting:
            yield from applications.decide(
                application_id, decision_of(state, reason), reason, "", stamp
            )
        yield from applications.touch(payer, transfer_id, body_hash, self._site.here)


def _require_payees_home(source: str, refused: CreditRefused) -> Unit[None]:
    """Raises ValueError if a center refuses what is not its own to credit: whose it is may credit it."""
    row = yield from transfers.find(refused.payer_account_id, refused.transfer_id)
    if row is None:
        return  # the debit is at its own center first: there it is known
    slot = account_slot(row.payee_account_id)
    if slot is not None:
        yield from homes.require_speaks(source, ledger.LEDGER.name, slot)
    elif row.payee_home != source:
        raise ValueError("nobody has asked this center for the credit")


def _written(record: LogRecord) -> list[str]:
    """The accounts whose money or rights a record changes."""
    match record.WhichOneof("body"):
        case "posting":
            return [leg.account_id for leg in record.posting.legs]
        case "hold_changed":
            return [record.hold_changed.payer_account_id]
        case "control_changed":
            return [record.control_changed.account_id]
    return []
