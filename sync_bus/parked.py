"""Entries that could not be applied, and what was done about them.

A parked entry is retried by an operator once its cause is gone, or dropped. Each is one unit with its
row in `parked_action`, which only grows: who, what, when, what was before and what came of it. Entries
from too far ahead are retried by themselves, when the local clock has caught up (`who` is "clock").

Those behind a parked entry have been applied: a retry is out of order. Handlers hold that, each by its
own means: versions, numbers, states that only move on.
"""

from typing import NamedTuple

import structlog
from google.protobuf.message import DecodeError

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from duohuo.v1.operator_service_pb2 import EntryName, ParkedAction, ParkedEntry, Violation
from runtime.clock import timestamp
from runtime.store import Row, Unit, query
from sync_bus import inbox
from sync_bus.inbox import Arrival, Handler

SCHEMA = """
CREATE TABLE IF NOT EXISTS parked_action (
  number INTEGER PRIMARY KEY AUTOINCREMENT, time_ms INTEGER NOT NULL, who TEXT NOT NULL,
  action TEXT NOT NULL, source TEXT NOT NULL, topic TEXT NOT NULL, seq INTEGER NOT NULL,
  before TEXT NOT NULL, after TEXT NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS parked_action_stays BEFORE UPDATE ON parked_action
BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS parked_action_is_kept BEFORE DELETE ON parked_action
BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""

ENTRIES_MAX = 1000
"""So many are listed or retried at a time."""
ACTIONS_MAX = 20
OPERATOR, CLOCK = "operator", "clock"
APPLIED, DROPPED = "applied", "dropped"

_logger = structlog.get_logger()


class Parked(NamedTuple):
    """A row of the table `parked`."""

    source: str
    topic: str
    seq: int
    record: bytes
    reason: str
    time_ms: int

    @property
    def hlc(self) -> int:
        """The record's timestamp. Raises DecodeError."""
        return LogRecord.FromString(self.record).hlc

    @property
    def entry(self) -> LogEntry:
        return LogEntry(topic=self.topic, seq=self.seq, record=self.record)

    def shown(self) -> ParkedEntry:
        """For people: what it is about, but nothing of what it says."""
        try:
            kind = LogRecord.FromString(self.record).WhichOneof("body") or ""
        except DecodeError:
            kind = ""
        return ParkedEntry(
            name=EntryName(source_center=self.source, topic=self.topic, seq=self.seq),
            reason=self.reason,
            park_time=timestamp(self.time_ms),
            kind=kind,
        )

    def violation(self, here: str) -> Violation:
        """What is broken as long as it waits at a center."""
        shown = self.shown()
        kind = shown.kind or "entry"
        try:
            record = LogRecord.FromString(self.record)
            body = getattr(record, shown.kind) if shown.kind else record
        except DecodeError:
            body = LogRecord()
        names = {field.name: value for field, value in body.ListFields()}
        return Violation(
            invariant="CONVERGE",
            center=here,
            account_id=names.get("account_id", names.get("payer_account_id", "")),
            transfer_id=names.get("transfer_id", ""),
            what=f"{kind} {self.seq} of {self.topic} of center {self.source} could not be applied:"
            f" {self.reason} (duohuo parked list {here})",
        )


def find(name: EntryName | None, limit: int = ENTRIES_MAX) -> Unit[list[Parked]]:
    """The parked entry of this name, or all of them, in the order of their logs."""
    columns = "SELECT source, topic, seq, record, reason, time_ms FROM parked"
    if name is None:
        rows = yield from query(f"{columns} ORDER BY source, topic, seq LIMIT ?", limit)
    else:
        rows = yield from query(
            f"{columns} WHERE source = ? AND topic = ? AND seq = ?",
            *(name.source_center, name.topic, name.seq),
        )
    return [Parked(*row) for row in rows]


def ahead(source: str) -> Unit[list[Parked]]:
    """A source's entries that were stamped too far ahead of the local clock, oldest first."""
    rows = yield from query(
        "SELECT source, topic, seq, record, reason, time_ms FROM parked WHERE source = ?"
        " AND reason = ? ORDER BY topic, seq LIMIT ?",
        source,
        inbox.TOO_FAR_AHEAD,
        ENTRIES_MAX,
    )
    return [Parked(*row) for row in rows]


def retry(
    who: str, parked: Parked, arrival: Arrival, handler: Handler
) -> Unit[ParkedAction | None]:
    """Applies an entry out of order. None if it is no longer parked."""
    present = yield from _present(parked)
    if present is None:
        return None
    reason = yield from inbox.attempt(parked.source, arrival, handler)
    if reason:
        yield from query(
            "UPDATE parked SET reason = ? WHERE source = ? AND topic = ? AND seq = ?",
            reason,
            *parked[:3],
        )
    else:
        yield from _forget(parked)
        yield from inbox.believe(parked.source, parked.topic, arrival.record.hlc)
    after = _parked_for(reason) if reason else APPLIED
    return (yield from _note(who, "retry", present, after, arrival.stamp.time_ms))


def drop(who: str, parked: Parked, time_ms: int) -> Unit[ParkedAction | None]:
    """Gives an entry up. None if it is no longer parked."""
    present = yield from _present(parked)
    if present is None:
        return None
    yield from _forget(parked)
    return (yield from _note(who, "drop", present, DROPPED, time_ms))


def actions(limit: int = ACTIONS_MAX) -> Unit[list[ParkedAction]]:
    """What was done last, newest first."""
    rows = yield from query(
        "SELECT time_ms, who, action, source, topic, seq, before, after FROM parked_action"
        " ORDER BY number DESC LIMIT ?",
        limit,
    )
    return [_action(row) for row in rows]


def tell(role: str, action: ParkedAction) -> None:
    """One line in the log of the process."""
    _logger.warning(
        f"parked entry: {action.action}",
        role=role,
        who=action.who,
        source=action.name.source_center,
        topic=action.name.topic,
        seq=action.name.seq,
        before=action.before,
        after=action.after,
    )


def _present(parked: Parked) -> Unit[Parked | None]:
    name = EntryName(source_center=parked.source, topic=parked.topic, seq=parked.seq)
    found = yield from find(name)
    return found[0] if found else None


def _forget(parked: Parked) -> Unit[None]:
    yield from query("DELETE FROM parked WHERE source = ? AND topic = ? AND seq = ?", *parked[:3])


def _parked_for(reason: str) -> str:
    return f"parked: {reason}"


def _note(who: str, action: str, before: Parked, after: str, time_ms: int) -> Unit[ParkedAction]:
    row = (time_ms, who, action, *before[:3], _parked_for(before.reason), after)
    yield from query(
        "INSERT INTO parked_action (time_ms, who, action, source, topic, seq, before, after)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        *row,
    )
    return _action(row)


def _action(row: Row) -> ParkedAction:
    time_ms, who, action, source, topic, seq, before, after = row
    return ParkedAction(
        time=timestamp(time_ms),
        who=who,
        action=action,
        name=EntryName(source_center=source, topic=topic, seq=seq),
        before=before,
        after=after,
    )
