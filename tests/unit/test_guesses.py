"""How often somebody may be wrong: waits that grow and heal, and counts of several centers."""

import pytest

from runtime import guesses
from runtime.guesses import HEAL_MS, Attempt, Guesses, Policy, wait_ms
from tests.fakes import FakeClock

POLICY = Policy(free=3, first_wait_ms=1_000, wait_ms_max=8_000)


class Place:
    """One center's counts, and its clock."""

    def __init__(self, name: str = "a") -> None:
        self.clock = FakeClock()
        self.guesses = Guesses(name, self.clock)

    def begin(self, name: str = "alice") -> Attempt:
        return self.guesses.begin("identifier", name, POLICY)

    def fail(self, times: int = 1, name: str = "alice") -> None:
        for _ in range(times):
            attempt = self.begin(name)
            assert not attempt.wait_ms
            self.guesses.end(attempt, failed=True)

    def wait(self, name: str = "alice") -> int:
        """How long there is to wait."""
        attempt = self.begin(name)
        if not attempt.wait_ms:
            self.guesses.end(attempt, failed=False)
        return attempt.wait_ms

    def tell(self, other: "Place", since: int = 0) -> int:
        failures, change = self.guesses.since(since, 100)
        for told in failures:
            other.guesses.merge(told)
        return change


@pytest.mark.parametrize(
    ("failures", "wait"),
    [(0, 0), (2, 0), (3, 1_000), (4, 2_000), (5, 4_000), (6, 8_000), (7, 8_000), (10**6, 8_000)],
)
def test_a_wait_doubles_up_to_a_bound(failures: int, wait: int) -> None:
    assert wait_ms(failures, POLICY) == wait


def test_it_grows_with_each_failure_and_heals_by_time() -> None:
    place = Place()
    place.fail(2)
    assert place.wait() == 0
    place.fail()
    assert place.wait() == 1_000
    place.clock.advance(999)
    assert place.wait() == 1
    place.clock.advance(1)
    place.fail()
    assert place.wait() == 2_000
    place.clock.advance(HEAL_MS)
    place.fail(3)
    assert place.wait() == 1_000


def test_success_is_no_failure_and_heals_nothing() -> None:
    place = Place()
    for _ in range(100):
        assert place.wait() == 0
    place.fail(3)
    place.clock.advance(1_000)
    assert place.wait() == 0
    place.fail()
    assert place.wait() == 2_000


def test_many_at_once_are_no_more_than_one_after_the_other() -> None:
    place = Place()
    begun = [place.begin() for _ in range(200)]
    assert sum(not attempt.wait_ms for attempt in begun) == POLICY.free
    for attempt in begun:
        if not attempt.wait_ms:
            place.guesses.end(attempt, failed=True)
    assert place.wait() == 1_000
    place.clock.advance(1_000)
    assert sum(not place.begin().wait_ms for _ in range(200)) == 1


def test_what_is_refused_counts_for_nothing() -> None:
    """Or else somebody who goes on asking would never be let in again."""
    place = Place()
    place.fail(3)
    for _ in range(50):
        assert place.wait() > 0
    place.clock.advance(1_000)
    assert place.wait() == 0


def test_each_name_and_kind_has_its_own_count() -> None:
    place = Place()
    place.fail(3)
    assert place.wait("bob") == 0
    assert not place.guesses.begin("device", "alice", POLICY).wait_ms


def test_centers_count_together_whatever_is_told_twice_or_late() -> None:
    a, b = Place("a"), Place("b")
    a.fail(2)
    a.tell(b)
    a.tell(b)
    assert b.wait() == 0
    b.fail()
    assert b.wait() == 1_000
    b.tell(a)
    assert a.wait() == 1_000
    a.clock.advance(1_000)
    assert a.wait() == 0
    a.fail()
    assert a.wait() == 2_000


def test_what_one_has_heard_it_tells_with_what_it_counts() -> None:
    a, b, c = Place("a"), Place("b"), Place("c")
    a.fail()
    a.tell(b)
    b.fail(2)
    b.tell(c, since=1)
    assert c.wait() == 1_000


def test_who_has_forgotten_everything_is_told_everything_also_what_it_counted_itself() -> None:
    before, other, after = Place("a1"), Place("b1"), Place("a2")
    before.fail(2)
    before.tell(other)
    after.fail()
    other.tell(after)
    assert after.wait() == 1_000
    after.tell(other)
    assert other.wait() == 1_000


def test_what_was_only_heard_is_told_once_to_who_knows_nothing() -> None:
    a, b, c = Place("a"), Place("b"), Place("c")
    a.fail(3)
    a.tell(b)
    told = b.tell(c)
    assert c.wait() == 1_000
    assert b.guesses.since(told, 100) == ([], told)


def test_attempts_that_go_on_take_no_place_of_what_is_told() -> None:
    place = Place("a")
    place.fail()
    for number in range(10):
        place.begin(f"user {number}")
    assert len(place.guesses.since(0, 1)[0]) == 1


def test_a_failure_is_as_old_elsewhere_as_it_is() -> None:
    a, b = Place("a"), Place("b")
    a.fail(3)
    a.clock.advance(400)
    a.tell(b)
    assert b.wait() == 600


def test_what_has_healed_comes_back_from_nowhere() -> None:
    a, b = Place("a"), Place("b")
    a.fail(3)
    a.clock.advance(HEAL_MS)
    a.tell(b)
    assert b.wait() == 0


def test_only_what_is_new_is_told_and_the_newest_first() -> None:
    a, b = Place("a"), Place("b")
    a.fail(name="alice")
    told = a.tell(b)
    assert a.guesses.since(told, 100) == ([], told)
    a.fail(name="bob")
    a.fail(name="carol")
    failures, change = a.guesses.since(told, 1)
    assert (len(failures), failures[0].counts, change) == (1, {"a": 1}, told + 2)
    a.fail(2, "carol")
    assert failures[0].key == a.guesses.since(change, 100)[0][0].key


def test_counts_of_endless_processes_are_not_kept() -> None:
    place = Place("a")
    for number in range(guesses.COUNTERS_MAX + 10):
        place.guesses.merge(guesses.Failures(b"key", {f"p{number}": 1}, 0))
    place.guesses.merge(guesses.Failures(b"key", {"p0": 5}, 0))
    (kept,) = place.guesses.since(0, 10)[0]
    assert len(kept.counts) == guesses.COUNTERS_MAX
    assert kept.counts["p0"] == 5


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "KEYS_MAX", 10)
    place = Place()
    place.fail(3)
    for number in range(9):
        place.fail(name=f"user {number}")
    assert place.wait() > 0
    for number in range(10):
        place.fail(name=f"other {number}")
    assert place.wait() == 0
    assert len(place.guesses.since(0, 100)[0]) <= 10
