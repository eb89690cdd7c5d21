"""The loss of a center with real processes: what `duohuo drill center-loss` shows to a person."""

import pytest

from tests.integration.conftest import RunningMesh


@pytest.mark.parametrize("how", ["kill", "cut"])
def test_all_promises_hold_when_a_center_is_lost_and_comes_back(
    mesh: RunningMesh, how: str
) -> None:
    report = mesh.cli.json("drill", "center-loss", "--how", how)
    assert report["passed"] is True
    assert all(step["ok"] for step in report["steps"])
    assert len(report["steps"]) >= 17
