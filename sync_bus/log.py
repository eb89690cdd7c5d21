"""The log: a service's ordered, durable record of changes that other centers must learn.

One gapless sequence per topic. An entry is appended in the same unit as its effect (a transactional
outbox) and forgotten only once every other center has confirmed that it applied it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from runtime import telemetry
from runtime.clock import Clock
from runtime.hlc import HybridClock
from runtime.store import Unit, query


class Road(Enum):
    """What brings a topic's entries in normal times. The feed fills the gaps of both."""

    JETSTREAM = "jetstream"
    FEED = "feed"


@dataclass(frozen=True, slots=True)
class Topic:
    """One sequence of entries. `name` is unique over all services."""

    name: str
    road: Road


@dataclass(frozen=True, slots=True)
class Stamp:
    """When, and in which trace, a change is made."""

    hlc: int
    time_ms: int
    traceparent: str


class Stamps:
    """Makes stamps from the process's clocks and the current trace."""

    def __init__(self, clock: Clock, hybrid: HybridClock) -> None:
        self.clock = clock
        self.hybrid = hybrid

    def now(self, traceparent: str | None = None) -> Stamp:
        """A stamp in the current trace, or in the one given."""
        if traceparent is None:
            traceparent = telemetry.traceparent()
        return Stamp(self.hybrid.tick(), self.clock.wall_ms(), traceparent)


SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
  topic TEXT NOT NULL, seq INTEGER NOT NULL, record BLOB NOT NULL,
  PRIMARY KEY (topic, seq)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log_head (
  topic TEXT NOT NULL PRIMARY KEY, seq INTEGER NOT NULL, hlc INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS confirmed (
  topic TEXT NOT NULL, destination TEXT NOT NULL, seq INTEGER NOT NULL,
  PRIMARY KEY (topic, destination)) STRICT, WITHOUT ROWID;
"""


def prepare(topics: Sequence[Topic], destinations: Sequence[str]) -> Unit[None]:
    """Makes the rows that the other units update."""
    for topic in topics:
        yield from query("INSERT INTO log_head VALUES (?, 0, 0) ON CONFLICT DO NOTHING", topic.name)
        for destination in destinations:
            yield from query(
                "INSERT INTO confirmed VALUES (?, ?, 0) ON CONFLICT DO NOTHING",
                topic.name,
                destination,
            )


def append(topic: Topic, stamp: Stamp, record: LogRecord) -> Unit[int]:
    """Adds an entry and returns its number. `record` has its body; the stamp is filled in here."""
    record.hlc, record.time_ms, record.traceparent = stamp.hlc, stamp.time_ms, stamp.traceparent
    rows = yield from query(
        "UPDATE log_head SET seq = seq + 1, hlc = CASE WHEN hlc > ?1 THEN hlc ELSE ?1 END"
        " WHERE topic = ?2 RETURNING seq",
        stamp.hlc,
        topic.name,
    )
    seq: int = rows[0][0]
    yield from query(
        "INSERT INTO log VALUES (?, ?, ?)", topic.name, seq, record.SerializeToString()
    )
    return seq


def read_after(topic: str, seq: int, limit: int) -> Unit[list[LogEntry]]:
    """Entries after a number, in order. The first is not `seq + 1` if that has been forgotten."""
    rows = yield from query(
        "SELECT seq, record FROM log WHERE topic = ? AND seq > ? ORDER BY seq LIMIT ?",
        topic,
        seq,
        limit,
    )
    return [LogEntry(topic=topic, seq=number, record=record) for number, record in rows]


def heads() -> Unit[dict[str, int]]:
    """The last number of every topic."""
    rows = yield from query("SELECT topic, seq FROM log_head")
    return dict(rows)


def confirm(destination: str, topic: str, seq: int) -> Unit[None]:
    """Notes how far a destination has applied, and forgets what all of them have.

    Confirmations may arrive late and out of order: only a higher one counts.
    """
    yield from query(
        "UPDATE confirmed SET seq = ?1 WHERE topic = ?2 AND destination = ?3 AND seq < ?1",
        seq,
        topic,
        destination,
    )
    yield from query(
        "DELETE FROM log WHERE topic = ?1"
        " AND seq <= (SELECT min(seq) FROM confirmed WHERE topic = ?1)",
        topic,
    )


def confirmations(destination: str) -> Unit[dict[str, int]]:
    """How far a destination has applied, by topic."""
    rows = yield from query("SELECT topic, seq FROM confirmed WHERE destination = ?", destination)
    return dict(rows)


def latest_hlc() -> Unit[int]:
    """The highest timestamp this store has written or applied; the clock must not fall behind it."""
    rows = yield from query(
        "SELECT max(hlc) FROM (SELECT hlc FROM log_head UNION ALL SELECT hlc FROM cursor)"
    )
    return rows[0][0] or 0
