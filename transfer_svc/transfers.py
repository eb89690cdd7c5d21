"""Transfers: deciding at the payer's home, crediting at the payee's, settling back at the payer's.

Each step is one unit: money, idempotency record, state and log entry together. A transfer is named by
(payer, transfer_id): the id is its client's, so it counts only among that payer's transfers.

A transfer is settled by the center that debited it, whoever is home of its payer by then; it is credited,
or refunded, by the present home of whoever gets the money.

Other centers hold copies of all tables: should the home lose its disk, decisions and credits come back
with the money. `center` is who decided, received or refunded.
"""

from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_COMPENSATION,
    POSTING_KIND_CREDIT,
    POSTING_KIND_DEBIT,
    POSTING_KIND_DEPOSIT,
    POSTING_KIND_MOVE_IN,
    POSTING_KIND_MOVE_OUT,
    POSTING_KIND_REFUND,
    POSTING_KIND_TRANSFER,
    BalanceSeen,
    CreditRefused,
    LogRecord,
    Posting,
    PostingKind,
    TransferSettled,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    TransferResult,
    TransferState,
)
from runtime.ids import account_slot
from runtime.store import Unit, query
from sync_bus import homes, log
from sync_bus.log import Stamp
from transfer_svc import controls, holds, ledger, refusals
from transfer_svc.ledger import LedgerAccount
from transfer_svc.rules import NO_CURRENCY, Order
from transfer_svc.states import TransferEvent, next_transfer_state

SCHEMA = """
CREATE TABLE IF NOT EXISTS transfer (
  payer_account_id TEXT NOT NULL, transfer_id TEXT NOT NULL, body_hash BLOB NOT NULL,
  payee_account_id TEXT NOT NULL, payee_home TEXT NOT NULL, currency TEXT NOT NULL,
  minor_units INTEGER NOT NULL CHECK (minor_units > 0), memo TEXT NOT NULL, state INTEGER NOT NULL,
  reason TEXT NOT NULL, application_id TEXT NOT NULL, create_ms INTEGER NOT NULL,
  center TEXT NOT NULL, asked_center TEXT NOT NULL,
  PRIMARY KEY (payer_account_id, transfer_id)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS transfer_in_transit ON transfer (create_ms) WHERE state = 2;
CREATE TABLE IF NOT EXISTS received (
  payer_account_id TEXT NOT NULL, transfer_id TEXT NOT NULL, source TEXT NOT NULL,
  reason TEXT NOT NULL, center TEXT NOT NULL,
  PRIMARY KEY (payer_account_id, transfer_id)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS transfer_refunded ON transfer (center) WHERE state = 4;
CREATE TABLE IF NOT EXISTS refunded (
  payer_account_id TEXT NOT NULL, transfer_id TEXT NOT NULL, center TEXT NOT NULL,
  PRIMARY KEY (payer_account_id, transfer_id)) STRICT, WITHOUT ROWID;
"""


class TransferRow(NamedTuple):
    payer_account_id: str
    transfer_id: str
    body_hash: bytes
    payee_account_id: str
    payee_home: str
    currency: str
    minor_units: int
    memo: str
    state: TransferState.ValueType
    reason: str
    application_id: str
    create_ms: int
    center: str
    asked_center: str

    def result(self) -> TransferResult:
        return TransferResult(
            transfer_id=self.transfer_id,
            state=self.state,
            reason=self.reason,
            payee_account_id=self.payee_account_id,
            amount=Money(currency_code=self.currency, minor_units=self.minor_units),
        )

    def is_same(self, order: Order) -> bool:
        """Does an order of another payer ask for the same?"""
        return (self.payee_account_id, self.currency, self.minor_units) == (
            order.payee_account_id,
            order.currency,
            order.minor_units,
        )


_COLUMNS = ", ".join(TransferRow._fields)


def find(payer_account_id: str, transfer_id: str) -> Unit[TransferRow | None]:
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM transfer WHERE payer_account_id = ? AND transfer_id = ?",  # noqa: S608 - constant names
        payer_account_id,
        transfer_id,
    )
    return TransferRow(*rows[0]) if rows else None


