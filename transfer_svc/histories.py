"""What this center knows of one transfer, from its tables: the facts that `duohuo why` tells as a story."""

from dataclasses import dataclass

from duohuo.internal.v1.log_pb2 import PostingKind
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    ApplicationFact,
    AttemptFact,
    DecisionFact,
    EntryFact,
    FindTransfersRequest,
    FindTransfersResponse,
    HoldFact,
    ReceiptFact,
    RefusalFact,
    TransferFacts,
)
from duohuo.v1.transfer_service_pb2 import Application
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.store import Store, Unit, query
from transfer_svc import applications, attempts, holds, notifications, refusals, transfers
from transfer_svc.holds import HoldRow
from transfer_svc.refusals import Refusal
from transfer_svc.transfers import TransferRow

TRANSFERS_FOUND_MAX = 20
APPLICATIONS_FOUND_MAX = 20

SCHEMA = """
CREATE INDEX IF NOT EXISTS transfer_by_id ON transfer (transfer_id);
CREATE INDEX IF NOT EXISTS application_by_transfer ON application (transfer_id);
"""


@dataclass(frozen=True, slots=True)
class Histories:
    """Serves FindTransfers."""

    database: Store

    async def FindTransfers(
        self, request: FindTransfersRequest, _incoming: Incoming
    ) -> FindTransfersResponse:
        # Aside: an account's entries have no index by transfer, which every posting would pay for.
        with self.database.frozen() as frozen:
            return FindTransfersResponse(transfers=await frozen.read(find(request.id)))


def find(wanted: str) -> Unit[list[TransferFacts]]:
    """The transfers that a transfer id or an application id names here."""
    named = yield from query(
        "SELECT payer_account_id, transfer_id FROM transfer WHERE transfer_id = ?1"
        " UNION SELECT payer_account_id, transfer_id FROM application WHERE transfer_id = ?1"
        " UNION SELECT payer_account_id, transfer_id FROM application WHERE application_id = ?1"
        " ORDER BY 1 LIMIT ?2",
        wanted,
        TRANSFERS_FOUND_MAX,
    )
    found = []
    for payer, transfer_id in named:
        found.append((yield from _facts(payer, transfer_id)))
    return found


def _facts(payer: str, transfer_id: str) -> Unit[TransferFacts]:
    facts = TransferFacts(transfer_id=transfer_id, payer_account_id=payer)
    row = yield from transfers.find(payer, transfer_id)
    if row is not None:
        facts.decision.CopyFrom(_decision(row))
        facts.entries.extend((yield from _entries(row)))
    ids = yield from query(
        "SELECT application_id FROM application WHERE payer_account_id = ? AND transfer_id = ?"
        " ORDER BY create_ms LIMIT ?",
        payer,
        transfer_id,
        APPLICATIONS_FOUND_MAX,
    )
    for (application_id,) in ids:
        application = yield from applications.find(application_id)
        assert application is not None  # noqa: S101 - found above, in this transaction
        fact = _application(application.message)
        fact.attempts.extend((yield from _attempts(application_id)))
        facts.applications.append(fact)
        facts.deliveries.extend((yield from notifications.of_subject(application_id)))
    hold = yield from holds.captured_as(payer, transfer_id)
    if hold is not None:
        facts.hold.CopyFrom(_hold(hold))
    received = yield from query(
        "SELECT center, reason FROM received WHERE payer_account_id = ? AND transfer_id = ?",
        payer,
        transfer_id,
    )
    for center, reason in received:
        facts.receipt.CopyFrom(ReceiptFact(center=center, reason=reason))
    refusal = yield from refusals.find(payer, transfer_id)
    if refusal is not None:
        facts.refusal.CopyFrom(_refusal(refusal))
    return facts


def _entries(row: TransferRow) -> Unit[list[EntryFact]]:
    """What the transfer did to its payer and its payee.

    Another payer may have used the same id: then sign and kind say whose entry it is.
    """
    # Kinds by number, see PostingKind: a payer has transfer, debit and refund, a payee deposit,
    # transfer and credit.
    rows = yield from query(
        "SELECT center, kind, account_id, number, minor_units, balance_after, time_ms FROM entry"
        " WHERE transfer_id = ?1 AND account_id IN (?2, ?3)"
        " AND (account_id = ?2 AND (kind IN (2, 3) AND minor_units < 0 OR kind = 5)"
        " OR account_id = ?3 AND kind IN (1, 2, 4) AND minor_units > 0)"
        " ORDER BY account_id, number LIMIT 10",
        row.transfer_id,
        row.payer_account_id,
        row.payee_account_id,
    )
    return [
        EntryFact(
            center=center,
            kind=PostingKind.Name(kind).removeprefix("POSTING_KIND_").lower(),
            account_id=account_id,
            number=number,
            amount=Money(currency_code=row.currency, minor_units=minor_units),
            balance_after=Money(currency_code=row.currency, minor_units=balance_after),
            create_time=timestamp(time_ms),
        )
        for center, kind, account_id, number, minor_units, balance_after, time_ms in rows
    ]


def _attempts(application_id: str) -> Unit[list[AttemptFact]]:
    return [
        AttemptFact(
            number=one.number,
            asked_center=one.asked,
            begin_time=timestamp(one.begin_ms),
            end_time=timestamp(one.end_ms),
            error=one.error,
        )
        for one in (yield from attempts.of(application_id))
    ]


def _decision(row: TransferRow) -> DecisionFact:
    return DecisionFact(
        center=row.center,
        decide_time=timestamp(row.create_ms),
        state=row.state,
        reason=row.reason,
        payee_account_id=row.payee_account_id,
        payee_home=row.payee_home,
        amount=Money(currency_code=row.currency, minor_units=row.minor_units),
        application_id=row.application_id,
        asked_center=row.asked_center,
    )


def _application(message: Application) -> ApplicationFact:
    """Without the payee's identifier, which is nobody's business here."""
    fact = ApplicationFact(
        application_id=message.application_id,
        origin_center=message.origin_center,
        state=message.state,
        reason=message.reason,
        payee_account_id=message.payee_account_id,
        amount=message.amount,
        create_time=message.create_time,
        expire_time=message.expire_time,
    )
    if message.HasField("decide_time"):
        fact.decide_time.CopyFrom(message.decide_time)
    return fact


def _hold(hold: HoldRow) -> HoldFact:
    return HoldFact(
        hold_id=hold.hold_id,
        center=hold.center,
        amount=Money(currency_code=hold.currency, minor_units=hold.minor_units),
        create_time=timestamp(hold.create_ms),
        expire_time=timestamp(hold.expire_ms),
    )


def _refusal(refusal: Refusal) -> RefusalFact:
    return RefusalFact(
        center=refusal.center,
        account_id=refusal.account_id,
        balance=Money(currency_code=refusal.currency, minor_units=refusal.balance),
        held=Money(currency_code=refusal.currency, minor_units=refusal.held),
        refuse_time=timestamp(refusal.time_ms),
    )
