"""A center whose clock is 10 minutes off, or jumps: later writes win all the same, and it is told.

The clocks are moved by libfaketime (Debian's package `faketime`), the monotonic ones left alone.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.drill import identifier_of
from tests.integration.conftest import Cli, RunningMesh, free_port_base, wait_until

LIBRARY = next(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"), None)
MAIN = """
import asyncio, pathlib, sys
from ops.supervisor import run
state, base, wrapper = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
asyncio.run(run(["a", "b"], state, base, 0, False, lambda _: print("is up", flush=True),
                serve_command=[sys.executable, wrapper]))
"""
WRAPPER = """
import os, pathlib, sys
state = pathlib.Path(sys.argv[-1]).parents[1]
offset = state.with_name(f"clock-{pathlib.Path(sys.argv[-1]).parent.name}")
if offset.exists():
    os.environ |= {"FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
                   "FAKETIME_DONT_FAKE_MONOTONIC": "1", "LD_PRELOAD": os.environ["MOVES_THE_CLOCK"]}
os.execv(sys.executable, [sys.executable, "-P", "-m", "ops.main", "serve", *sys.argv[1:]])
"""

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed")


@pytest.fixture
def clocks(tmp_path: Path) -> Iterator["Clocks"]:
    made = Clocks(tmp_path)
    yield made
    made.stop()


class Clocks:
    """A mesh of a, whose clock is right, and b, whose clock is moved."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mesh: RunningMesh | None = None

    @property
    def cli(self) -> Cli:
        assert self._mesh is not None
        return self._mesh.cli

    def move(self, seconds: int) -> None:
        """From now on the clock of b is so far ahead; negative: behind."""
        new = self._directory / "new"
        new.write_text(f"{seconds:+d}")
        new.replace(self._directory / "clock-b")

    def start(self) -> None:
        wrapper, state = self._directory / "wrapper.py", self._directory / "state"
        wrapper.write_text(WRAPPER)
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(state), str(free_port_base()), str(wrapper)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MOVES_THE_CLOCK": str(LIBRARY)},
        )
        self._mesh = RunningMesh(process, Cli(state))
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "is up\n"

    def stop(self) -> None:
        if self._mesh is not None:
            assert self._mesh.stop() == 0

    def drift_ms(self, center: str, peer: str) -> int | None:
        """How far ahead a center sees its peer, if that is an alarm."""
        status = self.cli.json("status")["centers"][center]["status"]
        (found,) = (one for one in status["peers"] if one["center"] == peer)
        return int(found["clock_drift_ms"]) if found.get("clock_alarm") else None

    def register(self) -> str:
        """A user of a whom b knows as well, so that b can serve it alone."""
        user = identifier_of("a", ["a", "b"])
        self.cli.json("register", user)
        wait_until(lambda: self.history(user, "display_name") == [("", "a", ["a", "b"])])
        return user

    def write(self, user: str, center: str, *profile: str) -> None:
        """Edits at this very center, as a user who has seen all that was edited before."""

        def done() -> bool:
            return (
                self.cli.run("login", user, "--center", center).returncode == 0
                and self.cli.run("profile", user, *profile, "--center", center).returncode == 0
            )

        wait_until(done)

    def forget(self) -> None:
        """The next to edit has seen nothing of what was edited before."""
        path = self.cli.state / "sessions.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "causal": ""}))

    def history(self, user: str, field: str) -> list[tuple[str, str, list[str]]]:
        """Value, center and where it counts, of every write of a field."""
        told: Any = self.cli.json("why", user)["fields"][field]
        return [(one["value"], one["center"], one["counts_at"]) for one in told]


@pytest.mark.parametrize("offset_s", [600, -600])
def test_later_writes_win_through_both_centers(clocks: Clocks, offset_s: int) -> None:
    clocks.move(offset_s)
    clocks.start()
    cli = clocks.cli
    wait_until(lambda: clocks.drift_ms("a", "b") is not None)
    wait_until(lambda: clocks.drift_ms("b", "a") is not None)
    assert abs((clocks.drift_ms("a", "b") or 0) - offset_s * 1000) < 5000
    assert abs((clocks.drift_ms("b", "a") or 0) + offset_s * 1000) < 5000
    way = "ahead" if offset_s > 0 else "behind"
    told = re.search(rf"! center a sees the clock of b (\S+) s {way}", cli.run("status").stdout)
    assert told is not None
    assert abs(float(told[1]) - abs(offset_s)) < 5

    user = clocks.register()
    cli.json("link", "cut", "a", "b")
    for number, center in enumerate("abab", start=1):
        clocks.write(user, center, "--name", str(number))
    cli.json("link", "heal", "a", "b")
    expected = [
        ("", "a", []),
        ("1", "a", []),
        ("2", "b", []),
        ("3", "a", []),
        ("4", "b", ["a", "b"]),
    ]
    wait_until(lambda: clocks.history(user, "display_name") == expected)
    text = cli.run("why", user).stdout
    assert text.count("lost to a later one") == 4
    assert "'4'  counts at a, b" in text

    # Money does not care, whatever the clocks say.
    payee = identifier_of("b", ["a", "b"])
    cli.json("register", payee)
    cli.json("fund", user, "30")
    cli.json("login", user)
    cli.json("transfer", payee, "10", "--from", user)
    assert cli.json("verify", "--wait-s", "30")["passed"] is True


def test_fields_merge_one_by_one_and_a_jumping_clock_changes_nothing(clocks: Clocks) -> None:
    clocks.move(0)
    clocks.start()
    cli = clocks.cli
    user = clocks.register()
    assert clocks.drift_ms("a", "b") is None
    cli.json("link", "cut", "a", "b")
    clocks.write(user, "a", "--name", "one", "--language", "zh-CN")
    for number, offset_s in enumerate((600, -600), start=2):
        clocks.move(offset_s)
        clocks.write(user, "b", "--name", str(number))
    clocks.write(user, "a", "--time-zone", "Asia/Shanghai")
    clocks.forget()
    clocks.write(user, "b", "--name", "ignorant")
    cli.json("link", "heal", "a", "b")
    wait_until(lambda: (clocks.drift_ms("a", "b") or 0) < -595_000)
    wait_until(lambda: clocks.history(user, "display_name")[-1] == ("ignorant", "b", ["a", "b"]))
    # Each field has its own winner, and what lost is still known.
    *lost, _ = clocks.history(user, "display_name")
    assert lost == [("", "a", []), ("one", "a", []), ("2", "b", []), ("3", "b", [])]
    assert clocks.history(user, "language") == [("zh-CN", "a", ["a", "b"])]
    assert clocks.history(user, "time_zone") == [("Asia/Shanghai", "a", ["a", "b"])]

    clocks.move(600)
    wait_until(lambda: (clocks.drift_ms("a", "b") or 0) > 595_000)
    clocks.move(0)
    wait_until(lambda: clocks.drift_ms("a", "b") is None)
    assert cli.json("verify", "--wait-s", "30")["passed"] is True
    log = "".join(path.read_text() for path in cli.state.glob("a/*.log"))
    assert "clocks disagree" in log
    assert "clocks agree again" in log