def decide(
    center: str, order: Order, payee_home: str, refused: str, stamp: Stamp
) -> Unit[TransferRow]:
    """At the payer's home: executes the order, or refuses it, once and for ever.

    A deposit is a transfer whose payer is the outside world, `ledger.outside`; one whose payer is
    `ledger.compensator` is paid by the operators.

    `refused` is a reason known before the unit (nobody to pay, cancelled, expired). If the transfer
    was decided before, that decision is returned; compare its body hash with the order's.
    """
    present = yield from find(order.payer_account_id, order.transfer_id)
    if present is not None:
        return present
    yield from holds.expire_due(order.payer_account_id, stamp)
    reason = refused or (yield from cannot_execute(center, order, payee_home, stamp))
    seen: BalanceSeen | None = None
    if reason:
        state = TRANSFER_STATE_FAILED
        seen = None if refused else (yield from _seen(center, order, payee_home, reason))
        if seen is not None:
            yield from refusals.record(
                order.payer_account_id, order.transfer_id, seen, stamp.time_ms, center
            )
    elif payee_home == center:
        state = TRANSFER_STATE_CREDITED
        kind, source = _source(order)
        yield from ledger.post(center, _posting(kind, order), source, order.payee_account_id, stamp)
    else:
        state = TRANSFER_STATE_DEBITED
        posting = _posting(POSTING_KIND_DEBIT, order)
        posting.other_home = payee_home
        transit = ledger.transit(center, payee_home, order.currency)
        yield from ledger.post(center, posting, order.payer_account_id, transit, stamp)
    row = TransferRow(
        order.payer_account_id,
        order.transfer_id,
        order.body_hash,
        order.payee_account_id,
        payee_home,
        order.currency,
        order.minor_units,
        order.memo,
        state,
        reason,
        order.application_id,
        stamp.time_ms,
        center,
        order.asked_center,
    )
    yield from _insert(row)
    # What moved money has told so by its posting; an application may wait for more than that.
    if state == TRANSFER_STATE_FAILED or (
        order.application_id and state == TRANSFER_STATE_CREDITED
    ):
        yield from _tell(row, stamp, seen)
    return row


def _seen(center: str, order: Order, payee_home: str, reason: str) -> Unit[BalanceSeen | None]:
    """The account for whose balance or currency an order has just been refused; None if for neither."""
    if not ledger.is_system(order.payer_account_id):
        payer = yield from ledger.find(order.payer_account_id)
        if ledger.cannot_pay(payer, order.currency, order.minor_units) == reason:
            return _saw(order.payer_account_id, payer)
    if payee_home == center:
        payee = yield from ledger.find(order.payee_account_id)
        if ledger.cannot_receive(payee, order.currency, order.minor_units) == reason:
            return _saw(order.payee_account_id, payee)
    return None


def _saw(account_id: str, account: LedgerAccount | None) -> BalanceSeen:
    if account is None:
        return BalanceSeen(account_id=account_id, currency_code=NO_CURRENCY)
    return BalanceSeen(
        account_id=account_id,
        currency_code=account.currency,
        minor_units=account.balance,
        held_minor_units=account.held,
    )


def cannot_execute(
    center: str, order: Order, payee_home: str, stamp: Stamp, held: int = 0
) -> Unit[str]:
    """Why a transfer cannot be executed at its payer's home; empty if it can.

    `held` of the payer's money is kept back for this very transfer.
    """
    if not ledger.is_system(order.payer_account_id):
        control = yield from controls.find(order.payer_account_id)
        paid = 0
        if control.per_day_max:
            paid = yield from controls.paid_on_day(order.payer_account_id, stamp.time_ms)
        refused = controls.cannot_pay(control, order.minor_units, paid)
        if refused:
            return refused
    return (yield from cannot_be_paid(center, order, payee_home, held))


def cannot_be_paid(center: str, order: Order, payee_home: str, held: int = 0) -> Unit[str]:
    """Why an order's money cannot go where it should; empty if it can."""
    if ledger.is_system(order.payer_account_id):
        _, source = _source(order)
        account = yield from ledger.find(source)
        refused = ledger.books_limit(account, -order.minor_units)
    else:
        payer = yield from ledger.find(order.payer_account_id)
        if payer is not None:
            payer = payer._replace(held=payer.held - held)
        refused = ledger.cannot_pay(payer, order.currency, order.minor_units)
    if refused:
        return refused
    if payee_home == center:
        return (
            yield from _cannot_receive(order.payee_account_id, order.currency, order.minor_units)
        )
    transit = yield from ledger.find(ledger.transit(center, payee_home, order.currency))
    return ledger.books_limit(transit, order.minor_units)


