"""Another center's entries take effect in its order, exactly once, whatever the roads do to them."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duohuo.internal.v1.log_pb2 import AccountCreated, LogEntry, LogRecord
from runtime.store import SqliteStore, Unit, query
from sync_bus import inbox
from sync_bus.inbox import Arrival, Copy, Cursor, Outcome
from sync_bus.log import Position, Road, Stamp, Topic
from tests.fakes import GENERATION, NOON_MS, stamp, temporary_store

APPLIED, DUPLICATE, GAP, PARKED, HELD = Outcome
ACCOUNTS, OTHER = Topic("accounts", Road.JETSTREAM), Topic("other", Road.FEED)
SCHEMA = "CREATE TABLE effect (number INTEGER PRIMARY KEY, source TEXT, name TEXT) STRICT;"
BAD = "bad"


def effect(source: str, record: LogRecord, _stamp: Stamp) -> Unit[None]:
    """Notes the record, and only then finds that a bad one is bad."""
    name = record.account_created.account_id
    yield from query("INSERT INTO effect (source, name) VALUES (?, ?)", source, name)
    if name == BAD:
        raise ValueError(name)


def arrival(seq: int, name: str = "", topic: str = "accounts", unusable: str = "") -> Arrival:
    made = stamp(seq)
    created = AccountCreated(account_id=name or f"{seq}")
    record = LogRecord(hlc=made.hlc, account_created=created)
    entry = LogEntry(topic=topic, seq=seq, generation=GENERATION, record=record.SerializeToString())
    return Arrival(entry, record, made, unusable)


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(SCHEMA, [ACCOUNTS, OTHER], ["b", "c"]) as opened:
        yield opened


async def deliver(
    store: SqliteStore,
    arrivals: Sequence[Arrival],
    source: str = "b",
    road: Road = Road.JETSTREAM,
) -> list[Outcome]:
    return await store.write("apply", inbox.apply(source, arrivals, road, effect))


async def effects(store: SqliteStore) -> list[str]:
    rows = await store.read(query("SELECT name FROM effect ORDER BY number"))
    return [row[0] for row in rows]


async def parked(store: SqliteStore) -> list[tuple[str, int, str]]:
    rows = await store.read(query("SELECT source, seq, reason FROM parked ORDER BY source, seq"))
    return [(source, seq, reason) for source, seq, reason in rows]


@pytest.mark.parametrize(
    ("seqs", "outcomes", "cursor"),
    [
        ([1, 2, 3], [APPLIED, APPLIED, APPLIED], 3),
        ([1, 1, 2], [APPLIED, DUPLICATE, APPLIED], 2),
        ([2], [GAP], 0),
        ([1, 3, 2], [APPLIED, GAP, APPLIED], 2),
        ([1, 2, 1, 3], [APPLIED, APPLIED, DUPLICATE, APPLIED], 3),
        ([0], [DUPLICATE], 0),
        ([], [], 0),
    ],
    ids=str,
)
async def test_only_the_next_entry_applies(
    store: SqliteStore, seqs: list[int], outcomes: list[Outcome], cursor: int
) -> None:
    assert await deliver(store, [arrival(seq) for seq in seqs]) == outcomes
    assert (await store.read(inbox.cursors("b")))["accounts"] == cursor
    assert await effects(store) == [f"{seq}" for seq in range(1, cursor + 1)]


async def test_a_bad_entry_has_no_effect_and_does_not_hold_back_those_behind_it(
    store: SqliteStore,
) -> None:
    bad = arrival(2, BAD)
    assert await deliver(store, [arrival(1), bad, arrival(3)]) == [APPLIED, PARKED, APPLIED]
    assert await effects(store) == ["1", "3"]
    assert await parked(store) == [("b", 2, "ValueError")]
    rows = await store.read(query("SELECT record, time_ms FROM parked"))
    assert rows == [(bad.entry.record, NOON_MS + 2)]


async def test_an_unusable_entry_is_parked_as_it_came_and_never_tried(store: SqliteStore) -> None:
    garbage = LogEntry(topic="accounts", seq=1, generation=GENERATION, record=b"\xff garbage")
    unusable = Arrival(garbage, LogRecord(hlc=2**60), stamp(1), "UNDECODABLE")
    assert await deliver(store, [unusable, arrival(2)]) == [PARKED, APPLIED]
    assert await effects(store) == ["2"]
    assert await store.read(query("SELECT record, reason FROM parked")) == [
        (b"\xff garbage", "UNDECODABLE")
    ]


async def test_the_timestamp_of_a_parked_entry_is_not_believed(store: SqliteStore) -> None:
    ahead = Arrival(arrival(1).entry, LogRecord(hlc=2**60), stamp(1), "TIMESTAMP_TOO_FAR_AHEAD")
    await deliver(store, [ahead])
    assert await store.read(query("SELECT max(hlc) FROM cursor")) == [(0,)]
    await deliver(store, [arrival(2)])
    assert await store.read(query("SELECT max(hlc) FROM cursor")) == [(stamp(2).hlc,)]


async def test_a_bad_entry_whose_turn_it_is_not_is_not_parked(store: SqliteStore) -> None:
    bad = arrival(2, BAD)
    assert await deliver(store, [bad]) == [GAP]
    assert await deliver(store, [arrival(1), bad, bad]) == [APPLIED, PARKED, DUPLICATE]
    assert await parked(store) == [("b", 2, "ValueError")]


async def test_a_batch_that_does_not_commit_leaves_no_effect_and_does_not_move_the_cursor(
    store: SqliteStore,
) -> None:
    def apply_and_fail() -> Unit[None]:
        yield from inbox.apply("b", [arrival(1), arrival(2)], Road.FEED, effect)
        raise KeyError

    with pytest.raises(KeyError):
        await store.write("fail", apply_and_fail())
    assert await effects(store) == []
    assert await store.read(inbox.cursors("b")) == {"accounts": 0, "other": 0}


async def test_sources_and_topics_have_cursors_of_their_own(store: SqliteStore) -> None:
    await deliver(store, [arrival(1), arrival(2)])
    await deliver(store, [arrival(1, topic="other"), arrival(3, topic="other")])
    await deliver(store, [arrival(1)], source="c")
    assert await store.read(inbox.cursors("b")) == {"accounts": 2, "other": 1}
    assert await store.read(inbox.cursors("c")) == {"accounts": 1, "other": 0}


@pytest.mark.parametrize(("source", "topic"), [("z", "accounts"), ("b", "unheard of")])
async def test_what_nobody_prepared_for_is_held(
    store: SqliteStore, source: str, topic: str
) -> None:
    assert await deliver(store, [arrival(1, topic=topic)], source=source) == [HELD]
    assert await effects(store) == []


async def test_people_see_how_far_each_road_has_brought_it(store: SqliteStore) -> None:
    await deliver(store, [arrival(1), arrival(2, BAD)], road=Road.JETSTREAM)
    await deliver(store, [arrival(2), arrival(3)], road=Road.FEED)
    seen = [cursor for cursor in await store.read(inbox.inspect()) if cursor.seq]
    assert seen == [
        Cursor("b", "accounts", 3, 2, 1, installing=False, diverged=False, repaired=0, parked=1)
    ]


names = st.lists(st.sampled_from(["good", BAD]), max_size=8)
batches = st.lists(st.lists(st.integers(1, 8), max_size=8), max_size=8)


@settings(max_examples=60)
@given(names, batches)
def test_deliveries_in_any_order_then_filled_give_one_state(
    entries: list[str], deliveries: list[list[int]]
) -> None:
    """Lost, repeated and reordered deliveries; then the feed reads the log from the start."""
    log = [arrival(seq, BAD if name == BAD else "") for seq, name in enumerate(entries, 1)]

    async def replicate() -> None:
        async with temporary_store(SCHEMA, [ACCOUNTS], ["b"]) as store:
            for batch in deliveries:
                arrivals = [log[seq - 1] for seq in batch if seq <= len(log)]
                outcomes = await deliver(store, arrivals)
                assert len(outcomes) == len(arrivals)
            await deliver(store, log, road=Road.FEED)
            good = [f"{seq}" for seq, name in enumerate(entries, 1) if name != BAD]
            bad = [("b", seq, "ValueError") for seq, name in enumerate(entries, 1) if name == BAD]
            assert await effects(store) == good
            assert await parked(store) == bad
            assert await store.read(inbox.cursors("b")) == {"accounts": len(entries)}

    asyncio.run(replicate())


async def copy(store: SqliteStore, source: str = "b") -> Copy:
    return await store.read(inbox.copy_of(source, "accounts"))


def of_life(generation: int, seq: int) -> Arrival:
    made = arrival(seq)
    made.entry.generation = generation
    return made


@pytest.mark.parametrize(
    ("generation", "outcome"), [(GENERATION - 1, DUPLICATE), (GENERATION, APPLIED), (2, HELD)]
)
async def test_entries_count_in_the_life_that_is_known_alone(
    store: SqliteStore, generation: int, outcome: Outcome
) -> None:
    assert await deliver(store, [of_life(generation, 1)]) == [outcome]
    assert await effects(store) == (["1"] if outcome is APPLIED else [])


async def test_a_seal_ends_all_earlier_lives_and_keeps_what_has_been_applied(
    store: SqliteStore,
) -> None:
    await deliver(store, [arrival(1)])
    assert await store.write("seal", inbox.seal("b", 5)) == 5
    assert await deliver(store, [arrival(2)]) == [DUPLICATE]
    assert await deliver(store, [of_life(5, 2), of_life(6, 3)]) == [APPLIED, HELD]
    assert (await copy(store)).position.seq == 2
    assert await store.read(inbox.generation_of("c")) == GENERATION


@pytest.mark.parametrize("asked", [0, 3, 5])
async def test_a_seal_that_is_too_early_says_which_life_is_known(
    store: SqliteStore, asked: int
) -> None:
    await store.write("seal", inbox.seal("b", 5))
    assert await store.write("seal", inbox.seal("b", asked)) == 5


@pytest.mark.parametrize(
    ("bases", "follows"),
    [({"accounts": 2}, True), ({"accounts": 3}, True), ({"accounts": 1}, False), ({}, False)],
    ids=str,
)
async def test_a_life_is_followed_unless_it_began_before_what_is_here(
    store: SqliteStore, bases: dict[str, int], follows: bool
) -> None:
    await deliver(store, [arrival(1), arrival(2)])
    assert await store.write("adopt", inbox.adopt("b", 7, bases)) is follows
    found = await copy(store)
    assert (found.generation, found.diverged) == ((7, False) if follows else (GENERATION, True))
    held = [HELD] if not follows else [APPLIED]
    assert await deliver(store, [of_life(found.generation, 3)]) == held


async def test_what_a_source_said_at_its_beginning_may_come_late(store: SqliteStore) -> None:
    """Meanwhile its life was followed, and entries of it have been applied."""
    await deliver(store, [arrival(1)])
    assert await store.write("adopt", inbox.adopt("b", GENERATION, {"accounts": 0}))
    assert await deliver(store, [arrival(2)]) == [APPLIED]


async def test_a_seal_ends_a_divergence(store: SqliteStore) -> None:
    await deliver(store, [arrival(1)])
    await store.write("adopt", inbox.adopt("b", 7, {}))
    await store.write("seal", inbox.seal("b", 8))
    assert not (await copy(store)).diverged
    assert await deliver(store, [of_life(8, 2)]) == [APPLIED]


async def test_nothing_applies_while_a_snapshot_is_installed_and_then_what_is_behind_it(
    store: SqliteStore,
) -> None:
    await deliver(store, [arrival(1)])
    await store.write("begin", inbox.begin_install("b", "accounts"))
    assert await store.read(inbox.incomplete("b")) == ["accounts"]
    assert await store.read(inbox.incomplete("c")) == []
    assert await deliver(store, [arrival(2)]) == [HELD]
    assert await deliver(store, [arrival(1, topic="other")]) == [APPLIED]
    hlc = stamp(50).hlc
    finish = inbox.finish_install("b", "accounts", Position(5, hlc))
    await store.write("finish", finish)
    assert await copy(store) == Copy(GENERATION, Position(5, hlc), False, False, 0)
    assert await deliver(store, [arrival(5), arrival(7), arrival(6)]) == [DUPLICATE, GAP, APPLIED]
    assert (await copy(store)).position == Position(6, hlc)


async def test_repaired_rows_are_counted_by_source_and_topic(store: SqliteStore) -> None:
    for rows in (2, 3):
        await store.write("count", inbox.count_repaired("b", "other", rows))
    seen = await store.read(inbox.inspect())
    assert {(one.source, one.topic): one.repaired for one in seen} == {
        ("b", "accounts"): 0,
        ("b", "other"): 5,
        ("c", "accounts"): 0,
        ("c", "other"): 0,
    }
