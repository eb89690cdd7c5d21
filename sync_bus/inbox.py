"""Applying another center's log: in its order, exactly once, whatever the roads repeat or reorder.

The cursor moves in the same unit as the effect. The next number applies, an older one is skipped, a
jump is a gap to be filled. An entry that cannot be applied is parked, with its reason, so that those
behind it are not held back. A batch is one unit, each entry in a savepoint of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

UNDECODABLE, TOO_FAR_AHEAD = "UNDECODABLE", "TIMESTAMP_TOO_FAR_AHEAD"
"""Why an entry cannot even be tried."""

Handler = Callable[[str, LogRecord, Stamp], Unit[None]]
"""A service's effect of one record from a source center; the stamp is for entries it appends itself."""


class Outcome(Enum):
    APPLIED = "applied"
    DUPLICATE = "duplicate"
    GAP = "gap"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Arrival:
    """An entry that has arrived, decoded; `unusable` says why it cannot even be tried."""

    entry: LogEntry
    record: LogRecord
    stamp: Stamp
    unusable: str = ""


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
    source: str, arrivals: Sequence[Arrival], road: Road, handler: Handler
) -> Unit[list[Outcome]]:
    """Applies, in order, the entries whose turn it is."""
    outcomes = []
    for arrival in arrivals:
        outcome = yield from _position(source, arrival.entry)
        if outcome is Outcome.APPLIED:
            outcome = yield from _apply_next(source, arrival, handler)
            hlc = arrival.record.hlc if outcome is Outcome.APPLIED else 0
            yield from _advance(source, arrival.entry, hlc, road)
        outcomes.append(outcome)
    return outcomes


def attempt(source: str, arrival: Arrival, handler: Handler) -> Unit[str]:
    """The entry's effect, or nothing and the reason why it has none."""
    reason = arrival.unusable
    if not reason:
        yield from query("SAVEPOINT entry")
        try:
            yield from handler(source, arrival.record, arrival.stamp)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, those behind it go on
            yield from query("ROLLBACK TO entry")
            reason = type(error).__name__
        yield from query("RELEASE entry")
    return reason


def believe(source: str, topic: str, hlc: int) -> Unit[None]:
    """Remembers a timestamp that was applied: after a restart the clock must not be behind it."""
    yield from query(
        "UPDATE cursor SET hlc = ?1 WHERE source = ?2 AND topic = ?3 AND hlc < ?1",
        hlc,
        source,
        topic,
    )


def _apply_next(source: str, arrival: Arrival, handler: Handler) -> Unit[Outcome]:
    reason = yield from attempt(source, arrival, handler)
    if not reason:
        return Outcome.APPLIED
    yield from query(
        "INSERT INTO parked VALUES (?, ?, ?, ?, ?, ?)",
        source,
        arrival.entry.topic,
        arrival.entry.seq,
        arrival.entry.record,
        reason,
        arrival.stamp.time_ms,
    )
    return Outcome.PARKED


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