def credit(center: str, source: str, debit: Posting, stamp: Stamp) -> Unit[None]:
    """At the payee's home: credits what `source` has debited, or refuses. The source may be this center
    itself, if the payee's account has come here since."""
    reason = yield from _cannot_receive(
        debit.payee_account_id, debit.currency_code, debit.minor_units
    )
    fresh = yield from _receive(debit.payer_account_id, debit.transfer_id, source, reason, center)
    if not fresh:
        return
    if reason:
        payee = yield from ledger.find(debit.payee_account_id)
        seen: BalanceSeen | None = None
        if ledger.cannot_receive(payee, debit.currency_code, debit.minor_units) == reason:
            seen = _saw(debit.payee_account_id, payee)
            yield from refusals.record(
                debit.payer_account_id, debit.transfer_id, seen, stamp.time_ms, center
            )
        refused = CreditRefused(
            transfer_id=debit.transfer_id,
            payer_account_id=debit.payer_account_id,
            reason=reason,
            payer_home=source,
            seen=seen,
        )
        yield from log.append(ledger.LEDGER, stamp, LogRecord(credit_refused=refused))
        return
    posting = Posting()
    posting.CopyFrom(debit)
    posting.kind = POSTING_KIND_CREDIT
    posting.other_home = source
    del posting.legs[:]
    between = source if source != center else debit.other_home
    transit = ledger.transit(center, between, debit.currency_code)
    yield from ledger.post(center, posting, transit, debit.payee_account_id, stamp)


def settle(
    center: str,
    payer_account_id: str,
    transfer_id: str,
    event: TransferEvent,
    reason: str,
    stamp: Stamp,
) -> Unit[TransferRow]:
    """Back at the center that debited: the payee's home has credited; or it has refused, and the payer gets
    the money back, here if this is still the payer's home."""
    row = yield from find(payer_account_id, transfer_id)
    if row is None:
        raise ValueError("no such transfer was debited here")
    state = next_transfer_state(row.state, event)
    if state == row.state:
        return row
    row = row._replace(state=state, reason=reason)
    if state == TRANSFER_STATE_REFUNDED:
        posting = _refund_of(row)
        transit = ledger.transit(center, row.payee_home, row.currency)
        home = (yield from homes.present(account_slot(payer_account_id) or 0)).home
        if home == center:
            yield from ledger.post(center, posting, transit, payer_account_id, stamp)
            yield from _refunded(payer_account_id, transfer_id, center)
        elif home != row.payee_home:
            posting.other_home = home
            forward = ledger.transit(center, home, row.currency)
            yield from ledger.post(center, posting, transit, forward, stamp)
    yield from _update(row)
    yield from _tell(row, stamp)
    return row


def refund(center: str, row: TransferRow, stamp: Stamp) -> Unit[None]:
    """At the payer's present home: gives back what the payer's home of that time has debited and found
    refused. Nothing if that was done before."""
    if not (yield from _refunded(row.payer_account_id, row.transfer_id, center)):
        return
    between = row.center if row.center != center else row.payee_home
    transit = ledger.transit(center, between, row.currency)
    yield from ledger.post(center, _refund_of(row), transit, row.payer_account_id, stamp)


def copy_posting(center: str, posting: Posting, time_ms: int) -> Unit[None]:
    """Copies what another center's posting says of a transfer: decided, or received."""
    if posting.kind == POSTING_KIND_CREDIT:
        payer, transfer_id = posting.payer_account_id, posting.transfer_id
        yield from _receive(payer, transfer_id, posting.other_home, "", center)
    elif posting.kind == POSTING_KIND_REFUND:
        if not posting.other_home:
            yield from _refunded(posting.payer_account_id, posting.transfer_id, center)
    elif posting.kind not in (POSTING_KIND_MOVE_OUT, POSTING_KIND_MOVE_IN):
        debited = posting.kind == POSTING_KIND_DEBIT
        row = TransferRow(
            posting.payer_account_id,
            posting.transfer_id,
            posting.body_hash,
            posting.payee_account_id,
            posting.other_home or center,
            posting.currency_code,
            posting.minor_units,
            posting.memo,
            TRANSFER_STATE_DEBITED if debited else TRANSFER_STATE_CREDITED,
            "",
            posting.application_id,
            time_ms,
            center,
            posting.asked_center,
        )
        yield from _insert(row)


