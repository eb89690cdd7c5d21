"""A real mesh for tests: `duohuo up` as a user starts it, on free ports, in a directory of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAM = str(Path(sys.executable).with_name("duohuo"))
PASSWORD = "correct-horse-battery"
READY_WITHIN_S = 60.0


@dataclass
class Cli:
    """The `duohuo` command against one mesh."""

    state: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, "--state", str(self.state), *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "DUOHUO_PASSWORD": PASSWORD, **environment},
        )

    def json(self, *arguments: str, **environment: str) -> Any:
        """The command's JSON; the test fails if the command does."""
        done = self.run(*arguments, "-o", "json", **environment)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def refused(self, *arguments: str) -> dict[str, Any]:
        """The error of a command that must fail."""
        done = self.run(*arguments, "-o", "json")
        assert done.returncode == 1, f"{arguments}: {done.stdout}{done.stderr}"
        error: dict[str, Any] = json.loads(done.stdout)["error"]
        return error


@dataclass
class RunningMesh:
    """A `duohuo up` and the command line for it."""

    process: subprocess.Popen[str]
    cli: Cli

    @property
    def described(self) -> dict[str, Any]:
        """What mesh.json says now."""
        found: dict[str, Any] = json.loads((self.cli.state / "mesh.json").read_text())
        return found

    def pids(self) -> list[int]:
        return [
            pid for center in self.described["centers"].values() for pid in center["pids"].values()
        ]

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


def start_mesh(
    state: Path, *arguments: str, port_base: int | None = None, said: Path | None = None
) -> RunningMesh:
    """Starts a mesh and waits until it says that it is up. What it says later is appended to `said`."""
    port_base = port_base or free_port_base()
    with ExitStack() as opened:
        process = subprocess.Popen(
            [PROGRAM, "--state", str(state), "up", "--port-base", str(port_base), *arguments],
            stdout=subprocess.PIPE,
            stderr=None if said is None else opened.enter_context(said.open("a")),
            text=True,
        )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    if "is up" not in line and not line.startswith("{"):
        process.kill()
        process.wait()
        pytest.fail(f"`duohuo up` did not come up: {line!r}")
    return RunningMesh(process, Cli(state))


def free_port_base() -> int:
    """A base whose blocks for three centers are free. Blocks are tried in an order of this process."""
    for attempt in range(200):
        # Below the ports that the system gives to connections, which come and go.
        base = 10_000 + (os.getpid() * 7 + attempt * 13) % 55 * 400
        ports = [base + 81, *(base + 100 * i + k for i in (1, 2, 3) for k in range(60))]
        if all(_is_free(port) for port in ports):
            return base
    pytest.fail("no free ports")


def wait_until(condition: Any, within_s: float = 20.0) -> None:
    """Asks a running mesh again and again until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or after
        return False
    # A zombie whose parent is gone will be reaped; it no longer runs.
    return state != "Z"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh of two centers for all tests of a module, each with users of its own."""
    running = start_mesh(tmp_path_factory.mktemp("mesh"))
    yield running
    assert running.stop() == 0
