"""Applying another center's log: in its order, exactly once, whatever the roads repeat or reorder.

The cursor moves in the same unit as the effect. The next number applies, an older one is skipped, a
jump is a gap to be filled. An entry that cannot be applied is parked, with its reason, so that those
behind it are not held back.
"""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from runtime.store import Unit, query
from sync_bus.log import Road, Stamp, Topic

SCHEMA = """
CREATE TABLE IF NOT EXISTS cursor (
  source TEXT NOT NULL, topic TEXT NOT NULL, seq INTEGER NOT NULL, hlc INTEGER NOT NULL,
  from_jetstream INTEGER NOT NULL DEFAULT 0, from_feed INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (source, topic)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parked (
  source TEXT NOT NULL, topic TEXT NOT NULL, seq INTEGER NOT NULL, record BLOB NOT NULL,
  reason TEXT NOT NULL, time_ms INTEGER NOT NULL,
  PRIMARY KEY (source, topic, seq)) STRICT, WITHOUT ROWID;
"""

Handler = Callable[[str, LogRecord, Stamp], Unit[None]]
"""A service's effect of one record from a source center; the stamp is for entries it appends itself."""


class Outcome(Enum):
    APPLIED = "applied"
    DUPLICATE = "duplicate"
    GAP = "gap"


class Cursor(NamedTuple):
    """How far one topic of a source has been applied, and by which road the entries came."""

    source: str
    topic: str
    seq: int
    from_jetstream: int
    from_feed: int
    parked: int


def prepare(topics: Iterable[Topic], sources: Iterable[str]) -> Unit[None]:
    """Makes the rows that the other units update."""
    names = [topic.name for topic in topics]
    for source in sources:
        for name in names:
            yield from query(
                "INSERT INTO cursor (source, topic, seq, hlc) VALUES (?, ?, 0, 0)"
                " ON CONFLICT DO NOTHING",
                source,
                name,
            )


def apply(
    source: str, entry: LogEntry, record: LogRecord, road: Road, handler: Handler, stamp: Stamp
) -> Unit[Outcome]:
    """Applies an entry if it is the next one. Raises what the handler raises, with no effect."""
    outcome = yield from _position(source, entry)
    if outcome is Outcome.APPLIED:
        yield from handler(source, record, stamp)
        yield from _advance(source, entry, record.hlc, road)
    return outcome


def park(source: str, entry: LogEntry, road: Road, reason: str, time_ms: int) -> Unit[Outcome]:
    """Steps over an entry that cannot be applied, and keeps it for an operator."""
    outcome = yield from _position(source, entry)
    if outcome is Outcome.APPLIED:
        yield from query(
            "INSERT INTO parked VALUES (?, ?, ?, ?, ?, ?)",
            source,
            entry.topic,
            entry.seq,
            entry.record,
            reason,
            time_ms,
        )
        yield from _advance(source, entry, 0, road)
    return outcome


def cursors(source: str) -> Unit[Mapping[str, int]]:
    """How far each topic of a source has been applied."""
    rows = yield from query("SELECT topic, seq FROM cursor WHERE source = ?", source)
    return dict(rows)


def inspect() -> Unit[list[Cursor]]:
    """All cursors, for people."""
    rows = yield from query(
        "SELECT source, topic, seq, from_jetstream, from_feed, (SELECT count(*) FROM parked"
        " WHERE parked.source = cursor.source AND parked.topic = cursor.topic)"
        " FROM cursor ORDER BY source, topic"
    )
    return [Cursor(*row) for row in rows]


def _position(source: str, entry: LogEntry) -> Unit[Outcome]:
    rows = yield from query(
        "SELECT seq FROM cursor WHERE source = ? AND topic = ?", source, entry.topic
    )
    if not rows or entry.seq > rows[0][0] + 1:
        return Outcome.GAP
    return Outcome.APPLIED if entry.seq == rows[0][0] + 1 else Outcome.DUPLICATE


def _advance(source: str, entry: LogEntry, hlc: int, road: Road) -> Unit[None]:
    yield from query(
        "UPDATE cursor SET seq = ?1, hlc = CASE WHEN hlc > ?2 THEN hlc ELSE ?2 END,"
        " from_jetstream = from_jetstream + ?3, from_feed = from_feed + ?4"
        " WHERE source = ?5 AND topic = ?6",
        entry.seq,
        hlc,
        int(road is Road.JETSTREAM),
        int(road is Road.FEED),
        source,
        entry.topic,
    )
