"""Real faults on a real mesh, for half a minute: what `duohuo drill nemesis` shows to a person."""

from pathlib import Path

import pytest

from tests.integration.conftest import start_mesh

MINUTES = "0.45"
SEED = "1"


@pytest.mark.timeout(300)
def test_all_guarantees_hold_under_seeded_faults(tmp_path: Path) -> None:
    mesh = start_mesh(tmp_path / "mesh", "--centers", "a,b,c")
    try:
        report = mesh.cli.json("drill", "nemesis", "--minutes", MINUTES, "--seed", SEED)
        assert report["violations"] == []
        assert report["passed"] is True
        assert len(report["faults"]) >= 3, "hardly any fault was made"
        assert report["refused"] > 0, "no fault was felt"
        assert report["tried"] == report["ok"] + report["refused"] + report["indefinite"]
        assert report["sure_logins"] > 0, "LOGIN was never put to the test"
        assert report["by_kind"]["transfer"]["ok"] > 0
        # The directories of this mesh lie on one big disk, which the drill must leave alone.
        assert report["skipped"]
        assert "fill" not in report["faults"]
    finally:
        assert mesh.stop() == 0
