"""The log has no gaps, and forgets nothing that somebody has not applied yet."""

from collections.abc import AsyncIterator

import pytest

from duohuo.internal.v1.log_pb2 import AccountCreated, LogRecord
from runtime.errors import RpcError
from runtime.store import SqliteStore, Unit, query
from sync_bus import log, node
from sync_bus.log import Destination, Life, Position, Road, Topic
from tests.fakes import stamp, temporary_store

ACCOUNTS, OTHER = Topic("accounts", Road.JETSTREAM), Topic("other", Road.FEED)


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store("", [ACCOUNTS, OTHER], ["b", "c"]) as opened:
        yield opened


def created(name: str) -> LogRecord:
    return LogRecord(account_created=AccountCreated(account_id=name))


async def fill(store: SqliteStore, count: int) -> None:
    for number in range(1, count + 1):
        await store.write("append", log.append(ACCOUNTS, stamp(number), created(f"{number}")))


async def held(store: SqliteStore, after: int = 0, limit: int = 100) -> list[int]:
    entries = await store.read(log.read_after("accounts", after, limit))
    return [entry.seq for entry in entries]


async def test_every_topic_counts_its_entries_from_one_without_gaps(store: SqliteStore) -> None:
    topics = [ACCOUNTS, OTHER, ACCOUNTS, ACCOUNTS, OTHER]
    numbers = [await store.write("append", log.append(t, stamp(0), created("x"))) for t in topics]
    assert numbers == [1, 1, 2, 3, 2]
    assert await store.read(log.heads()) == {"accounts": 3, "other": 2}


async def test_an_entry_of_a_unit_that_fails_leaves_no_gap(store: SqliteStore) -> None:
    def append_and_fail() -> Unit[None]:
        yield from log.append(ACCOUNTS, stamp(0), created("lost"))
        raise KeyError

    await fill(store, 1)
    with pytest.raises(KeyError):
        await store.write("fail", append_and_fail())
    await store.write("append", log.append(ACCOUNTS, stamp(2), created("2")))
    assert await held(store) == [1, 2]


async def test_an_entry_carries_what_was_appended_and_when(store: SqliteStore) -> None:
    made = stamp(5)
    await store.write("append", log.append(ACCOUNTS, made, created("x")))
    (entry,) = await store.read(log.read_after("accounts", 0, 10))
    record = LogRecord.FromString(entry.record)
    assert (entry.topic, entry.seq) == ("accounts", 1)
    assert record.account_created.account_id == "x"
    assert (record.hlc, record.time_ms) == (made.hlc, made.time_ms)


async def test_reading_goes_on_after_a_number_in_order_and_up_to_a_limit(
    store: SqliteStore,
) -> None:
    await fill(store, 5)
    assert await held(store, after=2) == [3, 4, 5]
    assert await held(store, after=1, limit=2) == [2, 3]
    assert await held(store, after=5) == []


