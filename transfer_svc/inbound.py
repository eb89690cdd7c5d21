"""The effect of other centers' log records on this center's money, copies and applications."""

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_CREDIT,
    POSTING_KIND_DEBIT,
    POSTING_KIND_TRANSFER,
    LogRecord,
    Posting,
)
from duohuo.v1.transfer_service_pb2 import TransferState
from runtime.ids import account_slot
from runtime.store import Unit
from sync_bus.log import Stamp
from sync_bus.site import Site
from transfer_svc import applications, controls, holds, ledger, notifications, transfers
from transfer_svc.states import TransferEvent, decision_of

RECONCILED_AT_ONCE_MAX = 200


class Inbound:
    """Applies records as the home center of some accounts."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def apply(self, source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
        """Raises ValueError for a record of an account that is not at home at its source."""
        for account_id in _written(record):
            if account_slot(account_id) is not None and self._site.home_of(account_id) != source:
                raise ValueError("an account of another home")
        match record.WhichOneof("body"):
            case "posting":
                posting = record.posting
                yield from ledger.copy(source, posting, record.time_ms)
                yield from transfers.copy_posting(source, posting, record.time_ms)
                if posting.kind in (POSTING_KIND_DEBIT, POSTING_KIND_TRANSFER):
                    payer, transfer_id = posting.payer_account_id, posting.transfer_id
                    here, body_hash = self._site.here, posting.body_hash
                    yield from applications.touch(payer, transfer_id, body_hash, here)
                if posting.kind == POSTING_KIND_DEBIT and self._receives(posting):
                    yield from transfers.credit(self._site.here, source, posting, stamp)
                if posting.kind == POSTING_KIND_CREDIT and self._is_home(posting.payer_account_id):
                    yield from self._settle(
                        posting.payer_account_id,
                        posting.transfer_id,
                        TransferEvent.CREDITED,
                        "",
                        stamp,
                    )
            case "credit_refused":
                refused = record.credit_refused
                yield from transfers.copy_refused(source, refused, record.time_ms)
                if self._is_home(refused.payer_account_id):
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
        debits = yield from transfers.uncredited(source, here, RECONCILED_AT_ONCE_MAX)
        for debit in debits:
            yield from transfers.credit(here, source, debit, stamp)
        answered = yield from transfers.unsettled(source, here, RECONCILED_AT_ONCE_MAX)
        for payer, transfer_id, reason in answered:
            event = TransferEvent.REFUSED if reason else TransferEvent.CREDITED
            yield from self._settle(payer, transfer_id, event, reason, stamp)
        decided = yield from applications.decided_elsewhere(here, RECONCILED_AT_ONCE_MAX)
        for application_id, state, reason in decided:
            decision = decision_of(state, reason)
            yield from applications.decide(application_id, decision, reason, "", stamp)
        return len(debits) + len(answered) + len(decided)

    def _receives(self, debit: Posting) -> bool:
        """Must this center credit or refuse it? Nobody is home of a payee that is no account: then it
        is refused where it was sent, so that the payer gets it back."""
        payee = debit.payee_account_id
        if account_slot(payee) is None:
            return debit.other_home == self._site.here
        return self._is_home(payee)

    def _is_home(self, account_id: str) -> bool:
        return self._site.home_of(account_id) == self._site.here

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
