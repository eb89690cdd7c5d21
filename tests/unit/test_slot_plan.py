"""Plans move as few slots as they can, do what is left of them, and nothing that has changed since."""

from pathlib import Path

import pytest

from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import CountSlotsResponse, PlacementView
from gateway import ring
from ops import slot_plan
from ops.output import Failure
from ops.slot_plan import Step
from runtime.placement import SLOTS


def view(weights: dict[str, int], steps: list[Step] | None = None) -> PlacementView:
    """A mesh that began with centers of these weights, and where these steps were done."""
    placement = ring.compute(weights, 1).copy()
    for step in steps or []:
        assert placement.learn(step.slot, placement.epoch_of(step.slot) + 1, step.to)
    centers = sorted(weights)
    return PlacementView(
        centers=centers,
        homes=[centers.index(placement.home(slot)) for slot in range(SLOTS)],
        epochs=[placement.epoch_of(slot) for slot in range(SLOTS)],
    )


ABC = {"a": 1, "b": 1, "c": 1}


def test_a_drained_center_is_home_of_nothing_and_the_others_share_it() -> None:
    steps = slot_plan.drain(view(ABC), "b", list(ABC))
    assert {step.source for step in steps} == {"b"}
    assert {step.to for step in steps} == {"a", "c"}
    after = view(ABC, steps)
    assert list(after.centers).index("b") not in after.homes
    assert slot_plan.drain(after, "b", list(ABC)) == []


def test_after_an_undrain_all_is_as_it_was() -> None:
    before = view(ABC)
    away = slot_plan.drain(before, "b", list(ABC))
    back = slot_plan.spread(view(ABC, away), ABC)
    assert {step.to for step in back} == {"b"}
    assert view(ABC, [*away, *back]).homes == before.homes


def test_a_new_center_gets_its_share_and_nothing_else_moves() -> None:
    began = view({"a": 1, "b": 1, "c": 0})
    steps = slot_plan.spread(began, ABC)
    assert {step.to for step in steps} == {"c"}
    assert 0.3 * SLOTS < len(steps) < 0.36 * SLOTS


def test_the_only_center_cannot_be_drained() -> None:
    with pytest.raises(Failure, match="only center"):
        slot_plan.drain(view({"a": 1}), "a", ["a"])


def test_a_plan_says_what_moves_and_that_nothing_has_been_done() -> None:
    steps = [Step(1, "a", "b", 1), Step(2, "a", "c", 1), Step(3, "a", "b", 4)]
    counted = CountSlotsResponse(
        accounts=7,
        balances=[Money(currency_code="CNY", minor_units=500)],
        applications_open=2,
        holds_open=1,
    )
    said = slot_plan.shown(steps, counted)
    assert "3 slots with 7 accounts, 500 CNY, 2 open applications and 1 open holds" in said
    assert "a     b   2" in said
    assert said.endswith("Nothing has been done yet.")
    assert "nothing to move" in slot_plan.shown([], CountSlotsResponse())


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    steps = slot_plan.drain(view(ABC), "c", list(ABC))
    slot_plan.save(steps, tmp_path / "plan.json")
    assert slot_plan.load(tmp_path / "plan.json", ["a", "b", "c"]) == steps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}x",
        '[{"slot": 1}]',
        "[1]",
        '[{"slot": 4096, "source": "a", "to": "b", "epoch": 1}]',
        '[{"slot": 1, "source": "x", "to": "b", "epoch": 1}]',
        '[{"slot": 1, "source": "a", "to": ["b"], "epoch": 1}]',
        '[{"slot": 1, "source": "a", "to": "b", "epoch": "1"}]',
    ],
)
def test_what_is_no_plan_is_called_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(Failure, match="is no plan"):
        slot_plan.load(tmp_path / "plan.json", ["a", "b", "c"])
    with pytest.raises(Failure, match="no file"):
        slot_plan.load(tmp_path / "nowhere.json", ["a", "b", "c"])