@pytest.mark.parametrize(
    ("confirmations", "left"),
    [
        ([], [1, 2, 3, 4, 5]),
        ([("b", 3)], [1, 2, 3, 4, 5]),
        ([("b", 3), ("c", 2)], [3, 4, 5]),
        ([("b", 5), ("c", 5)], []),
        ([("b", 4), ("c", 4), ("b", 1), ("c", 2)], [5]),
        ([("b", 4), ("b", 2), ("c", 3)], [4, 5]),
        ([("b", 5), ("stranger", 5)], [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
async def test_only_what_all_have_confirmed_is_forgotten(
    store: SqliteStore, confirmations: list[tuple[str, int]], left: list[int]
) -> None:
    """Late and lower confirmations count for nothing."""
    await fill(store, 5)
    for destination, seq in confirmations:
        await store.write("confirm", log.confirm(destination, "accounts", seq))
    assert await held(store) == left
    assert (await store.read(log.heads()))["accounts"] == 5


async def test_numbers_go_on_after_everything_was_forgotten(store: SqliteStore) -> None:
    await fill(store, 2)
    for destination in ("b", "c"):
        await store.write("confirm", log.confirm(destination, "accounts", 2))
    await store.write("append", log.append(ACCOUNTS, stamp(3), created("3")))
    assert await held(store) == [3]


async def test_a_confirmation_counts_for_its_topic_alone(store: SqliteStore) -> None:
    await fill(store, 2)
    for destination in ("b", "c"):
        await store.write("confirm", log.confirm(destination, "other", 2))
    assert await held(store) == [1, 2]
    assert await store.read(log.confirmations("b")) == {"accounts": 0, "other": 2}


async def test_preparing_again_changes_nothing(store: SqliteStore) -> None:
    await fill(store, 2)
    await store.write("confirm", log.confirm("b", "accounts", 1))
    await store.write("prepare", node.prepare([ACCOUNTS, OTHER], ["b", "c"]))
    assert (await store.read(log.heads()))["accounts"] == 2
    assert (await store.read(log.confirmations("b")))["accounts"] == 1


async def test_a_store_of_a_smaller_mesh_needs_preparing(store: SqliteStore) -> None:
    assert await store.read(node.is_prepared([ACCOUNTS, OTHER], ["b", "c"]))
    assert not await store.read(node.is_prepared([ACCOUNTS, OTHER], ["b", "c", "d"]))
    assert not await store.read(node.is_prepared([ACCOUNTS], ["b", "c"]))


async def test_the_clock_starts_above_everything_written_or_applied(store: SqliteStore) -> None:
    await store.write("append", log.append(ACCOUNTS, stamp(9), created("late")))
    await store.write("append", log.append(ACCOUNTS, stamp(3), created("early")))
    assert await store.read(log.latest_hlc()) == stamp(9).hlc
    applied = stamp(12).hlc
    await store.write("applied", query("UPDATE cursor SET hlc = ? WHERE source = 'c'", applied))
    assert await store.read(log.latest_hlc()) == applied


async def needed(store: SqliteStore, topic: str = "accounts") -> dict[str, bool]:
    """Which destinations are declared to need a snapshot."""
    found = await store.read(log.destinations())
    return {one.center: one.snapshot_needed for one in found if one.topic == topic}


async def bound(store: SqliteStore, entries_max: int) -> list[str]:
    return await store.write("bound", log.bound("accounts", entries_max))


async def confirm(store: SqliteStore, destination: str, seq: int) -> None:
    await store.write("confirm", log.confirm(destination, "accounts", seq))


async def test_a_log_that_is_not_too_long_is_left_alone(store: SqliteStore) -> None:
    await fill(store, 5)
    assert not await store.read(log.is_too_long("accounts", 5))
    assert await store.read(log.is_too_long("accounts", 4))
    assert not await store.read(log.is_too_long("other", 0))
    assert await bound(store, 5) == []
    assert await held(store) == [1, 2, 3, 4, 5]


async def test_one_destination_away_is_declared_once_and_counts_no_more(store: SqliteStore) -> None:
    await fill(store, 5)
    await confirm(store, "b", 1)
    await confirm(store, "c", 4)
    assert await bound(store, 3) == ["b"]
    assert await needed(store) == {"b": True, "c": False}
    assert await held(store) == [5]
    assert await bound(store, 3) == []
    assert not await store.read(log.is_too_long("accounts", 3))


async def test_when_all_are_away_so_many_entries_are_kept(store: SqliteStore) -> None:
    await fill(store, 5)
    assert await bound(store, 2) == ["b", "c"]
    assert await held(store) == [4, 5]
    await store.write("append", log.append(ACCOUNTS, stamp(6), created("6")))
    assert await store.read(log.is_too_long("accounts", 2))
    assert await bound(store, 2) == []
    assert await held(store) == [5, 6]


@pytest.mark.parametrize(("seq", "still"), [(2, True), (3, False), (4, False), (5, False)])
async def test_who_has_caught_up_with_the_log_needs_no_snapshot_any_more(
    store: SqliteStore, seq: int, still: bool
) -> None:
    """Entries 4 and 5 are kept."""
    await fill(store, 5)
    await bound(store, 2)
    await confirm(store, "b", seq)
    assert await needed(store) == {"b": still, "c": True}


@pytest.mark.parametrize(("seq", "still"), [(4, True), (5, False)])
async def test_the_same_when_the_log_is_empty(store: SqliteStore, seq: int, still: bool) -> None:
    await fill(store, 5)
    await bound(store, 2)
    await confirm(store, "c", 5)
    assert await held(store) == []
    await confirm(store, "b", seq)
    assert await needed(store) == {"b": still, "c": False}


async def test_a_long_log_is_forgotten_some_at_a_time(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "FORGOTTEN_AT_ONCE_MAX", 2)
    await fill(store, 5)
    kept = []
    for _ in range(3):
        await bound(store, 1)
        kept.append(await held(store))
    assert kept == [[3, 4, 5], [5], [5]]


async def test_people_see_what_is_kept_for_whom(store: SqliteStore) -> None:
    await fill(store, 5)
    await confirm(store, "c", 5)
    await confirm(store, "b", 2)
    seen = await store.read(log.destinations())
    assert seen == [
        Destination("accounts", "b", head=5, confirmed=2, kept=3, snapshot_needed=False),
        Destination("accounts", "c", head=5, confirmed=5, kept=3, snapshot_needed=False),
        Destination("other", "b", head=0, confirmed=0, kept=0, snapshot_needed=False),
        Destination("other", "c", head=0, confirmed=0, kept=0, snapshot_needed=False),
    ]


async def test_nothing_is_appended_before_a_life_or_after_its_loss() -> None:
    async with temporary_store("", [ACCOUNTS, OTHER], ["b"], alive=False) as store:
        assert await store.read(log.life()) == Life(0, lost=False)

        async def append() -> int:
            return await store.write("append", log.append(ACCOUNTS, stamp(1), created("x")))

        with pytest.raises(RpcError, match="CENTER_RECOVERING"):
            await append()
        positions = {"accounts": Position(7, stamp(5).hlc)}
        await store.write("begin", log.begin_life(3, positions))
        assert await append() == 8
        (entry,) = await store.read(log.read_after("accounts", 0, 10))
        assert (entry.seq, entry.generation) == (8, 3)
        assert await store.read(log.bases()) == {"accounts": 7, "other": 0}
        assert await store.read(log.position("accounts")) == Position(8, stamp(5).hlc)
        await store.write("lose", log.mark_lost())
        assert await store.read(log.life()) == Life(3, lost=True)
        with pytest.raises(RpcError, match="CENTER_RECOVERING") as refused:
            await append()
        assert refused.value.retry_after_ms == 1000
        assert not refused.value.ran
        assert await store.read(log.heads()) == {"accounts": 8, "other": 0}
