"""What operators allow an account: open, frozen or closed; limits per transfer and per day.

An account without a row is open and has no limits. Its home alone changes and obeys them; other centers
hold copies, for a home that lost its disk, and for the next one. `center` was home when it was changed; the
last change counts.
"""

from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import ControlChanged, LogRecord
from duohuo.internal.v1.peer_services_pb2 import LimitsChange
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountControl,
    AccountStatus,
)
from runtime.store import Unit, query
from sync_bus import audit, log
from sync_bus.log import Stamp
from transfer_svc import holds, ledger
from transfer_svc.rules import DAY_MS
from transfer_svc.states import ACCOUNT

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS account_control (
  account_id TEXT NOT NULL,
  status INTEGER NOT NULL CHECK (status BETWEEN {ACCOUNT_STATUS_OPEN} AND {ACCOUNT_STATUS_CLOSED}),
  per_transfer_max INTEGER NOT NULL CHECK (per_transfer_max >= 0),
  per_day_max INTEGER NOT NULL CHECK (per_day_max >= 0),
  number INTEGER NOT NULL, center TEXT NOT NULL,
  PRIMARY KEY (account_id, center)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS transfer_left ON transfer (payer_account_id, create_ms)
  WHERE state IN (2, 3);
"""


class Control(NamedTuple):
    """A row of the table `account_control`. A limit of 0 is none."""

    account_id: str
    status: AccountStatus.ValueType = ACCOUNT_STATUS_OPEN
    per_transfer_max: int = 0
    per_day_max: int = 0
    number: int = 0
    center: str = ""

    def described(self) -> str:
        """For the audit log."""
        status = AccountStatus.Name(self.status).removeprefix("ACCOUNT_STATUS_").lower()
        limits = f"{self.per_transfer_max} per transfer, {self.per_day_max} per day (0: no limit)"
        return f"{status}, {limits}"

    def message(self, center: str, paid_today: int) -> AccountControl:
        """As operators see it."""
        return AccountControl(
            account_id=self.account_id,
            home_center=center,
            status=self.status,
            per_transfer_minor_units_max=self.per_transfer_max,
            per_day_minor_units_max=self.per_day_max,
            paid_today_minor_units=paid_today,
            version=self.number,
        )


class Change(NamedTuple):
    """What an account's control was, what it is now, and why nothing was changed, if so."""

    before: Control
    after: Control
    refused: str = ""


def find(account_id: str) -> Unit[Control]:
    """What an account is allowed."""
    rows = yield from query(
        "SELECT account_id, status, per_transfer_max, per_day_max, number, center"
        " FROM account_control WHERE account_id = ? ORDER BY number DESC LIMIT 1",
        account_id,
    )
    return Control(*rows[0]) if rows else Control(account_id)


def cannot_pay(payer: Control, minor_units: int, paid_today: int) -> str:
    """Why this account may not pay so much; empty if it may."""
    if payer.status == ACCOUNT_STATUS_CLOSED:
        return "ACCOUNT_CLOSED"
    if payer.status == ACCOUNT_STATUS_FROZEN:
        return "ACCOUNT_FROZEN"
    if payer.per_transfer_max and minor_units > payer.per_transfer_max:
        return "LIMIT_PER_TRANSFER"
    if payer.per_day_max and paid_today + minor_units > payer.per_day_max:
        return "LIMIT_PER_DAY"
    return ""


def cannot_receive(payee: Control) -> str:
    """Why this account may not receive; empty if it may."""
    if payee.status == ACCOUNT_STATUS_CLOSED:
        return "PAYEE_CLOSED"
    return "PAYEE_FROZEN" if payee.status == ACCOUNT_STATUS_FROZEN else ""


def paid_on_day(account_id: str, time_ms: int) -> Unit[int]:
    """What has left an account on the UTC day of a moment; what was refunded has not."""
    day_ms = time_ms - time_ms % DAY_MS
    # In two parts: a sum of them as they are could be too large for SQLite.
    rows = yield from query(
        "SELECT coalesce(sum(minor_units / 1000000), 0), coalesce(sum(minor_units % 1000000), 0)"
        " FROM transfer WHERE payer_account_id = ?1 AND state IN (2, 3)"
        " AND create_ms >= ?2 AND create_ms < ?2 + ?3",
        account_id,
        day_ms,
        DAY_MS,
    )
    millions, rest = rows[0]
    return int(millions) * 1_000_000 + int(rest)


def set_status(
    center: str,
    account_id: str,
    status: AccountStatus.ValueType,
    version: int | None,
    who: str,
    stamp: Stamp,
) -> Unit[Change]:
    """At the account's home: an operator freezes, unfreezes or closes it, if it is in the version."""
    before = yield from find(account_id)
    after = before._replace(status=status)
    if _is_late(before, after, version):
        return Change(before, before, "CONTROL_CHANGED")
    if (before.status, status) not in ACCOUNT:
        return Change(before, before, "ACCOUNT_CLOSED")
    if status == ACCOUNT_STATUS_CLOSED and before.status != status:
        refused = yield from _cannot_close(account_id, stamp)
        if refused:
            return Change(before, before, refused)
    return (yield from _change(center, before, after, who, stamp))


def set_limits(
    center: str,
    account_id: str,
    limits: LimitsChange,
    version: int | None,
    who: str,
    stamp: Stamp,
) -> Unit[Change]:
    """At the account's home: an operator sets limits, if it is in the version; what is unset stays."""
    before = yield from find(account_id)
    after = before
    if limits.HasField("per_transfer_minor_units_max"):
        after = after._replace(per_transfer_max=limits.per_transfer_minor_units_max)
    if limits.HasField("per_day_minor_units_max"):
        after = after._replace(per_day_max=limits.per_day_minor_units_max)
    if _is_late(before, after, version):
        return Change(before, before, "CONTROL_CHANGED")
    return (yield from _change(center, before, after, who, stamp))


def copy(center: str, changed: ControlChanged) -> Unit[None]:
    """Copies what another center allows one of its accounts; a later change that is here stays."""
    yield from _store(
        Control(
            changed.account_id,
            changed.status,
            changed.per_transfer_minor_units_max,
            changed.per_day_minor_units_max,
            changed.number,
            center,
        )
    )


def _is_late(before: Control, after: Control, version: int | None) -> bool:
    """Has the account changed since the operator looked? Not if this very change was all, made by an
    earlier attempt."""
    return version is not None and before.number != version and after != before


def _cannot_close(account_id: str, stamp: Stamp) -> Unit[str]:
    """Why an account cannot be closed now; empty if it can."""
    yield from holds.expire_due(account_id, stamp)
    account = yield from ledger.find(account_id)
    if account is not None and account.balance:
        return "ACCOUNT_HAS_HOLDS" if account.held else "ACCOUNT_NOT_EMPTY"
    rows = yield from query(
        "SELECT 1 FROM transfer LEFT JOIN refunded USING (payer_account_id, transfer_id)"
        " WHERE payer_account_id = ? AND (state = 2 OR (state = 4 AND refunded.center IS NULL)) LIMIT 1",
        account_id,
    )
    return "ACCOUNT_HAS_TRANSIT" if rows else ""


def _change(center: str, before: Control, after: Control, who: str, stamp: Stamp) -> Unit[Change]:
    """Stores and tells a change, if it is one: all that operators do to an account goes through here."""
    if after == before:
        return Change(before, after)
    after = after._replace(number=before.number + 1, center=center)
    yield from _store(after)
    changed = ControlChanged(
        account_id=after.account_id,
        status=after.status,
        per_transfer_minor_units_max=after.per_transfer_max,
        per_day_minor_units_max=after.per_day_max,
        number=after.number,
    )
    yield from log.append(ledger.LEDGER, stamp, LogRecord(control_changed=changed))
    action = "set limits" if after.status == before.status else "set status"
    was, now = before.described(), after.described()
    yield from audit.record("transfer", center, who, action, after.account_id, was, now, stamp)
    return Change(before, after)


def _store(control: Control) -> Unit[None]:
    yield from query(
        "INSERT INTO account_control VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (account_id, center) DO UPDATE SET status = excluded.status,"
        " per_transfer_max = excluded.per_transfer_max,"
        " per_day_max = excluded.per_day_max, number = excluded.number"
        " WHERE excluded.number > number",
        *control,
    )
