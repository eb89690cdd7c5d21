"""The log: a service's ordered, durable record of changes that other centers must learn.

One gapless sequence per topic. An entry is appended in the same unit as its effect (a transactional
outbox) and forgotten only once every other center has confirmed that it applied it; but for a center that
stays away while more than `entries_max` entries come together: it will need a snapshot, and is declared so.

A store has lives, numbered by its generation. A store that was lost begins a new life with what the
others have of the old one, and nobody applies entries of an earlier life any more (`recovery`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from grpc import StatusCode

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from runtime import telemetry
from runtime.clock import Clock
from runtime.errors import RpcError
from runtime.hlc import HybridClock, physical_ms
from runtime.store import Unit, query
from sync_bus.copies import CopiedTable


class Road(Enum):
    """What brings a topic's entries in normal times. The feed fills the gaps of both."""

    JETSTREAM = "jetstream"
    FEED = "feed"


@dataclass(frozen=True, slots=True)
class Topic:
    """One sequence of entries. `name` is unique over all services.

    `tables` are what its entries add up to: they stand for it in a snapshot.
    """

    name: str
    road: Road
    tables: tuple[CopiedTable, ...] = ()

    @property
    def merged(self) -> bool:
        """Do all centers write the same rows?"""
        return any(table.merged for table in self.tables)


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

    def steady_ms(self) -> int:
        """Wall time that is not set back with the wall clock: nothing may last longer for that."""
        return max(self.clock.wall_ms(), physical_ms(self.hybrid.latest))

    def now(self, traceparent: str | None = None) -> Stamp:
        """A stamp in the current trace, or in the one given."""
        if traceparent is None:
            traceparent = telemetry.traceparent()
        return Stamp(self.hybrid.tick(), self.clock.wall_ms(), traceparent)


SCHEMA = """
CREATE TABLE IF NOT EXISTS life (
  one INTEGER NOT NULL PRIMARY KEY CHECK (one = 1), generation INTEGER NOT NULL,
  lost INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS log (
  topic TEXT NOT NULL, seq INTEGER NOT NULL, record BLOB NOT NULL,
  PRIMARY KEY (topic, seq)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log_head (
  topic TEXT NOT NULL PRIMARY KEY, seq INTEGER NOT NULL, hlc INTEGER NOT NULL,
  base INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS confirmed (
  topic TEXT NOT NULL, destination TEXT NOT NULL, seq INTEGER NOT NULL,
  snapshot_needed INTEGER NOT NULL, PRIMARY KEY (topic, destination)) STRICT, WITHOUT ROWID;
"""

FORGOTTEN_AT_ONCE_MAX = 20_000


class Position(NamedTuple):
    """How far a topic reaches: its last number, and its highest timestamp."""

    seq: int
    hlc: int


class Life(NamedTuple):
    """The present life of a store. Its generation is 0 before it has begun.

    `lost`: another center has applied more of its log than it has, as after the restore of a backup.
    """

    generation: int
    lost: bool


class Destination(NamedTuple):
    """What is kept of one topic for one other center."""

    topic: str
    center: str
    head: int
    confirmed: int
    kept: int
    snapshot_needed: bool


def prepare(topics: Sequence[Topic], destinations: Sequence[str]) -> Unit[None]:
    """Makes the rows that the other units update."""
    yield from query("INSERT INTO life VALUES (1, 0, 0) ON CONFLICT DO NOTHING")
    for topic in topics:
        yield from query(
            "INSERT INTO log_head VALUES (?, 0, 0, 0) ON CONFLICT DO NOTHING", topic.name
        )
        for destination in destinations:
            yield from query(
                "INSERT INTO confirmed VALUES (?, ?, 0, 0) ON CONFLICT DO NOTHING",
                topic.name,
                destination,
            )


def life() -> Unit[Life]:
    rows = yield from query("SELECT generation, lost FROM life")
    return Life(rows[0][0], bool(rows[0][1]))


def begin_life(generation: int, positions: Mapping[str, Position]) -> Unit[None]:
    """From here on entries are made, each topic's behind what is left of an earlier life."""
    yield from query("UPDATE life SET generation = ?", generation)
    for topic, position in positions.items():
        yield from query(
            "UPDATE log_head SET seq = ?1, base = ?1, hlc = ?2 WHERE topic = ?3", *position, topic
        )


def mark_lost() -> Unit[None]:
    """Notes for ever that this store has lost entries that others have."""
    yield from query("UPDATE life SET lost = 1")


