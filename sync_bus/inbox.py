"""Applying another center's log: in its order, exactly once, whatever the roads repeat or reorder.

The cursor moves in the same unit as the effect. The next number applies, an older one is skipped, a
jump is a gap to be filled. An entry that cannot be applied is parked, with its reason, so that those
behind it are not held back. A batch is one unit, each entry in a savepoint of its own.

Entries count only in the life of their source's store that is known here. An earlier life is over; a later
one is adopted by `seal` or `adopt`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from runtime.store import Unit, query
from sync_bus.log import Position, Road, Stamp, Topic

SCHEMA = """
CREATE TABLE IF NOT EXISTS cursor (
  source TEXT NOT NULL, topic TEXT NOT NULL, seq INTEGER NOT NULL, hlc INTEGER NOT NULL,
  from_jetstream INTEGER NOT NULL DEFAULT 0, from_feed INTEGER NOT NULL DEFAULT 0,
  installing INTEGER NOT NULL DEFAULT 0, repaired INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (source, topic)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS peer_life (
  source TEXT NOT NULL PRIMARY KEY, generation INTEGER NOT NULL, diverged INTEGER NOT NULL
  ) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parked (
  source TEXT NOT NULL, topic TEXT NOT NULL, seq INTEGER NOT NULL, record BLOB NOT NULL,
  reason TEXT NOT NULL, time_ms INTEGER NOT NULL,
  PRIMARY KEY (source, topic, seq)) STRICT, WITHOUT ROWID;
"""

UNDECODABLE, TOO_FAR_AHEAD = "UNDECODABLE", "TIMESTAMP_TOO_FAR_AHEAD"
"""Why an entry cannot even be tried."""

Handler = Callable[[str, LogRecord, Stamp], Unit[None]]
"""A service's effect of one record from a source center; the stamp is for entries it appends itself."""


class NotYet(Exception):
    """Raised by a handler for an entry that means nothing before another one has been applied."""


NOT_YET = NotYet.__name__


class Outcome(Enum):
    APPLIED = "applied"
    DUPLICATE = "duplicate"
    GAP = "gap"
    PARKED = "parked"
    HELD = "held"
    """Not now: a snapshot is being installed, the source's present life is not known yet, or another entry
    must come first."""


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
    installing: bool
    diverged: bool
    repaired: int
    parked: int


class Copy(NamedTuple):
    """What is held of one topic of a source. Incomplete while a snapshot of it is being installed."""

    generation: int
    position: Position
    installing: bool
    diverged: bool
    parked: int


def prepare(topics: Iterable[Topic], sources: Iterable[str]) -> Unit[None]:
    """Makes the rows that the other units update."""
    names = [topic.name for topic in topics]
    for source in sources:
        yield from query("INSERT INTO peer_life VALUES (?, 0, 0) ON CONFLICT DO NOTHING", source)
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
    """Applies, in order, the entries whose turn it is. Cursors are read and moved once per batch."""
    outcomes = []
    reached: dict[str, _Reached | None] = {}
    for arrival in arrivals:
        topic = arrival.entry.topic
        if topic not in reached:
            reached[topic] = yield from _reached(source, topic)
        cursor = reached[topic]
        outcome = _turn(cursor, arrival.entry)
        if cursor is not None and outcome is Outcome.APPLIED:
            outcome = yield from _apply_next(source, arrival, handler)
            if outcome is Outcome.HELD:
                cursor.held = True
            else:
                cursor.seq, cursor.moved = arrival.entry.seq, cursor.moved + 1
            if outcome is Outcome.APPLIED:
                cursor.hlc = max(cursor.hlc, arrival.record.hlc)
        outcomes.append(outcome)
    for topic, cursor in reached.items():
        if cursor is not None and cursor.moved:
            yield from _advance(source, topic, cursor, road)
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
    if reason == NOT_YET:
        return Outcome.HELD
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
        "SELECT source, topic, seq, from_jetstream, from_feed, installing, diverged, repaired,"
        " (SELECT count(*) FROM parked WHERE parked.source = cursor.source"
        " AND parked.topic = cursor.topic)"
        " FROM cursor JOIN peer_life USING (source) ORDER BY source, topic"
    )
    return [
        Cursor(source, topic, seq, fast, sure, bool(installing), bool(diverged), repaired, parked)
        for source, topic, seq, fast, sure, installing, diverged, repaired, parked in rows
    ]


def copy_of(source: str, topic: str) -> Unit[Copy]:
    """How much of another center's topic is here."""
    rows = yield from query(
        "SELECT generation, seq, hlc, installing, diverged, (SELECT count(*) FROM parked"
        " WHERE parked.source = cursor.source AND parked.topic = cursor.topic)"
        " FROM cursor JOIN peer_life USING (source) WHERE source = ? AND topic = ?",
        source,
        topic,
    )
    generation, seq, hlc, installing, diverged, parked = rows[0]
    return Copy(generation, Position(seq, hlc), bool(installing), bool(diverged), parked)


