"""What a benchmark makes of what it has seen: plain arithmetic, checked without a mesh."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from duohuo.internal.v1.log_pb2 import LogEntry
from duohuo.v1.operator_service_pb2 import RoadStatus
from ops.bench.benchmark import Benchmark, Figures, Setup, Summary, percentile, summarise
from ops.bench.calls import CALLS_MIN, Calls
from ops.bench.catch_up import STUCK_AFTER_S, Watch
from ops.bench.login_timing import ks_p
from ops.bench.run import BENCHMARKS, Plan, named, run
from ops.output import Failure
from sync_bus.feed import fitting


def road(cursor: int, from_feed: int = 0) -> RoadStatus:
    return RoadStatus(topic="ledger", cursor=cursor, from_feed=from_feed)


@pytest.mark.parametrize(
    ("other", "p"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([value + 0.5 for value in range(1, 5)], 0.9969),
        ([float(value) for value in range(11, 15)], 0.0114),
    ],
)
def test_samples_of_one_distribution_are_told_from_others(other: list[float], p: float) -> None:
    """Against the formula, worked out by hand: D is 0, 1/4 and 1."""
    assert ks_p([1.0, 2.0, 3.0, 4.0], other) == pytest.approx(p, abs=1e-3)


def test_a_figure_over_several_runs_is_its_median_and_its_spread() -> None:
    runs: list[Figures] = [{"x_ms": 5.0, "y": 1.0}, {"x_ms": 1.0}, {"x_ms": 2.0}]
    assert summarise(runs) == {"x_ms": Summary(2.0, 1.0, 5.0), "y": Summary(1.0, 1.0, 1.0)}
    assert summarise([]) == {}


def test_percentiles_lie_within_what_was_measured() -> None:
    values = [float(value) for value in range(1, 102)]
    assert (percentile(values, 50), percentile(values, 99)) == (51.0, 100.0)
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)


def test_few_calls_have_no_percentiles() -> None:
    async def call() -> None:
        raise AssertionError

    assert Calls(call, [1.0] * (CALLS_MIN - 1)).figures("before") == {}
    assert Calls(call, [1.0] * CALLS_MIN).figures("before") == {
        "p50_before_ms": 1.0,
        "p99_before_ms": 1.0,
    }


def test_the_rate_counts_from_the_last_silence_to_the_last_move() -> None:
    watch = Watch("ledger", {"ledger": 1000, "changes": 5}, start=200, away_s=10.0, moved_s=10.0)
    changes = RoadStatus(topic="changes", cursor=5)
    watch.saw(10.1, {"ledger": road(200), "changes": changes}, None)
    watch.saw(11.0, {"ledger": road(600), "changes": changes}, 2.0)
    assert not watch.is_done()
    assert watch.told(11.0) == "400 of 800 entries applied, 400/s"
    watch.saw(12.0, {"ledger": road(1000, from_feed=100), "changes": changes}, 2.2)
    watch.saw(13.0, {"ledger": road(1000, from_feed=100), "changes": changes}, 2.2)
    assert watch.is_done()
    assert watch.figures() == {
        "entries_per_s": 400.0,
        "catch_up_s": 2.0,
        "processor_us_per_entry": pytest.approx(500.0),
        "by_feed_percent": 25.0,
    }


def test_a_topic_that_is_not_shown_yet_is_not_caught_up() -> None:
    watch = Watch("ledger", {"ledger": 0, "changes": 0}, start=0, away_s=0.0, moved_s=0.0)
    watch.saw(1.0, {"ledger": road(0)}, None)
    assert not watch.is_done()


def test_a_center_that_stands_still_or_stays_silent_fails_the_run() -> None:
    watch = Watch("ledger", {"ledger": 1000}, start=20, away_s=0.0, moved_s=0.0)
    watch.require_progress(STUCK_AFTER_S)
    with pytest.raises(Failure, match="has applied 20 of 1000 entries of ledger"):
        watch.require_progress(STUCK_AFTER_S + 0.1)
    for now_s in (1.0, 30.0):
        watch.saw(now_s, {"ledger": road(300)}, None)
    watch.require_progress(1.0 + STUCK_AFTER_S)
    with pytest.raises(Failure, match="has applied 300 of 1000 entries of ledger"):
        watch.require_progress(1.1 + STUCK_AFTER_S)


def test_cases_are_run_in_turn_and_what_was_measured_survives_a_failure(tmp_path: Path) -> None:
    seen: list[str] = []
    told: list[str] = []

    async def measure(case: str, setup: Setup) -> Figures:
        (setup.directory / "data").write_text("")
        seen.append(case)
        if len(seen) == 4:
            raise Failure("broken")
        return {"entries_per_s": float(len(seen))}

    plan = Plan(runs=2, entries=10, port_base=23_000, results=tmp_path / "bench")
    with pytest.raises(Failure, match="broken"):
        asyncio.run(run(Benchmark("echo", ("x", "y"), measure), plan, told.append))
    assert seen == ["x", "y", "x", "y"]
    (left,) = [path for path in plan.results.iterdir() if path.is_dir()]
    assert told[-1] == f"echo y, run 2 of 2: FAILED; its data and logs are in {left}"
    (kept,) = plan.results.glob("echo-*.json")
    assert '"median": 2.0' in kept.read_text()


@pytest.mark.parametrize("wanted", [(), ("catch-up", "flood", "login-timing", "queue")])
def test_all_benchmarks_are_run_unless_some_are_named(wanted: Sequence[str]) -> None:
    assert named(wanted) == list(BENCHMARKS.values())
    with pytest.raises(KeyError):
        named(["unheard-of"])


@pytest.mark.parametrize(("bytes_max", "count"), [(0, 1), (14, 1), (20, 2), (21, 2), (1000, 3)])
def test_a_page_of_the_feed_is_bounded_in_bytes_but_never_empty(bytes_max: int, count: int) -> None:
    entries = [LogEntry(topic="t", seq=seq, record=b"123") for seq in (1, 2, 3)]
    assert entries[0].ByteSize() == 10
    assert fitting(entries, bytes_max) == entries[:count]
    assert fitting([], bytes_max) == []
