"""What operators did stands in a log that only grows, that replicates, and that shows changes by hand."""

import sqlite3
from collections.abc import AsyncIterator

import pytest

from duohuo.internal.v1.log_pb2 import LogRecord
from runtime.store import SqliteStore, query
from sync_bus import audit, log
from tests.fakes import stamp, temporary_store

TOPIC = audit.topic("account")


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store("", [TOPIC], ["b"]) as opened:
        yield opened


async def record(store: SqliteStore, target: str, action: str = "freeze", at_ms: int = 0) -> None:
    made = stamp(at_ms)
    unit = audit.record("account", "a", "ann", action, target, "open", "frozen", made)
    await store.write("record", unit)


async def test_rows_are_numbered_and_told_to_the_other_centers(store: SqliteStore) -> None:
    await record(store, "u1", at_ms=1)
    await record(store, "u2", at_ms=2)
    found = await store.read(audit.find())
    assert [(one.number, one.who, one.target, one.before, one.after) for one in found] == [
        (2, "ann", "u2", "open", "frozen"),
        (1, "ann", "u1", "open", "frozen"),
    ]
    entries = await store.read(log.read_after(TOPIC.name, 0, 10))
    async with temporary_store("", [TOPIC], ["a"]) as other:
        for entry in entries:
            told = LogRecord.FromString(entry.record).audit_recorded
            await other.write("copy", audit.copy(told))
        assert await other.read(audit.find()) == found
        assert await other.read(audit.broken()) == []


async def test_actions_are_found_by_target_action_and_time(store: SqliteStore) -> None:
    await record(store, "u1", "freeze", 1)
    await record(store, "u2", "deposit", 2)
    await record(store, "u1", "deposit", 3)
    since = stamp(2).time_ms

    async def numbers(**wanted: object) -> list[int]:
        return [one.number for one in await store.read(audit.find(**wanted))]  # type: ignore[arg-type] # by name

    assert await numbers(target="u1") == [3, 1]
    assert await numbers(action="deposit") == [3, 2]
    assert await numbers(since_ms=since) == [3, 2]
    assert await numbers(limit=1) == [3]


@pytest.mark.parametrize("change", ["DELETE FROM audit", "UPDATE audit SET who = 'nobody'"])
async def test_a_row_made_here_stays_as_it_is(store: SqliteStore, change: str) -> None:
    await record(store, "u1")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        await store.write("falsify", query(change))
    assert await store.read(audit.broken()) == []


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ("UPDATE audit SET who = 'nobody' WHERE number = 2", 2),
        ("UPDATE audit SET after = 'open' WHERE number = 1", 1),
        ("DELETE FROM audit WHERE number = 2", 2),
        ("DELETE FROM audit WHERE number = 1", 1),
        ("UPDATE audit SET hash = 'x' WHERE number = 3", 3),
    ],
)
async def test_whoever_gets_round_that_is_seen(store: SqliteStore, change: str, at: int) -> None:
    for number in range(3):
        await record(store, f"u{number}")
    await store.write("open", query("DROP TRIGGER audit_stays"))
    await store.write("open", query("DROP TRIGGER audit_is_kept"))
    await store.write("falsify", query(change))
    assert await store.read(audit.broken()) == [("a", at)]