def copy_refused(center: str, refused: CreditRefused, time_ms: int) -> Unit[None]:
    """Copies that another center would not credit."""
    payer, transfer_id = refused.payer_account_id, refused.transfer_id
    yield from _receive(payer, transfer_id, refused.payer_home, refused.reason, center)
    if refused.HasField("seen"):
        yield from refusals.record(payer, transfer_id, refused.seen, time_ms, center)


def copy_settled(center: str, settled: TransferSettled) -> Unit[None]:
    """Copies how a transfer ended at its payer's home."""
    row = TransferRow(
        settled.payer_account_id,
        settled.transfer_id,
        settled.body_hash,
        settled.payee_account_id,
        settled.payee_home,
        settled.currency_code,
        settled.minor_units,
        settled.memo,
        settled.state,
        settled.reason,
        settled.application_id,
        settled.create_time_ms,
        center,
        settled.asked_center,
    )
    yield from _insert(row)
    yield from _update(row)
    if settled.HasField("seen"):
        yield from refusals.record(
            row.payer_account_id, row.transfer_id, settled.seen, row.create_ms, center
        )


_NOT_RECEIVED = (
    "NOT EXISTS (SELECT 1 FROM received WHERE received.transfer_id = transfer.transfer_id"
    " AND received.payer_account_id = transfer.payer_account_id)"
)
_NOT_REFUNDED = (
    "NOT EXISTS (SELECT 1 FROM refunded WHERE refunded.transfer_id = transfer.transfer_id"
    " AND refunded.payer_account_id = transfer.payer_account_id)"
)
_NOT_CREDITED = (
    "NOT EXISTS (SELECT 1 FROM received WHERE received.transfer_id = transfer.transfer_id"
    " AND received.payer_account_id = transfer.payer_account_id AND reason = '')"
)
_PAYEE_SLOT = homes.SLOT_OF.format("payee_account_id")
_PAYER_SLOT = homes.SLOT_OF.format("payer_account_id")
_IS_HOME = "EXISTS (SELECT 1 FROM slot_home WHERE slot = {} AND home = {} AND acts)"
_NOBODY = "payee_account_id NOT LIKE 'u___-%'"
"""A payee that is no account: whom it was sent to refuses it."""


def in_transit(center: str, limit: int) -> Unit[list[TransferRow]]:
    """Transfers that left their payer at a center and have not arrived, or come back, yet; oldest first."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM transfer WHERE center = ?1 AND (state = 2"  # noqa: S608 - constant names
        f" OR (state = 4 AND {_NOT_REFUNDED})) ORDER BY create_ms LIMIT ?2",
        center,
        limit,
    )
    return [TransferRow(*row) for row in rows]


def unrefunded(source: str, center: str, limit: int) -> Unit[list[TransferRow]]:
    """What a source has debited and found refused, that a center, home of the payer now, should give back
    and has not yet. Not what the payee is known to have got: then the state was changed by hand."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM transfer WHERE state = 4 AND center = ?1 AND {_NOT_REFUNDED}"  # noqa: S608 - constant names
        f" AND {_NOT_CREDITED} AND {_IS_HOME.format(_PAYER_SLOT, '?2')} LIMIT ?3",
        source,
        center,
        limit,
    )
    return [TransferRow(*row) for row in rows]


def uncredited(source: str, center: str, limit: int) -> Unit[list[Posting]]:
    """Debits of a source's that a center should credit, and has not yet."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM transfer WHERE state = 2 AND center = ?1 AND {_NOT_RECEIVED}"  # noqa: S608 - constant names
        f" AND ({_IS_HOME.format(_PAYEE_SLOT, '?2')} OR ({_NOBODY} AND payee_home = ?2)) LIMIT ?3",
        source,
        center,
        limit,
    )
    return [
        Posting(
            kind=POSTING_KIND_DEBIT,
            transfer_id=row.transfer_id,
            payer_account_id=row.payer_account_id,
            payee_account_id=row.payee_account_id,
            currency_code=row.currency,
            minor_units=row.minor_units,
            memo=row.memo,
            body_hash=row.body_hash,
            application_id=row.application_id,
            other_home=row.payee_home,
        )
        for row in (TransferRow(*row) for row in rows)
    ]


def received_reason(payer_account_id: str, transfer_id: str) -> Unit[str]:
    """Why a debit was not credited; empty if it was."""
    rows = yield from query(
        "SELECT reason FROM received WHERE payer_account_id = ? AND transfer_id = ?",
        payer_account_id,
        transfer_id,
    )
    return str(rows[0][0])


def unsettled(source: str, center: str, limit: int) -> Unit[list[tuple[str, str, str]]]:
    """(payer, transfer id, reason) of a center's debits that a source has credited or refused."""
    rows = yield from query(
        "SELECT payer_account_id, transfer_id, received.reason FROM transfer"
        " JOIN received USING (payer_account_id, transfer_id)"
        " WHERE transfer.state = 2 AND transfer.center = ? AND received.center = ? LIMIT ?",
        center,
        source,
        limit,
    )
    return [(row[0], row[1], row[2]) for row in rows]


