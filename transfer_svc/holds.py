"""Holds: money that stays in its account and cannot be spent, until it is captured, released or expires.

A hold is named by (payer, hold_id): the id is its client's, so it counts only among that payer's holds.
What an account's open holds keep back is counted in the account's own row too, where a CHECK stands behind
it. One that has expired counts no more, whether or not that has been noted yet: whoever decides something
about an account calls `expire_due` in the same unit.

Other centers hold copies, so that they show available balances, and the home gets its holds back with its
money should it lose its disk. `center` is the payer's home. When an account moves to another center, its
open holds end here and go on there, in rows of the slot's next epoch.
"""

from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import HoldChanged, Leg, LogRecord
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_CAPTURED,
    HOLD_STATE_HELD,
    Hold,
    HoldState,
)
from runtime.clock import timestamp
from runtime.store import Unit, query
from sync_bus import log
from sync_bus.log import Stamp
from transfer_svc import ledger
from transfer_svc.rules import AMOUNT_MINOR_UNITS_MAX
from transfer_svc.states import HOLD_MOVED, HoldEvent, next_hold_state

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS hold (
  payer_account_id TEXT NOT NULL, hold_id TEXT NOT NULL, epoch INTEGER NOT NULL,
  body_hash BLOB NOT NULL,
  payee_account_id TEXT NOT NULL, currency TEXT NOT NULL,
  minor_units INTEGER NOT NULL CHECK (minor_units BETWEEN 1 AND {AMOUNT_MINOR_UNITS_MAX}),
  memo TEXT NOT NULL, state INTEGER NOT NULL, reason TEXT NOT NULL,
  captured INTEGER NOT NULL CHECK (captured BETWEEN 0 AND minor_units), transfer_id TEXT NOT NULL,
  create_ms INTEGER NOT NULL, expire_ms INTEGER NOT NULL, center TEXT NOT NULL,
  CHECK ((state = {HOLD_STATE_CAPTURED}) = (captured > 0)),
  PRIMARY KEY (payer_account_id, hold_id, epoch)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS hold_open ON hold (payer_account_id, expire_ms)
  WHERE state = {HOLD_STATE_HELD};
CREATE INDEX IF NOT EXISTS hold_captured ON hold (payer_account_id, transfer_id)
  WHERE transfer_id <> '';
CREATE INDEX IF NOT EXISTS hold_due ON hold (center, expire_ms) WHERE state = {HOLD_STATE_HELD};
"""


class HoldRow(NamedTuple):
    payer_account_id: str
    hold_id: str
    epoch: int
    body_hash: bytes
    payee_account_id: str
    currency: str
    minor_units: int
    memo: str
    state: HoldState.ValueType
    reason: str
    captured: int
    transfer_id: str
    create_ms: int
    expire_ms: int
    center: str

    def message(self) -> Hold:
        """As its payer sees it."""
        hold = Hold(
            hold_id=self.hold_id,
            state=self.state,
            payer_account_id=self.payer_account_id,
            payee_account_id=self.payee_account_id,
            amount=Money(currency_code=self.currency, minor_units=self.minor_units),
            memo=self.memo,
            create_time=timestamp(self.create_ms),
            expire_time=timestamp(self.expire_ms),
        )
        if self.state == HOLD_STATE_CAPTURED:
            hold.captured.currency_code, hold.captured.minor_units = self.currency, self.captured
            hold.transfer_id = self.transfer_id
        return hold


_COLUMNS = ", ".join(HoldRow._fields)


def find(payer_account_id: str, hold_id: str) -> Unit[HoldRow | None]:
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM hold WHERE payer_account_id = ? AND hold_id = ?"  # noqa: S608 - constant names
        " ORDER BY epoch DESC LIMIT 1",
        payer_account_id,
        hold_id,
    )
    return HoldRow(*rows[0]) if rows else None


def captured_as(payer_account_id: str, transfer_id: str) -> Unit[HoldRow | None]:
    """The hold that was captured by a transfer."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM hold WHERE payer_account_id = ? AND transfer_id = ?"  # noqa: S608 - constant names
        " AND transfer_id <> ''",
        payer_account_id,
        transfer_id,
    )
    return HoldRow(*rows[0]) if rows else None


def open_count(payer_account_id: str) -> Unit[int]:
    """How many holds keep money of an account back."""
    rows = yield from query(
        "SELECT count(*) FROM hold WHERE payer_account_id = ? AND state = 2", payer_account_id
    )
    return int(rows[0][0])


def held_at(payer_account_id: str, now_ms: int) -> Unit[int]:
    """What is held of an account; what has expired by now is not, though nobody has noted it yet."""
    rows = yield from query(
        "SELECT coalesce(sum(minor_units), 0) FROM hold"
        " WHERE payer_account_id = ? AND state = 2 AND expire_ms > ?",
        payer_account_id,
        now_ms,
    )
    return int(rows[0][0])


def add(row: HoldRow, stamp: Stamp) -> Unit[None]:
    """Stores a new hold, or that it was refused. Raises NotCovered if there is not so much."""
    account = None
    if row.state == HOLD_STATE_HELD:
        account = yield from ledger.hold_back(row.center, row.payer_account_id, row.minor_units)
    yield from _insert(row)
    yield from _tell(row, account, stamp)


