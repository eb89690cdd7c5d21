"""Entries that could not be applied, and what was done about them.

A parked entry is retried by an operator once its cause is gone, or dropped. Each is one unit with its
row in the audit log. Entries from too far ahead are retried by themselves, when the local clock has caught
up (`who` is "clock").

Those behind a parked entry have been applied: a retry is out of order. Handlers hold that, each by its
own means: versions, numbers, states that only move on.
"""

from typing import NamedTuple

from google.protobuf.message import DecodeError

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from duohuo.v1.operator_service_pb2 import EntryName, ParkedAction, ParkedEntry, Violation
from runtime.clock import timestamp
from runtime.store import Unit, query
from sync_bus import audit, inbox
from sync_bus.audit import Action
from sync_bus.inbox import Arrival, Handler
from sync_bus.log import Stamp

ENTRIES_MAX = 1000
"""So many are listed or retried at a time."""
ACTIONS_MAX = 20
RETRY, DROP = "retry parked entry", "drop parked entry"
APPLIED, DROPPED = "applied", "dropped"


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
    def name(self) -> str:
        """How people call it."""
        return f"{self.source}/{self.topic}/{self.seq}"

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
    role: str, here: str, who: str, parked: Parked, arrival: Arrival, handler: Handler
) -> Unit[Action | None]:
    """Applies an entry out of order. None if it is no longer parked, or others must come first."""
    present = yield from _present(parked)
    if present is None:
        return None
    reason = yield from inbox.attempt(parked.source, arrival, handler)
    if reason == inbox.NOT_YET:
        return None
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
    before = _parked_for(present.reason)
    target = parked.name
    return (yield from audit.record(role, here, who, RETRY, target, before, after, arrival.stamp))


def drop(role: str, here: str, who: str, parked: Parked, stamp: Stamp) -> Unit[Action | None]:
    """Gives an entry up. None if it is no longer parked."""
    present = yield from _present(parked)
    if present is None:
        return None
    yield from _forget(parked)
    before = _parked_for(present.reason)
    return (yield from audit.record(role, here, who, DROP, parked.name, before, DROPPED, stamp))


def actions(here: str, limit: int = ACTIONS_MAX) -> Unit[list[ParkedAction]]:
    """What was done here last, newest first."""
    done = []
    for name in (RETRY, DROP):
        found = yield from audit.find(action=name, limit=limit)
        done += [one for one in found if one.center == here]
    done.sort(key=lambda one: one.number, reverse=True)
    return [shown(one) for one in done[:limit]]


def shown(action: Action) -> ParkedAction:
    """What was done about a parked entry, for people."""
    source, topic, seq = action.target.split("/")
    return ParkedAction(
        time=timestamp(action.time_ms),
        who=action.who,
        action="retry" if action.action == RETRY else "drop",
        name=EntryName(source_center=source, topic=topic, seq=int(seq)),
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
