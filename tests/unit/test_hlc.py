"""The hybrid clock never goes back, whatever the wall clock and other centers do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.hlc import AHEAD_MS_MAX, COUNTER_BITS, HybridClock, TooFarAhead, physical_ms
from tests.fakes import NOON_MS, FakeClock

DAY_MS = 24 * 3600 * 1000


@given(st.lists(st.integers(-DAY_MS, DAY_MS), max_size=50))
def test_timestamps_grow_and_keep_up_with_the_wall_however_it_jumps(jumps_ms: list[int]) -> None:
    clock = FakeClock()
    hybrid = HybridClock(clock)
    before = hybrid.tick()
    for jump_ms in jumps_ms:
        clock.jump(jump_ms)
        now = hybrid.tick()
        assert now > before
        assert physical_ms(now) >= clock.wall_ms()
        before = now


@given(st.integers(0, (NOON_MS + AHEAD_MS_MAX) << COUNTER_BITS))
def test_what_was_observed_is_in_the_past(remote: int) -> None:
    hybrid = HybridClock(FakeClock())
    issued = hybrid.tick()
    hybrid.observe(remote)
    assert hybrid.latest == max(issued, remote)
    assert hybrid.tick() > max(issued, remote)


@pytest.mark.parametrize(
    ("ahead_ms", "believed"), [(AHEAD_MS_MAX, True), (AHEAD_MS_MAX + 1, False)]
)
def test_a_remote_clock_is_believed_up_to_an_hour_ahead(ahead_ms: int, believed: bool) -> None:
    hybrid = HybridClock(FakeClock())
    before = hybrid.tick()
    remote = (NOON_MS + ahead_ms) << COUNTER_BITS
    if believed:
        hybrid.observe(remote)
        assert hybrid.tick() > remote
    else:
        with pytest.raises(TooFarAhead):
            hybrid.observe(remote)
        assert hybrid.tick() == before + 1


def test_a_restarted_clock_goes_on_above_what_was_stored() -> None:
    stored = (NOON_MS + 5000) << COUNTER_BITS
    assert HybridClock(FakeClock(), latest=stored).tick() > stored