def generation_of(source: str) -> Unit[int]:
    """The latest life of another center's store that is known here; 0 if none."""
    rows = yield from query("SELECT generation FROM peer_life WHERE source = ?", source)
    return int(rows[0][0])


def incomplete(source: str) -> Unit[list[str]]:
    """Topics of a source of which a snapshot is being installed."""
    rows = yield from query(
        "SELECT topic FROM cursor WHERE source = ? AND installing ORDER BY topic", source
    )
    return [row[0] for row in rows]


def lacking(source: str) -> Unit[list[str]]:
    """Topics of a source that cannot be given back to it: incomplete, or with parked entries."""
    rows = yield from query(
        "SELECT topic FROM cursor WHERE source = ?1 AND installing"
        " UNION SELECT topic FROM parked WHERE source = ?1 ORDER BY topic",
        source,
    )
    return [row[0] for row in rows]


def seal(source: str, generation: int) -> Unit[int]:
    """Ends all earlier lives of a source's store: what has been applied of them stays as it is.

    Returns the latest life that is known, which is not the one asked for if that is too early.
    """
    yield from query(
        "UPDATE peer_life SET generation = ?1, diverged = 0 WHERE source = ?2 AND generation < ?1",
        generation,
        source,
    )
    return (yield from generation_of(source))


def adopt(source: str, generation: int, bases: Mapping[str, int]) -> Unit[bool]:
    """Follows a source into a life that began behind the numbers in `bases`.

    False if more than that has been applied here: the source has lost what this center has. Nothing is
    changed if the life, or a later one, is followed already: what the source said has come late.
    """
    if (yield from generation_of(source)) >= generation:
        return True
    applied = yield from cursors(source)
    diverged = any(seq > bases.get(topic, 0) for topic, seq in applied.items())
    if diverged:
        yield from query("UPDATE peer_life SET diverged = 1 WHERE source = ?", source)
    else:
        yield from seal(source, generation)
    return not diverged


def begin_install(source: str, topic: str) -> Unit[None]:
    """From now on the copy is incomplete, and no entries apply."""
    yield from query(
        "UPDATE cursor SET installing = 1 WHERE source = ? AND topic = ?", source, topic
    )


def finish_install(source: str, topic: str, position: Position) -> Unit[None]:
    """The copy is what the source had at a position; entries behind it apply."""
    yield from query(
        "UPDATE cursor SET installing = 0, seq = ?1, hlc = CASE WHEN hlc > ?2 THEN hlc ELSE ?2 END"
        " WHERE source = ?3 AND topic = ?4",
        *position,
        source,
        topic,
    )


def count_repaired(source: str, topic: str, rows: int) -> Unit[None]:
    """Counts rows that differed from their owner's and were put right."""
    yield from query(
        "UPDATE cursor SET repaired = repaired + ? WHERE source = ? AND topic = ?",
        rows,
        source,
        topic,
    )


@dataclass(slots=True)
class _Reached:
    """Where a topic's cursor is in the middle of a batch."""

    seq: int
    generation: int
    held: bool
    hlc: int = 0
    moved: int = 0


def _reached(source: str, topic: str) -> Unit[_Reached | None]:
    rows = yield from query(
        "SELECT seq, generation, installing OR diverged FROM cursor JOIN peer_life USING (source)"
        " WHERE source = ? AND topic = ?",
        source,
        topic,
    )
    return _Reached(*rows[0]) if rows else None


def _turn(cursor: _Reached | None, entry: LogEntry) -> Outcome:
    """Is it this entry's turn? APPLIED if so."""
    if cursor is None or cursor.held or entry.generation > cursor.generation:
        return Outcome.HELD
    if entry.generation < cursor.generation or entry.seq <= cursor.seq:
        return Outcome.DUPLICATE
    return Outcome.APPLIED if entry.seq == cursor.seq + 1 else Outcome.GAP


def _advance(source: str, topic: str, cursor: _Reached, road: Road) -> Unit[None]:
    yield from query(
        "UPDATE cursor SET seq = ?1, hlc = CASE WHEN hlc > ?2 THEN hlc ELSE ?2 END,"
        " from_jetstream = from_jetstream + ?3, from_feed = from_feed + ?4"
        " WHERE source = ?5 AND topic = ?6",
        cursor.seq,
        cursor.hlc,
        cursor.moved if road is Road.JETSTREAM else 0,
        cursor.moved if road is Road.FEED else 0,
        source,
        topic,
    )
