"""All centers agree which of several concurrent writes wins, in whatever order they learn of them."""

from hypothesis import given
from hypothesis import strategies as st

from sync_bus.merge import Version, wins

versions = st.builds(Version, st.integers(1, 4), st.sampled_from("abc"))


def settled(arriving: list[Version]) -> Version | None:
    present = None
    for candidate in arriving:
        if wins(candidate, present):
            present = candidate
    return present


@given(st.data(), st.lists(versions, min_size=1, max_size=8))
def test_order_and_repetition_of_arrival_do_not_matter(
    data: st.DataObject, written: list[Version]
) -> None:
    repeated = written + data.draw(st.lists(st.sampled_from(written), max_size=4))
    assert settled(data.draw(st.permutations(repeated))) == settled(written)


@given(versions, versions)
def test_of_two_versions_exactly_one_wins(one: Version, other: Version) -> None:
    assert wins(one, other) + wins(other, one) == (one != other)


def test_the_later_write_wins_and_the_name_breaks_a_tie() -> None:
    assert settled([Version(2, "a"), Version(1, "z")]) == Version(2, "a")
    assert settled([Version(2, "b"), Version(2, "a")]) == Version(2, "b")