def append(topic: Topic, stamp: Stamp, record: LogRecord) -> Unit[int]:
    """Adds an entry and returns its number. `record` has its body; the stamp is filled in here.

    Raises RpcError CENTER_RECOVERING if the store's life has not begun, or is lost.
    """
    record.hlc, record.time_ms, record.traceparent = stamp.hlc, stamp.time_ms, stamp.traceparent
    rows = yield from query(
        "UPDATE log_head SET seq = seq + 1, hlc = CASE WHEN hlc > ?1 THEN hlc ELSE ?1 END"
        " WHERE topic = ?2 AND EXISTS (SELECT 1 FROM life WHERE generation > 0 AND NOT lost)"
        " RETURNING seq",
        stamp.hlc,
        topic.name,
    )
    if not rows:
        raise RpcError(
            StatusCode.UNAVAILABLE,
            "CENTER_RECOVERING",
            "this center's store has not all of its data",
            retry_after_ms=1000,
        )
    seq: int = rows[0][0]
    yield from query(
        "INSERT INTO log VALUES (?, ?, ?)", topic.name, seq, record.SerializeToString()
    )
    return seq


def read_after(topic: str, seq: int, limit: int) -> Unit[list[LogEntry]]:
    """Entries after a number, in order. The first is not `seq + 1` if that has been forgotten."""
    generation = (yield from life()).generation
    rows = yield from query(
        "SELECT seq, record FROM log WHERE topic = ? AND seq > ? ORDER BY seq LIMIT ?",
        topic,
        seq,
        limit,
    )
    return [
        LogEntry(topic=topic, seq=number, record=record, generation=generation)
        for number, record in rows
    ]


def heads() -> Unit[dict[str, int]]:
    """The last number of every topic."""
    rows = yield from query("SELECT topic, seq FROM log_head")
    return dict(rows)


def bases() -> Unit[dict[str, int]]:
    """The number after which this life began, of every topic."""
    rows = yield from query("SELECT topic, base FROM log_head")
    return dict(rows)


def position(topic: str) -> Unit[Position]:
    """How far a topic of this store reaches."""
    rows = yield from query("SELECT seq, hlc FROM log_head WHERE topic = ?", topic)
    return Position(*rows[0])


def confirm(destination: str, topic: str, seq: int) -> Unit[None]:
    """Notes how far a destination has applied, and forgets what all of them have.

    Confirmations may arrive late and out of order: only a higher one counts.
    """
    yield from query(
        "UPDATE confirmed SET seq = ?1, snapshot_needed = CASE WHEN ?1 + 1 < coalesce("
        " (SELECT min(seq) FROM log WHERE topic = ?2),"
        " (SELECT seq + 1 FROM log_head WHERE topic = ?2)) THEN snapshot_needed ELSE 0 END"
        " WHERE topic = ?2 AND destination = ?3 AND seq < ?1",
        seq,
        topic,
        destination,
    )
    yield from _forget(topic)


def bound(topic: str, entries_max: int) -> Unit[list[str]]:
    """Keeps the log of a topic short; returns the destinations that need a snapshot from now on."""
    rows = yield from query(
        "UPDATE confirmed SET snapshot_needed = 1 WHERE topic = ?1 AND snapshot_needed = 0"
        " AND seq < (SELECT seq FROM log_head WHERE topic = ?1) - ?2 RETURNING destination",
        topic,
        entries_max,
    )
    yield from _forget(topic, entries_max)
    return [row[0] for row in rows]


def is_too_long(topic: str, entries_max: int) -> Unit[bool]:
    """Has `bound` something to do?"""
    rows = yield from query(
        "SELECT (SELECT seq FROM log_head WHERE topic = ?1) - min(seq) >= ?2 FROM log"
        " WHERE topic = ?1",
        topic,
        entries_max,
    )
    return bool(rows[0][0])


def confirmations(destination: str) -> Unit[dict[str, int]]:
    """How far a destination has applied, by topic."""
    rows = yield from query("SELECT topic, seq FROM confirmed WHERE destination = ?", destination)
    return dict(rows)


def destinations() -> Unit[list[Destination]]:
    """What is kept for whom, for people."""
    rows = yield from query(
        "SELECT topic, destination, h.seq, c.seq,"
        " h.seq + 1 - coalesce((SELECT min(seq) FROM log WHERE topic = h.topic), h.seq + 1),"
        " snapshot_needed FROM confirmed c JOIN log_head h USING (topic) ORDER BY topic, destination"
    )
    return [
        Destination(topic, center, head, confirmed, kept, bool(needed))
        for topic, center, head, confirmed, kept, needed in rows
    ]


def latest_hlc() -> Unit[int]:
    """The highest timestamp this store has written or applied; the clock must not fall behind it."""
    rows = yield from query(
        "SELECT max(hlc) FROM (SELECT hlc FROM log_head UNION ALL SELECT hlc FROM cursor)"
    )
    return rows[0][0] or 0


def _forget(topic: str, entries_max: int | None = None) -> Unit[None]:
    """Deletes what no destination needs, some at a time; those that need a snapshot do not count."""
    yield from query(
        "DELETE FROM log WHERE topic = ?1"
        " AND seq <= coalesce((SELECT min(seq) FROM confirmed WHERE topic = ?1 AND snapshot_needed = 0),"
        " (SELECT seq FROM log_head WHERE topic = ?1) - ?2)"
        " AND seq < (SELECT min(seq) FROM log WHERE topic = ?1) + ?3",
        topic,
        entries_max,
        FORGOTTEN_AT_ONCE_MAX,
    )
