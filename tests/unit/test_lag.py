"""How far a copy is behind: never zero when nobody knows, and a promise of an end only with progress."""

from collections.abc import AsyncIterator

import pytest

from account_svc import app as account_app
from account_svc import registry
from account_svc import store as accounts
from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.internal.v1.peer_services_pb2 import ExchangeRequest, ExchangeResponse
from runtime.dispatcher import Incoming
from runtime.store import SqliteStore
from sync_bus import log
from sync_bus.feed import FeedServicer
from sync_bus.growth import Growth
from sync_bus.lag import SILENT_AFTER_MS, Lag, Pace, Sight, measure, see
from sync_bus.node import ServiceNode
from tests.fakes import GENERATION, NOON_MS, FakeClock, site, stamp, temporary_store
from tests.unit.test_parked import NoBus, NoInspection, created, receive

ALICE = "account"
UNKNOWN = Lag(None, None)


def test_a_source_that_was_never_heard_has_no_lag_that_anybody_knows() -> None:
    assert measure(None, 0, 0, now_ms=10) == UNKNOWN


def test_a_copy_that_has_everything_is_not_behind_while_its_source_answers() -> None:
    last = see(None, 1000, 7, 7, None)
    assert measure(last, 7, 7, now_ms=2000) == Lag(0, 0)


def test_the_lag_of_a_complete_copy_is_unknown_once_its_source_is_silent() -> None:
    last = see(None, 1000, 7, 7, None)
    assert measure(last, 7, 7, now_ms=1000 + SILENT_AFTER_MS) == Lag(0, 0)
    assert measure(last, 7, 7, now_ms=1001 + SILENT_AFTER_MS) == UNKNOWN


def test_an_entry_that_is_missing_goes_on_waiting_between_exchanges_and_in_silence() -> None:
    last = see(None, 1000, 5, 7, 300)
    assert measure(last, 5, 7, now_ms=1400) == Lag(700, None)
    assert measure(last, 5, 7, now_ms=61_000) == Lag(60_300, None)


def test_an_entry_made_after_the_exchange_is_not_older_than_the_exchange() -> None:
    last = see(None, 1000, 7, 7, None)
    assert measure(last, 7, 8, now_ms=1250) == Lag(250, None)


def test_the_age_of_what_is_missing_is_not_made_up() -> None:
    last = see(None, 1000, 5, 7, None)
    assert measure(last, 5, 7, now_ms=1400) == UNKNOWN


def test_two_exchanges_tell_when_the_copy_will_have_caught_up() -> None:
    first = see(None, 0, 0, 10_000, 60_000)
    second = see(first, 1000, 1500, 10_500, 55_000)
    assert second.pace == Pace(applied=1500, appended=500)
    assert measure(second, 1500, 10_500, now_ms=1000) == Lag(55_000, 9000)
    assert measure(second, 9500, 10_500, now_ms=1900) == Lag(55_900, 1000)


@pytest.mark.parametrize("applied", [0, 400, 500])
def test_no_end_is_promised_when_more_is_appended_than_applied(applied: int) -> None:
    second = see(see(None, 0, 0, 10_000, 60_000), 1000, applied, 10_500, 60_500)
    assert measure(second, applied, 10_500, now_ms=1000).catch_up_ms is None


def test_no_end_is_promised_while_the_source_is_silent() -> None:
    second = see(see(None, 0, 0, 10_000, 1), 1000, 1000, 10_000, 1)
    assert measure(second, 1000, 10_000, now_ms=1001 + SILENT_AFTER_MS) == Lag(
        SILENT_AFTER_MS + 2, None
    )


def test_the_pace_is_smoothed_and_follows_a_change() -> None:
    sight = see(see(None, 0, 0, 10**6, 1), 1000, 1000, 10**6, 1)
    slower = see(sight, 2000, 1000, 10**6, 1)
    assert slower.pace is not None
    assert 700 < slower.pace.applied < 900
    for second in range(3, 40):
        slower = see(slower, second * 1000, 1000, 10**6, 1)
    assert slower.pace is not None
    assert slower.pace.applied < 1


@pytest.mark.parametrize(
    "before",
    [Sight(0, 7, 7, None, None), Sight(-SILENT_AFTER_MS - 1, 0, 9, 1, Pace(5, 5))],
    ids=["nothing was missing", "the source was silent"],
)
def test_the_pace_is_measured_anew_after_a_pause(before: Sight) -> None:
    assert see(before, 1000, 7, 9, 1).pace is None


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(accounts.SCHEMA, accounts.TOPICS, ["b"]) as opened:
        yield opened


async def test_a_source_tells_since_when_the_first_missing_entry_waits_by_its_own_clock(
    store: SqliteStore,
) -> None:
    for at_ms in (10, 20, 30):
        await store.write("append", log.append(registry.ACCOUNTS, stamp(at_ms), LogRecord()))

    async def not_lost() -> None:
        raise AssertionError

    feed = FeedServicer(store, frozenset("b"), FakeClock(NOON_MS + 100), not_lost, Growth(store))

    async def exchange(**cursors: int) -> ExchangeResponse:
        request = ExchangeRequest(center="b", cursors=cursors, generation=GENERATION)
        return await feed.Exchange(request, Incoming("", 5.0))

    answer = await exchange(accounts=0, changes=0)
    assert answer == ExchangeResponse(
        heads={"accounts": 3, "changes": 0},
        time_ms=NOON_MS + 100,
        generation=GENERATION,
        missing_since_ms={"accounts": NOON_MS + 10},
    )
    assert (await exchange(accounts=2)).missing_since_ms == {"accounts": NOON_MS + 30}
    assert (await exchange(accounts=3)).missing_since_ms == {}


async def test_a_destination_shows_the_lag_of_each_topic_whatever_the_sources_clock_says(
    store: SqliteStore,
) -> None:
    clock = FakeClock()
    here = site("a", "a", "b", clock=clock)
    node = ServiceNode(
        account_app.ROLE, accounts.TOPICS, here, store, NoBus(), accounts.apply, NoInspection()
    )
    before = {road.topic: road for road in await node._replicator.roads()}["accounts"]
    assert not before.HasField("lag_ms")
    assert not before.HasField("heard_ago_ms")

    hours_ahead_ms = NOON_MS + 36_000_000
    answer = ExchangeResponse(
        heads={"accounts": 2, "changes": 0},
        time_ms=hours_ahead_ms,
        missing_since_ms={"accounts": hours_ahead_ms - 4000},
    )
    node._replicator._heard_monotonic_ms["b"] = clock.monotonic_ms()
    node._replicator._see("b", {"accounts": 0, "changes": 0}, answer)
    clock.advance(500)
    roads = {road.topic: road for road in await node._replicator.roads()}
    assert (roads["accounts"].lag_ms, roads["accounts"].heard_ago_ms) == (4500, 500)
    assert not roads["accounts"].HasField("catch_up_ms")
    assert (roads["changes"].lag_ms, roads["changes"].catch_up_ms) == (0, 0)

    await receive(node, created(1, ALICE, "alice@example.com"), created(2, "b", "b@example.com"))
    caught_up = {road.topic: road for road in await node._replicator.roads()}["accounts"]
    assert (caught_up.lag_ms, caught_up.catch_up_ms) == (0, 0)
