"""`duohuo bench catch-up`, as a person runs it, with few entries."""

import json
from pathlib import Path

import pytest

from tests.integration.conftest import Cli, free_port_base

ENTRIES = 300


@pytest.mark.timeout(300)
def test_catch_up_is_measured_on_a_mesh_of_its_own_and_kept(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "state")
    sizes = ("--runs", "1", "--entries", str(ENTRIES))
    done = cli.run("bench", "catch-up", *sizes, "--port-base", str(free_port_base()), "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(done.stdout)["benchmarks"]
    kept = Path(result.pop("kept_in"))
    assert json.loads(kept.read_text()) == result
    assert result["entries"] == ENTRIES
    assert set(result["summary"]) == {"ledger", "changes"}
    for figures in result["summary"].values():
        rate, took = figures["entries_per_s"]["median"], figures["catch_up_s"]["median"]
        assert rate * took == pytest.approx(ENTRIES)
        assert figures["p50_before_ms"]["median"] <= figures["p99_before_ms"]["median"]
    assert "run 1 of 1: verify" in done.stderr
    assert [path for path in kept.parent.iterdir() if path.is_dir()] == []


def test_a_benchmark_that_does_not_exist_and_a_port_in_use_are_refused(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "state")
    assert "there is catch-up" in cli.refused("bench", "unheard-of")["message"]
    message = cli.refused("bench", "catch-up", "--port-base", "1")["message"]
    assert "--port-base must be from 1024" in message