def _cannot_receive(payee_account_id: str, currency: str, minor_units: int) -> Unit[str]:
    """At the payee's home: why money cannot be credited; empty if it can."""
    if account_slot(payee_account_id) is None:
        return "PAYEE_NOT_FOUND"
    control = yield from controls.find(payee_account_id)
    payee = yield from ledger.find(payee_account_id)
    return controls.cannot_receive(control) or ledger.cannot_receive(payee, currency, minor_units)


def _source(order: Order) -> tuple[PostingKind.ValueType, str]:
    """Which account an order within one center is paid from, and what kind of posting that is."""
    payer = order.payer_account_id
    if not ledger.is_system(payer):
        return POSTING_KIND_TRANSFER, payer
    compensates = payer.startswith("compensation.")
    kind = POSTING_KIND_COMPENSATION if compensates else POSTING_KIND_DEPOSIT
    return kind, f"{payer}.{order.currency}"


def _insert(row: TransferRow) -> Unit[None]:
    """Stores a transfer; a copy that is here already, perhaps in a later state, stays."""
    yield from query(
        "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        *row,
    )


def _update(row: TransferRow) -> Unit[None]:
    """A debited transfer has ended."""
    yield from query(
        "UPDATE transfer SET state = ?, reason = ? WHERE payer_account_id = ? AND transfer_id = ?"
        " AND state = 2",
        row.state,
        row.reason,
        row.payer_account_id,
        row.transfer_id,
    )


def _receive(payer: str, transfer_id: str, source: str, reason: str, center: str) -> Unit[bool]:
    """Notes that a debit has arrived; False if it had before."""
    rows = yield from query(
        "INSERT INTO received VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING 1",
        payer,
        transfer_id,
        source,
        reason,
        center,
    )
    return bool(rows)


def _refunded(payer: str, transfer_id: str, center: str) -> Unit[bool]:
    """Notes that a payer has the money back; False if that was so before."""
    rows = yield from query(
        "INSERT INTO refunded VALUES (?, ?, ?) ON CONFLICT DO NOTHING RETURNING 1",
        payer,
        transfer_id,
        center,
    )
    return bool(rows)


def _refund_of(row: TransferRow) -> Posting:
    return Posting(
        kind=POSTING_KIND_REFUND,
        transfer_id=row.transfer_id,
        payer_account_id=row.payer_account_id,
        payee_account_id=row.payee_account_id,
        currency_code=row.currency,
        minor_units=row.minor_units,
        memo=row.memo,
    )


def _posting(kind: PostingKind.ValueType, order: Order) -> Posting:
    return Posting(
        kind=kind,
        transfer_id=order.transfer_id,
        payer_account_id=order.payer_account_id,
        payee_account_id=order.payee_account_id,
        currency_code=order.currency,
        minor_units=order.minor_units,
        memo=order.memo,
        body_hash=order.body_hash,
        application_id=order.application_id,
        asked_center=order.asked_center,
    )


def _tell(row: TransferRow, stamp: Stamp, seen: BalanceSeen | None = None) -> Unit[None]:
    """Tells the other centers, where an application may be waiting, how a transfer ended."""
    settled = TransferSettled(
        transfer_id=row.transfer_id,
        payer_account_id=row.payer_account_id,
        state=row.state,
        reason=row.reason,
        body_hash=row.body_hash,
        payee_account_id=row.payee_account_id,
        payee_home=row.payee_home,
        currency_code=row.currency,
        minor_units=row.minor_units,
        memo=row.memo,
        application_id=row.application_id,
        create_time_ms=row.create_ms,
        seen=seen,
        asked_center=row.asked_center,
    )
    yield from log.append(ledger.LEDGER, stamp, LogRecord(transfer_settled=settled))
