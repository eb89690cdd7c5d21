"""A whole center restarts under load and nobody notices: what `duohuo drill drain` shows to a person."""

from collections.abc import Callable, Sequence

import pytest

from ops import drain_drill, slot_plan
from ops.drill import identifier_of
from ops.slot_plan import Step
from runtime.placement import slot_of
from tests.integration.conftest import RunningMesh

pytestmark = pytest.mark.timeout(180)
EVERY = 50


async def test_a_center_is_emptied_restarted_and_filled_again(
    mesh: RunningMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a fiftieth of the slots, and those of the users: all of them take a minute and a half."""
    used: set[int] = set()

    def some(planned: Callable[..., list[Step]]) -> Callable[..., list[Step]]:
        def plan(*arguments: object) -> list[Step]:
            return [
                step for step in planned(*arguments) if step.slot % EVERY == 0 or step.slot in used
            ]

        return plan

    def noted(home: str, centers: Sequence[str]) -> str:
        identifier = identifier_of(home, centers)
        used.add(slot_of(identifier))
        return identifier

    monkeypatch.setattr(drain_drill, "identifier_of", noted)
    for name in ("drain", "spread"):
        monkeypatch.setattr(slot_plan, name, some(getattr(slot_plan, name)))
    told: list[str] = []
    found = await drain_drill.drain(mesh.cli.state, told.append)
    assert found.passed, "\n".join(told)
    assert found.users["failed"] == 0
    assert found.users["calls"] > drain_drill.PAYMENTS_WITHOUT
