"""What an operator has announced is told by all centers, whichever of them are killed."""

import pytest

from tests.integration.conftest import RunningMesh, wait_until

pytestmark = pytest.mark.timeout(180)


def told(mesh: RunningMesh, center: str) -> list[str]:
    found = mesh.cli.json("announce", "list", "--center", center)
    return [one["text"] for one in found["announcements"]]


def test_it_outlives_the_center_that_took_it(mesh: RunningMesh) -> None:
    raised = mesh.cli.json("announce", "raise", "Slow.", "--in", "zh=慢", "--minutes", "60")
    assert raised["texts"] == {"en": "Slow.", "zh": "慢"}
    wait_until(lambda: all("Slow." in told(mesh, name) for name in mesh.described["centers"]))
    taker, other = mesh.described["centers"]
    try:
        mesh.cli.json("center", "kill", taker)
        wait_until(lambda: any(f"Center {taker}" in text for text in told(mesh, other)))
        assert "Slow." in told(mesh, other)
        mesh.cli.json("announce", "lift", raised["announcement_id"])
    finally:
        mesh.cli.json("center", "start", taker)
    wait_until(lambda: all(told(mesh, name) == [] for name in mesh.described["centers"]))
