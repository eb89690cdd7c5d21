"""Placement spreads users evenly, moves few of them, and never depends on chance."""

from functools import lru_cache
from hashlib import sha256
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ring import compute
from runtime.placement import SLOTS, Placement

NAMES = {
    "letters": list(ascii_lowercase[:16]),
    "numbered": [f"c{number}" for number in range(1, 17)],
    "padded": [f"dc{number:02}" for number in range(16)],
    "cities": [
        *("beijing", "shanghai", "shenzhen", "chengdu", "wuhan", "xian", "nanjing", "tianjin"),
        *("dalian", "xiamen", "harbin", "kunming", "lhasa", "urumqi", "guiyang", "hefei"),
    ],
}
all_schemes = pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
two_to_sixteen = pytest.mark.parametrize("count", range(2, 17))


@lru_cache
def equal(*centers: str) -> Placement:
    return compute(dict.fromkeys(centers, 1), epoch=1)


@all_schemes
@two_to_sixteen
def test_no_center_has_more_than_its_share_and_a_twentieth(names: list[str], count: int) -> None:
    placed = equal(*names[:count])
    slots = [placed.slots_of(center) for center in names[:count]]
    assert sum(slots) == SLOTS
    assert max(slots) <= 1.05 * SLOTS / count


@all_schemes
@two_to_sixteen
def test_a_new_center_moves_little_more_than_its_share(names: list[str], count: int) -> None:
    before, after = equal(*names[: count - 1]), equal(*names[:count])
    moved = sum(before.home(slot) != after.home(slot) for slot in range(SLOTS))
    assert moved / SLOTS <= 1 / count + 0.02


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(NAMES["letters"]), st.integers(1, 5), min_size=1, max_size=6)
)
def test_homes_follow_the_weights(weights: dict[str, int]) -> None:
    placed = compute(weights, epoch=1)
    for center, weight in weights.items():
        assert placed.slots_of(center) <= 1.05 * SLOTS * weight / sum(weights.values())


def test_a_center_without_weight_is_home_of_nothing() -> None:
    placed = compute({"a": 1, "b": 0, "c": 1}, epoch=1)
    assert placed.slots_of("b") == 0
    assert placed.slots_of("a") + placed.slots_of("c") == SLOTS


@all_schemes
def test_every_slot_has_all_centers_in_its_order(names: list[str]) -> None:
    placed = equal(*names)
    assert placed.centers == tuple(sorted(names))
    assert len(placed.order) == SLOTS
    assert all(sorted(order) == sorted(names) for order in placed.order)


def test_the_order_in_which_centers_are_named_does_not_matter() -> None:
    forwards, backwards = equal("a", "b", "c"), equal("c", "b", "a")
    assert forwards == backwards


def test_placement_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Every center computes it for itself. A change moves users' homes without an operator's doing."""
    homes = "".join(order[0] for order in equal("a", "b", "c").order)
    assert sha256(homes.encode()).hexdigest()[:16] == "05975c40fe746c30"


def test_the_epoch_is_the_one_given() -> None:
    assert compute({"a": 1}, epoch=7).epoch == 7


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 0, "b": 0}, {"a": -1, "b": 2}], ids=str)
def test_placement_needs_a_center_that_can_take_slots(weights: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        compute(weights, epoch=1)
