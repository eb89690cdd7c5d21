"""Starting, stopping and starting again: what `duohuo up` promises."""

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from ops.drill import identifier_of
from tests.integration.conftest import (
    PROGRAM,
    free_port_base,
    is_alive,
    start_mesh,
    wait_until,
)


def test_data_survives_ctrl_c_and_a_new_start(tmp_path: Path) -> None:
    running = start_mesh(tmp_path / "state")
    user = identifier_of("a", ["a", "b"])
    running.cli.json("register", user)
    running.cli.json("fund", user, "70")
    running.cli.json("login", user)
    pids = running.pids()
    assert running.stop() == 0
    assert not any(map(is_alive, pids))
    assert not (tmp_path / "state" / "mesh.json").exists()

    again = start_mesh(tmp_path / "state")
    try:
        assert again.cli.json("balance", user)["balance"]["minor_units"] == 70
        assert again.cli.json("verify")["passed"] is True
    finally:
        assert again.stop() == 0


def test_a_killed_supervisor_leaves_no_orphans(tmp_path: Path) -> None:
    running = start_mesh(tmp_path / "state")
    pids = running.pids()
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_mesh_with_every_role_in_its_own_process_passes_the_drill(tmp_path: Path) -> None:
    running = start_mesh(tmp_path / "state", "--split")
    try:
        pids = running.described["centers"]["a"]["pids"]
        assert set(pids) == {"nats", "gateway", "account", "session", "transfer"}
        assert running.cli.json("drill", "center-loss")["passed"] is True
    finally:
        assert running.stop() == 0


def test_wiping_jetstream_loses_nothing_and_needs_nobody(tmp_path: Path) -> None:
    running = start_mesh(tmp_path / "state")
    try:
        payer, payee = (identifier_of(home, ["a", "b"]) for home in ("a", "b"))
        for user in (payer, payee):
            running.cli.json("register", user)
            running.cli.json("login", user)
        running.cli.json("fund", payer, "100")
        running.cli.json("transfer", payee, "10", "--from", payer)
        for center in ("a", "b"):
            running.cli.json("center", "kill", center)
            shutil.rmtree(_jetstream(tmp_path / "state" / center))
        for center in ("a", "b"):
            running.cli.json("center", "start", center)
        running.cli.json("login", payer)
        running.cli.json("transfer", payee, "20", "--from", payer)
        report = running.cli.json("verify", "--wait-s", "30")
        assert report["passed"] is True
    finally:
        running.stop()


def test_a_port_in_use_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    base = free_port_base()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", base + 100))
        taken.listen()
        done = _up(tmp_path / "state", base)
    assert done.returncode == 1
    assert str(base + 100) in done.stderr
    assert "--port-base" in done.stderr


def test_a_second_mesh_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    running = start_mesh(tmp_path / "state")
    try:
        done = _up(tmp_path / "state", free_port_base())
        assert done.returncode == 1
        assert "already" in done.stderr
    finally:
        assert running.stop() == 0


def test_commands_without_a_mesh_say_how_to_start_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "--state", str(tmp_path / "none"), "status"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "up" in done.stderr


def test_a_stop_signal_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [PROGRAM, "--state", str(tmp_path / "s"), "up", "--port-base", str(free_port_base())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until((tmp_path / "s" / "a" / "nats.log").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    assert not (tmp_path / "s" / "mesh.json").exists()


@pytest.mark.parametrize("centers", ["a,a", "A", "a,b,"])
def test_bad_center_names_are_refused(tmp_path: Path, centers: str) -> None:
    done = _up(tmp_path / "state", free_port_base(), "--centers", centers)
    assert done.returncode == 1
    assert "error:" in done.stderr


def test_mesh_json_lists_every_endpoint_and_pid(tmp_path: Path) -> None:
    running = start_mesh(tmp_path / "state", "-o", "json")
    try:
        described = running.described
        assert described["console"] is None
        center = described["centers"]["a"]
        assert {"gateway", "operator", "nats", "pids"} <= set(center)
        assert all(is_alive(pid) for pid in running.pids())
        assert json.dumps(described["links"])
    finally:
        assert running.stop() == 0


def _jetstream(center: Path) -> Path:
    """The directory in which a center's NATS server keeps its streams."""
    (found,) = center.rglob("jetstream")
    return found


def _up(state: Path, port_base: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PROGRAM, "--state", str(state), "up", "--port-base", str(port_base), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
