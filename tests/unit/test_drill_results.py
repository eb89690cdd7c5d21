"""What came of drills is kept, and can be compared."""

from pathlib import Path

import pytest

from ops import drill_results
from ops.drill import Broken, Journal, Traffic, perform


def test_results_are_kept_in_their_order_up_to_so_many(tmp_path: Path) -> None:
    assert drill_results.load(tmp_path) == []
    for number in range(drill_results.KEPT_MAX + 2):
        drill_results.keep(tmp_path, {"drill": "nemesis", "passed": True, "seed": number})
    kept = drill_results.load(tmp_path)
    assert [one["seed"] for one in kept] == list(range(2, drill_results.KEPT_MAX + 2))


def test_a_damaged_file_costs_nothing_but_what_was_in_it(tmp_path: Path) -> None:
    (tmp_path / "drills.json").write_text("[")
    assert drill_results.load(tmp_path) == []
    drill_results.keep(tmp_path, {"drill": "drain", "passed": True})
    assert len(drill_results.load(tmp_path)) == 1


def test_drills_are_listed_with_what_came_of_them(tmp_path: Path) -> None:
    text, data = drill_results.shown(tmp_path)
    assert "None has been done" in text
    assert all(name in text for name in data["drills"])
    users = {"calls": 7, "failed": 1, "slowest_ms": 90}
    result = {"drill": "drain", "passed": False, "recovery_ms": 1500, "users": users}
    drill_results.keep(tmp_path, result)
    drill_results.keep(tmp_path, {"drill": "nemesis", "passed": True})
    text, data = drill_results.shown(tmp_path)
    *_, first, second = text.splitlines()
    assert first.split()[1:] == ["drain", "FAILED", "1500", "ms", "7", "1", "90", "ms"]
    assert second.split()[1:] == ["nemesis", "passed", "-", "-", "-", "-"]
    assert len(data["results"]) == 2


class Fake:
    """A drill that finds something, or does not."""

    def __init__(self, broken: str) -> None:
        self.journal = Journal(lambda _line: None, recovery_ms=1200)
        self.traffic = Traffic(done=5, slowest_ms=40, failed=1)
        self.restored = False
        self._broken = broken

    async def run(self) -> None:
        if self._broken:
            raise Broken(self._broken)

    async def restore(self) -> None:
        self.restored = True


@pytest.mark.parametrize(("broken", "verdict"), [("", "passed"), ("it is not", "FAILED")])
async def test_an_outcome_tells_what_users_saw(broken: str, verdict: str) -> None:
    drill = Fake(broken)
    found = await perform(drill, ())
    assert drill.restored
    assert found.users == {"calls": 6, "failed": 1, "slowest_ms": 40}
    assert found.text("drain") == (
        f"drill drain: {verdict}; recovered in 1200 ms; users: 6 calls, 1 failed, slowest 40 ms"
    )
