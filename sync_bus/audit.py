"""The audit log: what operators did, when, and what was before and after it.

A row is written in the unit that does what it tells of, numbered by its center, and bound to the row before
it by a hash (Schneier, Kelsey: "Secure Audit Logs to Support Computer Forensics", 1999), so that a change
made by hand shows. Rows only grow in number: a trigger refuses anything else for those made here. Other
centers hold copies, as of all data. Targets are ids; nothing of a user's data is in it.
"""

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import NamedTuple

import structlog

from duohuo.internal.v1.log_pb2 import AuditRecorded, LogRecord
from runtime.store import Row, Unit, query
from sync_bus import log
from sync_bus.copies import CopiedTable
from sync_bus.log import Road, Stamp, Topic

SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
  center TEXT NOT NULL, number INTEGER NOT NULL, time_ms INTEGER NOT NULL, who TEXT NOT NULL,
  action TEXT NOT NULL, target TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL,
  hash TEXT NOT NULL, made_here INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (center, number)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS audit_by_time ON audit (time_ms);
CREATE TRIGGER IF NOT EXISTS audit_stays BEFORE UPDATE ON audit WHEN OLD.made_here
BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS audit_is_kept BEFORE DELETE ON audit WHEN OLD.made_here
BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""

CLOCK = "clock"
"""Who acts when a center's clock has caught up with an entry."""

_COLUMNS = ("center", "number", "time_ms", "who", "action", "target", "before", "after", "hash")
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM audit"  # noqa: S608 - constant names

_logger = structlog.get_logger()


class Action(NamedTuple):
    """One row of the audit log."""

    center: str
    number: int
    time_ms: int
    who: str
    action: str
    target: str
    before: str
    after: str
    hash: str


@cache
def topic(role: str) -> Topic:
    """The topic that carries a service's audit log."""
    table = CopiedTable("audit", _COLUMNS, keys=2, owner="center")
    return Topic(f"{role}_audit", Road.JETSTREAM, (table,))


def record(
    role: str,
    center: str,
    who: str,
    action: str,
    target: str,
    before: str,
    after: str,
    stamp: Stamp,
) -> Unit[Action]:
    """Adds a row, and tells the other centers."""
    last = yield from _last(center)
    number, previous = (last.number + 1, last.hash) if last else (1, "")
    unhashed = Action(center, number, stamp.time_ms, who, action, target, before, after, "")
    done = unhashed._replace(hash=chained(previous, unhashed))
    yield from query("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)", *done)
    recorded = AuditRecorded(**{name: getattr(done, name) for name in _COLUMNS})
    yield from log.append(topic(role), stamp, LogRecord(audit_recorded=recorded))
    return done


def copy(recorded: AuditRecorded) -> Unit[None]:
    """Stores what another center's operators did."""
    yield from query(
        "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
        *(getattr(recorded, name) for name in _COLUMNS),
    )


def find(
    target: str = "", action: str = "", since_ms: int = 0, limit: int = 100
) -> Unit[list[Action]]:
    """Rows of all centers, newest first; of one target or action, if named."""
    rows = yield from query(
        f"{_SELECT} WHERE time_ms >= ?1 AND (?2 = '' OR target = ?2) AND (?3 = '' OR action = ?3)"
        " ORDER BY time_ms DESC, center, number DESC LIMIT ?4",
        since_ms,
        target,
        action,
        limit,
    )
    return [Action(*row) for row in rows]


def broken() -> Unit[list[tuple[str, int]]]:
    """Where a center's chain does not hold: (center, the first number that was changed or removed)."""
    found = []
    rows = yield from query(f"{_SELECT} ORDER BY center, number")
    previous: Action | None = None
    skipped = ""
    for action in (Action(*row) for row in rows):
        if action.center == skipped:
            continue
        if previous is None or previous.center != action.center:
            expected, before = 1, ""
        else:
            expected, before = previous.number + 1, previous.hash
        if action.number != expected or action.hash != chained(before, action):
            found.append((action.center, expected))
            skipped = action.center
        previous = action
    return found


def chained(previous: str, action: Action) -> str:
    """The hash of a row, given that of the row before it."""
    fields: Sequence[object] = action._replace(hash=previous)
    return sha256(repr(tuple(fields)).encode()).hexdigest()


def tell(role: str, action: Action) -> None:
    """One line in the log of the process."""
    _logger.warning(
        f"operator action: {action.action}",
        role=role,
        who=action.who,
        target=action.target,
        before=action.before,
        after=action.after,
    )


def _last(center: str) -> Unit[Action | None]:
    rows: list[Row] = yield from query(
        f"{_SELECT} WHERE center = ? ORDER BY number DESC LIMIT 1", center
    )
    return Action(*rows[0]) if rows else None