def end(
    row: HoldRow, event: HoldEvent, stamp: Stamp, captured: int = 0, transfer_id: str = ""
) -> Unit[HoldRow]:
    """Ends an open hold: its money is available again, also to the capture that follows in this unit.

    Raises IllegalTransition for one that has ended otherwise.
    """
    state = next_hold_state(row.state, event)
    if state == row.state:
        return row
    row = row._replace(state=state, captured=captured, transfer_id=transfer_id)
    account = yield from ledger.hold_back(row.center, row.payer_account_id, -row.minor_units)
    yield from _update(row)
    yield from _tell(row, account, stamp)
    return row


def open_of(payer_account_id: str, center: str) -> Unit[list[HoldRow]]:
    """What keeps money of an account back at a center."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM hold WHERE payer_account_id = ? AND state = 2 AND center = ?"  # noqa: S608 - constant names
        " ORDER BY hold_id",
        payer_account_id,
        center,
    )
    return [HoldRow(*row) for row in rows]


def moved_from(slot: str, epoch: int, center: str) -> Unit[list[HoldRow]]:
    """The holds that left a center with their slot before an epoch of it."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM hold WHERE payer_account_id > ?1 AND payer_account_id < ?2"  # noqa: S608 - constant names
        " AND state = ?3 AND center = ?4 AND epoch < ?5 AND NOT EXISTS (SELECT 1 FROM hold later"
        " WHERE later.payer_account_id = hold.payer_account_id AND later.hold_id = hold.hold_id"
        " AND later.epoch > hold.epoch) ORDER BY payer_account_id, hold_id",
        f"u{slot}-",
        f"u{slot}.",
        HOLD_MOVED,
        center,
        epoch,
    )
    return [HoldRow(*row) for row in rows]


def expire_due(payer_account_id: str, stamp: Stamp) -> Unit[None]:
    """Ends what has expired of one account's holds. There are never many (`rules.HOLDS_OPEN_MAX`)."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM hold WHERE payer_account_id = ? AND state = 2 AND expire_ms <= ?"  # noqa: S608 - constant names
        " ORDER BY expire_ms, hold_id",
        payer_account_id,
        stamp.time_ms,
    )
    for row in rows:
        yield from end(HoldRow(*row), HoldEvent.EXPIRE, stamp)


def expire_all_due(center: str, stamp: Stamp, limit: int) -> Unit[int]:
    """Ends what has expired of a center's holds, some at a time; returns how many."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM hold WHERE center = ? AND state = 2 AND expire_ms <= ?"  # noqa: S608 - constant names
        " ORDER BY expire_ms LIMIT ?",
        center,
        stamp.time_ms,
        limit,
    )
    for row in rows:
        yield from end(HoldRow(*row), HoldEvent.EXPIRE, stamp)
    return len(rows)


def next_due_ms(center: str) -> Unit[int | None]:
    """When the next of a center's holds expires; None if there is none."""
    rows = yield from query(
        "SELECT min(expire_ms) FROM hold WHERE state = 2 AND center = ?", center
    )
    due_ms: int | None = rows[0][0]
    return due_ms


def copy(center: str, changed: HoldChanged) -> Unit[None]:
    """Copies a hold of another center's, and what its account has become."""
    row = HoldRow(
        changed.payer_account_id,
        changed.hold_id,
        changed.epoch,
        changed.body_hash,
        changed.payee_account_id,
        changed.currency_code,
        changed.minor_units,
        changed.memo,
        changed.state,
        changed.reason,
        changed.captured_minor_units,
        changed.transfer_id,
        changed.create_time_ms,
        changed.expire_time_ms,
        center,
    )
    yield from _insert(row)
    if row.state != HOLD_STATE_HELD:
        yield from _update(row)
    if changed.HasField("account"):
        yield from ledger.copy_account(center, row.currency, changed.account)


def unequal(limit: int) -> Unit[list[tuple[str, int, int]]]:
    """Accounts that keep back something else than their open holds say: (account, kept, holds' sum)."""
    rows = yield from query(
        "SELECT account_id, held, coalesce((SELECT sum(minor_units) FROM hold"
        " WHERE payer_account_id = account_id AND state = 2"
        " AND hold.center = ledger_account.center), 0) AS sum FROM ledger_account"
        " WHERE held <> sum LIMIT ?",
        limit,
    )
    return [(row[0], row[1], row[2]) for row in rows]


def _insert(row: HoldRow) -> Unit[None]:
    """Stores a hold; a copy that is here already, perhaps ended, stays."""
    yield from query(
        "INSERT INTO hold VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        *row,
    )


def _update(row: HoldRow) -> Unit[None]:
    """An open hold has ended."""
    yield from query(
        "UPDATE hold SET state = ?, captured = ?, transfer_id = ?"
        " WHERE payer_account_id = ? AND hold_id = ? AND epoch = ? AND state = 2",
        row.state,
        row.captured,
        row.transfer_id,
        row.payer_account_id,
        row.hold_id,
        row.epoch,
    )


def _tell(row: HoldRow, account: Leg | None, stamp: Stamp) -> Unit[None]:
    changed = HoldChanged(
        payer_account_id=row.payer_account_id,
        hold_id=row.hold_id,
        epoch=row.epoch,
        state=row.state,
        reason=row.reason,
        body_hash=row.body_hash,
        payee_account_id=row.payee_account_id,
        currency_code=row.currency,
        minor_units=row.minor_units,
        memo=row.memo,
        captured_minor_units=row.captured,
        transfer_id=row.transfer_id,
        create_time_ms=row.create_ms,
        expire_time_ms=row.expire_ms,
        account=account,
    )
    yield from log.append(ledger.LEDGER, stamp, LogRecord(hold_changed=changed))
