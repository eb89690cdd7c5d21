"""Double entry: every posting is two legs that sum to zero, written with the balances they move.

A user's account may not go below zero: the balance moves by a conditional update, and a CHECK stands
behind it. Nor may it go below what `holds` keep back of it. System accounts have a dot in their name:
`external.a.CNY` is the outside world as seen from center a, `compensation.a.CNY` what a's operators pay to
users, `transit.a.b.CNY` what is on its way between a's and b's accounts. The same tables hold the copies of
other centers' accounts: whoever is home writes, the others copy what home wrote.

Each center that was ever home of an account has a row for it in its own books. The one with the latest
entry counts; the others have nothing left (`moving`).

Each account's entries form one hash chain (`chain`), whoever made them; one that does not fit takes no
further entry.

An amount is checked before anything is written; the CHECKs stand behind that, and keep every number, and
every sum of them, far from what 64 bits can hold.
"""

from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_MOVE_OUT,
    Leg,
    LogRecord,
    Posting,
    PostingKind,
)
from runtime.store import Row, Unit, query
from sync_bus import homes, log
from sync_bus.copies import CopiedTable, columns
from sync_bus.log import Road, Stamp, Topic
from transfer_svc import chain, refusals
from transfer_svc.rules import (
    AMOUNT_MINOR_UNITS_MAX,
    BALANCE_MINOR_UNITS_MAX,
    BOOKED_MINOR_UNITS_MAX,
)

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS ledger_account (
  account_id TEXT NOT NULL, currency TEXT NOT NULL,
  balance INTEGER NOT NULL
    CHECK (balance BETWEEN -{BOOKED_MINOR_UNITS_MAX} AND {BOOKED_MINOR_UNITS_MAX}),
  last_number INTEGER NOT NULL, center TEXT NOT NULL,
  held INTEGER NOT NULL CHECK (held >= 0), held_number INTEGER NOT NULL,
  head BLOB NOT NULL,
  CHECK (balance >= held OR account_id LIKE '%.%'),
  CHECK (held = 0 OR account_id NOT LIKE '%.%'),
  PRIMARY KEY (account_id, center)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entry (
  account_id TEXT NOT NULL, number INTEGER NOT NULL, center TEXT NOT NULL, kind INTEGER NOT NULL,
  transfer_id TEXT NOT NULL,
  minor_units INTEGER NOT NULL CHECK (minor_units <> 0
    AND minor_units BETWEEN -{AMOUNT_MINOR_UNITS_MAX} AND {AMOUNT_MINOR_UNITS_MAX}),
  balance_after INTEGER NOT NULL,
  counterparty TEXT NOT NULL, memo TEXT NOT NULL, time_ms INTEGER NOT NULL, hash BLOB NOT NULL,
  PRIMARY KEY (account_id, number)) STRICT, WITHOUT ROWID;
"""


LEDGER = Topic(
    "ledger",
    Road.JETSTREAM,
    (
        CopiedTable(
            "ledger_account",
            columns("account_id center currency balance last_number held held_number head"),
            keys=2,
            owner="center",
            version=lambda row: row[4] + row[6],
            proven=chain.account_proven,
        ),
        CopiedTable(
            "entry",
            columns(
                "account_id number center kind transfer_id minor_units balance_after"
                " counterparty memo time_ms hash"
            ),
            keys=2,
            owner="center",
            proven=chain.entry_proven,
            digested=False,  # the heads of the chains stand for all entries
        ),
        # The tables of `transfers` and `refusals`: they change with the same entries.
        CopiedTable(
            "transfer",
            columns(
                "payer_account_id transfer_id body_hash payee_account_id payee_home currency"
                " minor_units memo state reason application_id create_ms center"
                " asked_center"
            ),
            keys=2,
            owner="center",
            version=lambda row: row[8],
        ),
        CopiedTable(
            "received",
            ("payer_account_id", "transfer_id", "source", "reason", "center"),
            keys=2,
            owner="center",
        ),
        CopiedTable(
            "refunded", ("payer_account_id", "transfer_id", "center"), keys=2, owner="center"
        ),
        refusals.TABLE,
        # Of `holds`, and of `controls`.
        CopiedTable(
            "hold",
            columns(
                "payer_account_id hold_id epoch body_hash payee_account_id currency minor_units memo"
                " state reason captured transfer_id create_ms expire_ms center"
            ),
            keys=3,
            owner="center",
            version=lambda row: row[8],
        ),
        CopiedTable(
            "account_control",
            columns("account_id center status per_transfer_max per_day_max number"),
            keys=2,
            owner="center",
            version=lambda row: row[5],
        ),
        # Last: whoever has these has all that is above.
        *homes.TABLES,
    ),
)


class LedgerAccount(NamedTuple):
    account_id: str
    currency: str
    balance: int
    last_number: int
    center: str
    held: int
    held_number: int

    @property
    def available(self) -> int:
        """What may be spent, once what has expired is held no more (`holds.expire_due`)."""
        return self.balance - self.held


class EntryRow(NamedTuple):
    number: int
    transfer_id: str
    minor_units: int
    balance_after: int
    counterparty: str
    memo: str
    time_ms: int
    kind: PostingKind.ValueType


class NotCovered(Exception):
    """A leg would leave an account below zero or in another currency. Raising undoes the unit."""


def outside(center: str) -> str:
    """Who pays deposits. A deposit id counts once at its center, whatever the currency."""
    return f"external.{center}"


def compensator(center: str) -> str:
    """Who pays users for what the bank did to them. An id counts as that of a deposit does."""
    return f"compensation.{center}"


def transit(center: str, other: str, currency: str) -> str:
    return f"transit.{center}.{other}.{currency}"


def is_system(account_id: str) -> bool:
    return "." in account_id


def find(account_id: str) -> Unit[LedgerAccount | None]:
    """An account, in the books of whoever wrote the latest of it."""
    rows = yield from query(
        "SELECT account_id, currency, balance, last_number, center, held, held_number"
        " FROM ledger_account WHERE account_id = ? ORDER BY last_number + held_number DESC LIMIT 1",
        account_id,
    )
    return LedgerAccount(*rows[0]) if rows else None


def booked(account: LedgerAccount) -> Unit[int]:
    """What an account has, also while its money is on its way from one home to the next."""
    if account.balance:
        return account.balance
    rows = yield from query(
        "SELECT minor_units FROM entry WHERE account_id = ? AND number = ? AND kind = ?",
        account.account_id,
        account.last_number,
        POSTING_KIND_MOVE_OUT,
    )
    return -rows[0][0] if rows else account.balance


def hold_back(center: str, account_id: str, minor_units: int) -> Unit[Leg]:
    """Keeps so much of an account back, or gives it back if negative. Raises NotCovered."""
    rows = yield from query(
        "UPDATE ledger_account SET held = held + ?1, held_number = held_number + 1"
        " WHERE account_id = ?2 AND center = ?3 AND held + ?1 BETWEEN 0 AND balance"
        " RETURNING balance, last_number, held, held_number, head",
        minor_units,
        account_id,
        center,
    )
    if not rows:
        raise NotCovered(account_id)
    return _leg(account_id, 0, rows[0])


def cannot_pay(payer: LedgerAccount | None, currency: str, minor_units: int) -> str:
    """Why this account cannot pay; empty if it can."""
    if payer is None:
        return "INSUFFICIENT_FUNDS"
    if payer.currency != currency:
        return "CURRENCY_MISMATCH"
    return "" if payer.available >= minor_units else "INSUFFICIENT_FUNDS"


def cannot_receive(payee: LedgerAccount | None, currency: str, minor_units: int) -> str:
    """Why this account cannot receive; empty if it can. One without an entry takes any currency."""
    if payee is None:
        return ""
    if payee.currency != currency:
        return "CURRENCY_MISMATCH"
    return "BALANCE_LIMIT" if payee.balance + minor_units > BALANCE_MINOR_UNITS_MAX else ""


def books_limit(account: LedgerAccount | None, minor_units: int) -> str:
    """Why a system account cannot change by so much; empty if it can. Only money from outside, or that
    goes around between centers for ages, comes that far."""
    after = (account.balance if account else 0) + minor_units
    return "BOOKS_LIMIT" if abs(after) > BALANCE_MINOR_UNITS_MAX else ""


def post(center: str, posting: Posting, source: str, target: str, stamp: Stamp) -> Unit[int]:
    """Moves the posting's amount from one account to another, and tells the other centers.

    Returns the target's balance after it. Raises NotCovered; check `cannot_pay` and
    `cannot_receive` in the same unit first to refuse with a reason.
    """
    debit = yield from _move(center, posting, source, -posting.minor_units, target, stamp)
    credit = yield from _move(center, posting, target, posting.minor_units, source, stamp)
    posting.legs.extend([debit, credit])
    yield from log.append(LEDGER, stamp, LogRecord(posting=posting))
    return credit.balance_after


def copy(center: str, posting: Posting, time_ms: int) -> Unit[None]:
    """Repeats another center's posting on the local copies.

    A parked posting may be repeated after later ones: then its entry is added, and balances stay.
    """
    if sum(leg.minor_units for leg in posting.legs) != 0:
        raise ValueError("legs do not sum to zero")
    accounts = [leg.account_id for leg in posting.legs]
    for leg, counterparty in zip(posting.legs, reversed(accounts), strict=True):
        yield from copy_account(center, posting.currency_code, leg)
        yield from _insert_entry(center, posting, leg, counterparty, time_ms)


def copy_account(center: str, currency: str, leg: Leg) -> Unit[None]:
    """Repeats what an account of another center's has become; a later state that is here stays."""
    yield from query(
        "INSERT INTO ledger_account VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (account_id, center) DO UPDATE SET balance = excluded.balance,"
        " last_number = excluded.last_number,"
        " held = excluded.held, held_number = excluded.held_number, head = excluded.head"
        " WHERE excluded.last_number + excluded.held_number > last_number + held_number",
        leg.account_id,
        currency,
        leg.balance_after,
        leg.number,
        center,
        leg.held_after,
        leg.held_number,
        leg.hash,
    )


def entries_before(account_id: str, number: int | None, limit: int) -> Unit[list[EntryRow]]:
    """An account's entries, newest first, from below a number."""
    rows = yield from query(
        "SELECT number, transfer_id, minor_units, balance_after, counterparty, memo, time_ms, kind"
        " FROM entry WHERE account_id = ?1 AND (?2 IS NULL OR number < ?2)"
        " ORDER BY number DESC LIMIT ?3",
        account_id,
        number,
        limit,
    )
    return [EntryRow(*row) for row in rows]


def _move(
    center: str,
    posting: Posting,
    account_id: str,
    minor_units: int,
    counterparty: str,
    stamp: Stamp,
) -> Unit[Leg]:
    yield from _open(center, account_id, posting.currency_code)
    last = yield from chain.last(account_id, center)
    leg = Leg(
        account_id=account_id,
        minor_units=minor_units,
        balance_after=last.balance + minor_units,
        number=last.number + 1,
    )
    entry = _entry(center, posting, leg, counterparty, stamp.time_ms)
    leg.hash = chain.link(last.head, posting.currency_code, entry)
    rows = yield from query(
        "UPDATE ledger_account SET balance = balance + ?1, last_number = last_number + 1, head = ?5"
        " WHERE account_id = ?2 AND currency = ?3 AND (balance + ?1 >= held OR ?4) AND center = ?6"
        " RETURNING balance, last_number, held, held_number, head",
        minor_units,
        account_id,
        posting.currency_code,
        int(is_system(account_id)),
        leg.hash,
        center,
    )
    if not rows:
        raise NotCovered(account_id)
    leg = _leg(account_id, minor_units, rows[0])
    yield from _insert_entry(center, posting, leg, counterparty, stamp.time_ms)
    return leg


def _open(center: str, account_id: str, currency: str) -> Unit[None]:
    """Makes sure that a center has an account in its books, which goes on from whoever had it last."""
    yield from query(
        "INSERT INTO ledger_account SELECT ?1, coalesce(latest.currency, ?2), 0,"
        " coalesce(last_number, 0), ?3, 0, coalesce(held_number, 0), coalesce(head, ?4)"
        " FROM (SELECT 1) LEFT JOIN (SELECT * FROM ledger_account WHERE account_id = ?1"
        " ORDER BY last_number + held_number DESC LIMIT 1) latest WHERE true"
        " ON CONFLICT (account_id, center) DO UPDATE SET last_number = excluded.last_number,"
        " held_number = excluded.held_number, head = excluded.head"
        " WHERE excluded.last_number + excluded.held_number > last_number + held_number",
        account_id,
        currency,
        center,
        chain.START,
    )


def _leg(account_id: str, minor_units: int, row: Row) -> Leg:
    balance, number, held, held_number, head = row
    return Leg(
        account_id=account_id,
        minor_units=minor_units,
        balance_after=balance,
        number=number,
        held_after=held,
        held_number=held_number,
        hash=head,
    )


def _insert_entry(
    center: str, posting: Posting, leg: Leg, counterparty: str, time_ms: int
) -> Unit[None]:
    yield from query(
        "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *_entry(center, posting, leg, counterparty, time_ms),
        leg.hash,
    )


def _entry(
    center: str, posting: Posting, leg: Leg, counterparty: str, time_ms: int
) -> chain.EntryFields:
    return chain.EntryFields(
        leg.account_id,
        leg.number,
        center,
        posting.kind,
        posting.transfer_id,
        leg.minor_units,
        leg.balance_after,
        counterparty,
        posting.memo,
        time_ms,
    )
