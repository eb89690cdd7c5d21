"""`duohuo up`'s engine with real NATS servers, real processes and real links.

The services are a stand-in: a process that takes the real settings, listens where it should, says
that it is ready and waits for SIGTERM.
"""

import asyncio
import os
import random
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from structlog.testing import capture_logs

from duohuo.internal.v1.log_pb2 import LogEntry
from ops import mesh_file, supervisor
from ops.control import ControlError, request
from ops.local_config import StartError
from ops.mesh_file import MeshView, NoMesh
from ops.ports import plan
from ops.serve import nats_access_of
from ops.supervisor import Supervisor
from runtime import operators
from runtime.config import load
from sync_bus.bus import BusFault
from sync_bus.jetstream import JetStreamBus

STAND_IN = """
import json, os, pathlib, signal, socket, sys, time, tomllib
settings = tomllib.loads(pathlib.Path(sys.argv[-1]).read_text("utf-8"))
me = settings["center"] + "/" + settings["roles"][0]
if os.environ.get("STAND_IN_FAILS") == me:
    sys.exit("no \\x1b[31mfuel\\x1b[0m left")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
names = ["mesh_listen"] + ["public_listen", "operator_listen"] * ("gateway" in settings["roles"])
listening = []
for name in names:
    host, port = settings[name].rsplit(":", 1)
    listening.append(socket.create_server((host, int(port))))
print("a line that is not JSON")
if os.environ.get("STAND_IN_HANGS") != me:
    print(json.dumps({"ready": True, "pid": os.getpid()}), flush=True)
while True:
    time.sleep(60)
"""
MAIN = """
import asyncio, pathlib, sys
from ops.local_config import StartError
from ops.supervisor import run
def announce(mesh):
    print("up", *(pid for center in mesh.centers.values() for pid in center.pids.values()), flush=True)
try:
    code = asyncio.run(run(["a", "b"], pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0, False, announce,
                           serve_command=[sys.executable, sys.argv[3]]))
except StartError as error:
    print(error)
    code = 1
sys.exit(code)
"""


async def eventually(
    holds: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 15
) -> None:
    """Waits until it holds, at most this long."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = holds()
        if result if isinstance(result, bool) else await result:
            return
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """False for a process that has ended, whether or not its parent has noticed."""
    try:
        os.kill(pid, 0)
        return state_of(pid) != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def state_of(pid: int) -> str:
    """The letter that `ps` shows; only on Linux."""
    if not Path("/proc/self/stat").exists():
        return "?"
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def is_stopped(pid: int) -> bool:
    return state_of(pid) == "T"


def accepts(address: str) -> bool:
    host, _, port = address.removeprefix("tls://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def revived(meshes: "Meshes", center: str, before: int) -> bool:
    """Does another NATS server than this one serve the center?"""
    found = meshes.read().centers[center]
    return found.pids.get("nats", before) != before and accepts(found.nats)


def pids(mesh: MeshView) -> list[int]:
    return [pid for center in mesh.centers.values() for pid in center.pids.values()]


@pytest.fixture
def port_base() -> int:
    """A free block, from a range of this test worker's own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    blocks = list(range(12_000 + 2_400 * worker, 14_400 + 2_400 * worker, 400))
    random.shuffle(blocks)
    for block in blocks:
        wanted = plan(["a", "b", "c"], block).listening(split=True)
        try:
            for port, _ in wanted:
                with closing(socket.socket()) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return block
    pytest.fail("no free ports")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    """The command to run instead of `duohuo serve`."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return [sys.executable, "-S", str(script)]


class Meshes:
    """Makes meshes, and stops those that the test leaves running."""

    def __init__(self, state_dir: Path, port_base: int, serve_command: list[str]) -> None:
        self.said: list[str] = []
        self.state_dir = state_dir
        self.port_base = port_base
        self._serve_command = serve_command
        self._made: list[Supervisor] = []

    def make(
        self, *centers: str, split: bool = False, wan_latency_ms: int = 0, port_base: int = 0
    ) -> Supervisor:
        made = Supervisor(
            centers or ("a", "b"),
            self.state_dir,
            port_base or self.port_base,
            wan_latency_ms,
            split=split,
            serve_command=self._serve_command,
            say=self.said.append,
        )
        self._made.append(made)
        return made

    async def stop(self) -> None:
        for made in self._made:
            await made.stop()

    def read(self) -> MeshView:
        return mesh_file.read(self.state_dir)

    async def ask(self, action: str, **arguments: object) -> dict[str, Any]:
        """Commands the mesh as the `duohuo` command does."""
        return await asyncio.to_thread(request, self.read(), action, **arguments)


@pytest.fixture
async def meshes(state_dir: Path, port_base: int, stand_in: list[str]) -> AsyncIterator[Meshes]:
    made = Meshes(state_dir, port_base, stand_in)
    yield made
    await made.stop()


@asynccontextmanager
async def bus(meshes: Meshes, center: str, peers: list[str]) -> AsyncIterator[JetStreamBus]:
    """The account service's bus at a center."""
    access = nats_access_of(meshes.state_dir / center / "center.toml")
    try:
        yield JetStreamBus(access, "account", peers)
    finally:
        await access.close()


class Receiver:
    """Takes what arrives at a center, as the replicator does; notes when."""

    def __init__(self, bus_there: JetStreamBus, source: str) -> None:
        self.arrived: dict[int, float] = {}
        self.order: list[int] = []
        self._bus = bus_there
        self._source = source
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Receiver":
        self._task = asyncio.create_task(self._receive())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def wait_for(self, seq: int, timeout_s: float = 15) -> None:
        await eventually(lambda: seq in self.arrived, f"entry {seq} arrives", timeout_s)

    async def _receive(self) -> None:
        while True:
            with suppress(BusFault):
                async with aclosing(self._bus.deliveries(self._source)) as deliveries:  # type: ignore[type-var]
                    async for delivery in deliveries:
                        for entry in delivery.entries:
                            self.arrived.setdefault(entry.seq, time.monotonic())
                            self.order.append(entry.seq)
                        await delivery.acknowledge()
            await asyncio.sleep(0.05)


async def publish(at: JetStreamBus, *seqs: int) -> None:
    """As the replicator does: until the bus has taken it."""

    async def taken() -> bool:
        try:
            await at.last_published("accounts")
            await at.publish(
                "accounts", [LogEntry(topic="accounts", seq=seq, record=b"") for seq in seqs]
            )
        except BusFault:
            return False
        return True

    await eventually(taken, f"entries {seqs} are published")


class TestUp:
    async def test_everything_is_there_and_said_in_mesh_json(self, meshes: Meshes) -> None:
        started = time.monotonic()
        mesh = await meshes.make().start()
        assert time.monotonic() - started < 10
        base = meshes.port_base
        assert meshes.read() == mesh
        assert mesh.supervisor == f"127.0.0.1:{base + 81}"
        assert mesh.centers["a"].gateway == f"127.0.0.1:{base + 100}"
        assert mesh.centers["b"].gateway == f"127.0.0.1:{base + 200}"
        assert {name: link.state for name, link in mesh.links.items()} == {"a-b": "up"}
        for center in mesh.centers.values():
            assert center.state == "running"
            assert set(center.pids) == {"nats", "serve"}
            assert all(accepts(at) for at in (center.gateway, center.operator, center.nats))
        assert all(is_alive(pid) for pid in pids(mesh))

    async def test_only_its_owner_can_read_it(self, meshes: Meshes) -> None:
        await meshes.make().start()
        for path in [meshes.state_dir, *meshes.state_dir.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert meshes.read().control_token not in repr(meshes.read())

    async def test_the_services_get_settings_they_accept(self, meshes: Meshes) -> None:
        await meshes.make("a", "b", "c").start()
        settings = load(meshes.state_dir / "b" / "center.toml")
        assert settings.center == "b"
        assert settings.roles == ["gateway", "account", "session", "transfer"]
        assert settings.peer_addresses == {
            "a": f"127.0.0.1:{meshes.port_base + 220}",
            "c": f"127.0.0.1:{meshes.port_base + 222}",
        }
        assert settings.operators_file is not None
        (operator,) = operators.parse(settings.operators_file.read_text())
        token = mesh_file.operator_token(meshes.state_dir)
        assert operator.hashed == operators.token_hash(token)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    async def test_the_environment_cannot_override_the_mesh_or_leak_a_password(
        self, meshes: Meshes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DUOHUO_CENTER", "z")
        monkeypatch.setenv("DUOHUO_PASSWORD", "a user's")
        monkeypatch.setenv("DUOHUO_LOG_LEVEL", "debug")
        mesh = await meshes.make("a").start()
        for pid in pids(mesh):
            inherited = environment_of(pid)
            names = {variable.partition(b"=")[0] for variable in inherited}
            assert names.isdisjoint({b"DUOHUO_CENTER", b"DUOHUO_PASSWORD"})
            assert b"DUOHUO_LOG_LEVEL=debug" in inherited

    async def test_split_gives_every_role_its_process(self, meshes: Meshes) -> None:
        mesh = await meshes.make(split=True).start()
        roles = {"gateway", "account", "session", "transfer"}
        for name, center in mesh.centers.items():
            assert set(center.pids) == {"nats"} | roles
            for role in roles:
                settings = load(meshes.state_dir / name / f"{role}.toml")
                assert settings.roles == [role]
                assert set(settings.role_addresses) == roles - {role}
                assert accepts(settings.mesh_listen)

    async def test_stopping_leaves_nothing_and_starting_again_keeps_all(
        self, meshes: Meshes
    ) -> None:
        first = meshes.make()
        mesh = await first.start()
        token = mesh_file.operator_token(meshes.state_dir)
        async with bus(meshes, "a", ["b"]) as at_a:
            await publish(at_a, 1, 2, 3)
        await first.stop()
        assert not any(is_alive(pid) for pid in pids(mesh))
        with pytest.raises(NoMesh, match="no mesh is running on"):
            meshes.read()

        await meshes.make().start()
        assert mesh_file.operator_token(meshes.state_dir) == token
        async with bus(meshes, "a", ["b"]) as at_a:
            last = await at_a.last_published("accounts")
            assert last is not None
            assert last.seq == 3

    async def test_a_request_can_stop_it(self, meshes: Meshes) -> None:
        mesh = meshes.make()
        await mesh.start()
        asking = asyncio.create_task(meshes.ask("stop"))
        await mesh.asked_to_stop.wait()
        await mesh.stop()
        await asking
        await meshes.make().start()

    async def test_nobody_needs_to_read_the_announcement(
        self, meshes: Meshes, stand_in: list[str]
    ) -> None:
        def announce(_: MeshView) -> None:
            raise BrokenPipeError

        running = asyncio.create_task(
            supervisor.run(
                ["a"],
                meshes.state_dir,
                meshes.port_base,
                0,
                False,
                announce,
                serve_command=stand_in,
            )
        )
        await eventually((meshes.state_dir / "mesh.json").exists, "the mesh is up")
        assert (await meshes.ask("center pause", center="a"))["centers"] == {"a": "paused"}
        await meshes.ask("stop")
        assert await running == 0


class TestStartErrors:
    async def test_a_port_in_use_is_named(self, meshes: Meshes) -> None:
        port = meshes.port_base + 200
        with (
            closing(socket.create_server(("127.0.0.1", port))),
            pytest.raises(StartError, match=f"port {port}, for the gateway of center b, is in use"),
        ):
            await meshes.make().start()

    async def test_one_mesh_per_directory(self, meshes: Meshes) -> None:
        await meshes.make().start()
        other = meshes.make(port_base=meshes.port_base + 100)
        with pytest.raises(StartError, match="a mesh is already running on"):
            await other.start()
        await other.stop()
        assert (await meshes.ask("center pause", center="a"))["centers"]["a"] == "paused"

    async def test_a_directory_that_cannot_be_made(self, meshes: Meshes) -> None:
        meshes.state_dir.write_text("not a directory")
        with pytest.raises(StartError, match=r"cannot keep the mesh's state in .* --state"):
            await meshes.make().start()

    async def test_a_part_of_it_that_is_in_the_way(self, meshes: Meshes) -> None:
        meshes.state_dir.mkdir()
        (meshes.state_dir / "b").write_text("not a directory")
        with pytest.raises(StartError, match="cannot prepare the mesh in"):
            await meshes.make().start()

    @pytest.mark.parametrize("split", [False, True], ids=["one", "split"])
    async def test_a_service_that_ends_takes_the_rest_with_it(
        self, meshes: Meshes, monkeypatch: pytest.MonkeyPatch, split: bool
    ) -> None:
        monkeypatch.setenv("STAND_IN_FAILS", "b/gateway")
        mesh = meshes.make(split=split)
        with pytest.raises(StartError, match=r"center b ended; the end of (?s:.)*no \[31mfuel"):
            await mesh.start()
        await mesh.stop()
        for center in mesh.view().centers.values():
            assert center.pids == {}
            assert not accepts(center.nats)
        assert not (meshes.state_dir / "mesh.json").exists()

    async def test_a_service_that_never_is_ready(
        self, meshes: Meshes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STAND_IN_HANGS", "a/gateway")
        monkeypatch.setattr(supervisor, "SERVE_READY_TIMEOUT_S", 1.0)
        with pytest.raises(StartError, match="center a was not ready in time"):
            await meshes.make().start()

    async def test_a_command_that_does_not_exist(self, meshes: Meshes) -> None:
        meshes._serve_command[0] = "/nowhere/python"
        with pytest.raises(StartError, match="cannot run serve of center"):
            await meshes.make().start()

    @pytest.mark.parametrize(
        ("centers", "wan_latency_ms", "problem"),
        [(("A",), 0, "not a center's name"), (("a", "b"), -5, "a delay must be")],
    )
    async def test_what_makes_no_sense(
        self, meshes: Meshes, centers: tuple[str, ...], wan_latency_ms: int, problem: str
    ) -> None:
        with pytest.raises(StartError, match=problem):
            meshes.make(*centers, wan_latency_ms=wan_latency_ms)

    async def test_what_a_dead_mesh_left_behind_is_replaced(self, meshes: Meshes) -> None:
        first = meshes.make("a")
        left = await first.start()
        await first.stop()
        gone = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
        await gone.wait()
        mesh_file.write(
            meshes.state_dir,
            MeshView(left.supervisor, gone.pid, "old", None, left.centers, left.links),
        )
        with pytest.raises(NoMesh, match="is gone, it did not stop by itself"):
            meshes.read()
        await meshes.make("a").start()
        assert meshes.read().supervisor_pid == os.getpid()

    async def test_a_file_that_is_not_a_mesh(self, meshes: Meshes) -> None:
        meshes.state_dir.mkdir()
        for text in ("", "[]", "{}", '{"supervisor_pid": 1, "centers": 5}'):
            (meshes.state_dir / "mesh.json").write_text(text)
            with pytest.raises(NoMesh, match="does not describe a mesh"):
                meshes.read()


class TestCenters:
    async def test_kill_and_start(self, meshes: Meshes) -> None:
        before = await meshes.make().start()
        await meshes.ask("center kill", center="a")
        killed = meshes.read()
        assert (killed.centers["a"].state, killed.centers["b"].state) == ("killed", "running")
        assert killed.centers["a"].pids == {}
        assert not any(is_alive(pid) for pid in before.centers["a"].pids.values())
        assert all(is_alive(pid) for pid in before.centers["b"].pids.values())

        await meshes.ask("center start", center="a")
        after = meshes.read().centers["a"]
        assert after.state == "running"
        assert set(after.pids.values()).isdisjoint(before.centers["a"].pids.values())
        assert accepts(after.gateway)
        assert accepts(after.nats)
        assert meshes.said == []

    async def test_stop_lets_processes_end_by_themselves(self, meshes: Meshes) -> None:
        before = await meshes.make().start()
        await meshes.ask("center stop", center="b")
        assert meshes.read().centers["b"].state == "stopped"
        assert not any(is_alive(pid) for pid in before.centers["b"].pids.values())
        assert "Server Exiting" in (meshes.state_dir / "b" / "nats.log").read_text()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    async def test_pause_and_resume(self, meshes: Meshes) -> None:
        mesh = await meshes.make().start()
        there = list(mesh.centers["a"].pids.values())
        await meshes.ask("center pause", center="a")
        assert meshes.read().centers["a"].state == "paused"
        await eventually(lambda: all(is_stopped(pid) for pid in there), "all of a stops")
        await meshes.ask("center resume", center="a")
        await eventually(lambda: not any(is_stopped(pid) for pid in there), "all of a goes on")

    async def test_a_paused_center_can_be_stopped(self, meshes: Meshes) -> None:
        await meshes.make().start()
        await meshes.ask("center pause", center="a")
        await meshes.ask("center stop", center="a")
        assert meshes.read().centers["a"].state == "stopped"

    async def test_a_process_that_dies_is_reported_and_can_be_started_again(
        self, meshes: Meshes
    ) -> None:
        mesh = await meshes.make().start()
        nats, serve = (mesh.centers["a"].pids[name] for name in ("nats", "serve"))
        os.kill(serve, signal.SIGKILL)
        await eventually(lambda: meshes.read().centers["a"].state == "failed", "a has failed")
        assert meshes.read().centers["a"].pids == {"nats": nats}
        assert len(meshes.said) == 1
        assert "serve of center a ended by itself" in meshes.said[0]
        assert str(meshes.state_dir / "a" / "serve.log") in meshes.said[0]

        await meshes.ask("center start", center="a")
        again = meshes.read().centers["a"]
        assert again.state == "running"
        assert again.pids["nats"] == nats
        assert again.pids["serve"] != serve

    async def test_nats_that_dies_comes_back_without_anybody(self, meshes: Meshes) -> None:
        mesh = await meshes.make().start()
        first, serve = (mesh.centers["a"].pids[name] for name in ("nats", "serve"))
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: revived(meshes, "a", first), "NATS is back")
        assert meshes.read().centers["a"].state == "running"
        assert meshes.read().centers["a"].pids["serve"] == serve
        (said,) = meshes.said
        assert "nats of center a ended by itself and is started again" in said
        assert str(meshes.state_dir / "a" / "nats.log") in said

        second = meshes.read().centers["a"].pids["nats"]
        config = meshes.state_dir / "a" / "nats.conf"
        config.rename(config.with_suffix(".away"))  # it cannot start now
        os.kill(second, signal.SIGKILL)
        await eventually(lambda: "nats of center a ended; the end of" in meshes.said[-1], "told")
        config.with_suffix(".away").rename(config)
        await eventually(lambda: revived(meshes, "a", second), "NATS is back once it can start")

    async def test_nats_that_dies_in_a_paused_center_comes_back_with_it(
        self, meshes: Meshes
    ) -> None:
        mesh = await meshes.make().start()
        first = mesh.centers["a"].pids["nats"]
        await meshes.ask("center pause", center="a")
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: not is_alive(first), "NATS is dead")
        assert meshes.said == []
        await meshes.ask("center resume", center="a")
        await eventually(lambda: revived(meshes, "a", first), "NATS is back")

    async def test_nats_stays_down_in_a_center_that_is_stopped_or_killed(
        self, meshes: Meshes
    ) -> None:
        await meshes.make().start()
        for verb in ("kill", "stop"):
            await meshes.ask(f"center {verb}", center="a")
            assert meshes.read().centers["a"].pids == {}
            await meshes.ask("center start", center="a")
        assert meshes.said == []

    async def test_a_center_that_does_not_start_again_says_why(self, meshes: Meshes) -> None:
        await meshes.make().start()
        await meshes.ask("center kill", center="a")
        taken = socket.create_server(("127.0.0.1", meshes.port_base + 100))
        with closing(taken), pytest.raises(ControlError, match="Address already in use"):
            await meshes.ask("center start", center="a")
        assert meshes.read().centers["a"].state == "failed"
        assert meshes.read().centers["a"].pids == {}
        await meshes.ask("center start", center="a")
        assert meshes.read().centers["a"].state == "running"

    @pytest.mark.parametrize(
        ("action", "arguments", "problem"),
        [
            ("center start", {"center": "a"}, "cannot start center a: it is running"),
            ("center resume", {"center": "a"}, "cannot resume center a: it is running"),
            ("center kill", {"center": "z"}, "there is no center z; there is a, b"),
            ("center kill", {"center": ["a"]}, "there is no center"),
            ("center kill", {}, "`center kill` needs 'center'"),
            ("center eat", {"center": "a"}, "there is no action `center eat`"),
            ("link cut", {"first": "a", "second": "a"}, "there is no link a-a; there is a-b"),
            ("link delay", {"first": "a", "second": "b", "delay_ms": -1}, "a delay must be 0 to"),
            ("link delay", {"first": "a", "second": "b"}, "`link delay` needs 'delay_ms'"),
            ("dance", {}, "there is no action `dance`"),
        ],
    )
    async def test_what_cannot_be_done_is_said(
        self, meshes: Meshes, action: str, arguments: dict[str, object], problem: str
    ) -> None:
        await meshes.make().start()
        with pytest.raises(ControlError, match=problem):
            await meshes.ask(action, **arguments)
        assert all(center.state == "running" for center in meshes.read().centers.values())


class TestControl:
    async def test_strangers_are_refused(self, meshes: Meshes) -> None:
        mesh = await meshes.make("a").start()
        stranger = MeshView(
            mesh.supervisor, mesh.supervisor_pid, "guess", None, mesh.centers, mesh.links
        )
        with pytest.raises(ControlError, match="the token is not this mesh's"):
            await asyncio.to_thread(request, stranger, "stop")

    @pytest.mark.parametrize(
        "line",
        [
            b"\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"[1]\n",
            b"x" * 100_000,
            b"[" * 10_000 + b"\n",
            b"\xff\n",
        ],
        ids=["empty", "http", "list", "endless", "deep", "binary"],
    )
    async def test_nonsense_is_refused(self, meshes: Meshes, line: bytes) -> None:
        mesh = await meshes.make("a").start()
        host, _, port = mesh.supervisor.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        with suppress(ConnectionError):
            writer.write(line)
            async with asyncio.timeout(5):
                answer = await reader.read()
            assert b"that is not a request" in answer
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        assert (await meshes.ask("center pause", center="a"))["centers"] == {"a": "paused"}

    async def test_a_supervisor_that_is_gone(self, meshes: Meshes) -> None:
        supervised = meshes.make("a")
        mesh = await supervised.start()
        await supervised.stop()
        with pytest.raises(ControlError, match="does not answer on"):
            await asyncio.to_thread(request, mesh, "stop")


class TestLinks:
    async def test_entries_cross_stop_at_a_cut_and_arrive_after_it(self, meshes: Meshes) -> None:
        await meshes.make().start()
        async with AsyncExitStack() as stack:
            at_a = await stack.enter_async_context(bus(meshes, "a", ["b"]))
            at_b = await stack.enter_async_context(bus(meshes, "b", ["a"]))
            b_from_a = await stack.enter_async_context(Receiver(at_b, "a"))
            a_from_b = await stack.enter_async_context(Receiver(at_a, "b"))
            await publish(at_a, 1)
            await publish(at_b, 1)
            await b_from_a.wait_for(1)
            await a_from_b.wait_for(1)

            await meshes.ask("link cut", first="a", second="b")
            assert meshes.read().links["a-b"].state == "cut"
            await publish(at_a, 2, 3)
            await publish(at_b, 2)
            last = await at_a.last_published("accounts")
            assert last is not None
            assert last.seq == 3
            # As long as a healthy link takes many times over.
            with pytest.raises(AssertionError, match="entry 2 arrives"):
                await b_from_a.wait_for(2, timeout_s=1)
            assert 2 not in a_from_b.arrived

            await meshes.ask("link heal", first="b", second="a")
            await b_from_a.wait_for(3, timeout_s=30)
            await a_from_b.wait_for(2, timeout_s=30)
            assert b_from_a.order == [1, 2, 3]
            assert a_from_b.order == [1, 2]

    async def test_gRPC_links_lead_to_the_peers_mesh_port(self, meshes: Meshes) -> None:
        await meshes.make().start()
        at_b = load(meshes.state_dir / "a" / "center.toml").peer_addresses["b"]
        reader, writer = await asyncio.open_connection(*at_b.split(":"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read()
        await meshes.ask("link cut", first="a", second="b")
        with suppress(ConnectionError):
            async with asyncio.timeout(5):
                assert await reader.read() == b""
        writer.close()

    async def test_a_slow_link_makes_entries_late(self, meshes: Meshes) -> None:
        await meshes.make(wan_latency_ms=100).start()
        assert meshes.read().links["a-b"].delay_ms == 100
        async with AsyncExitStack() as stack:
            at_a = await stack.enter_async_context(bus(meshes, "a", ["b"]))
            at_b = await stack.enter_async_context(bus(meshes, "b", ["a"]))
            received = await stack.enter_async_context(Receiver(at_b, "a"))
            await publish(at_a, 1)
            await received.wait_for(1)
            sent = time.monotonic()
            await publish(at_a, 2)
            await received.wait_for(2)
            assert received.arrived[2] - sent >= 0.1
            await meshes.ask("link delay", first="a", second="b", delay_ms=300)
            sent = time.monotonic()
            await publish(at_a, 3)
            await received.wait_for(3)
            assert received.arrived[3] - sent >= 0.3

    async def test_a_killed_center_catches_up(self, meshes: Meshes) -> None:
        await meshes.make().start()
        async with AsyncExitStack() as stack:
            at_a = await stack.enter_async_context(bus(meshes, "a", ["b"]))
            at_b = await stack.enter_async_context(bus(meshes, "b", ["a"]))
            received = await stack.enter_async_context(Receiver(at_b, "a"))
            await publish(at_a, 1)
            await received.wait_for(1)
            await meshes.ask("center kill", center="b")
            await publish(at_a, 2)
            await meshes.ask("center start", center="b")
            await received.wait_for(2, timeout_s=30)
            await meshes.ask("center kill", center="a")
            await meshes.ask("center start", center="a")
            await publish(at_a, 3)
            await received.wait_for(3, timeout_s=30)

    async def test_three_centers_hear_each_other(self, meshes: Meshes) -> None:
        names = ["a", "b", "c"]
        await meshes.make(*names).start()
        async with AsyncExitStack() as stack:
            buses = {
                name: await stack.enter_async_context(
                    bus(meshes, name, [peer for peer in names if peer != name])
                )
                for name in names
            }
            receivers = [
                await stack.enter_async_context(Receiver(buses[to], source))
                for to in names
                for source in names
                if to != source
            ]
            for name in names:
                await publish(buses[name], 1, 2)
            for receiver in receivers:
                await receiver.wait_for(2)
                assert receiver.order == [1, 2]

    async def test_services_cannot_destroy_or_publish_as_others(self, meshes: Meshes) -> None:
        await meshes.make().start()
        access = nats_access_of(meshes.state_dir / "a" / "center.toml")
        try:
            await JetStreamBus(access, "account", ["b"]).last_published("accounts")
            own = await access.jetstream("EV")
            for attack in (own.purge_stream("OUT_a"), own.delete_stream("OUT_a")):
                with pytest.raises((nats.errors.Error, TimeoutError)):
                    await attack
            with pytest.raises((nats.errors.Error, TimeoutError)):
                await own.publish("ev.b.account.accounts", b"forged", timeout=0.5)
            assert (await own.stream_info("OUT_a")).state.messages == 0
        finally:
            await access.close()

    async def test_services_hear_only_what_is_theirs_and_it_is_logged(self, meshes: Meshes) -> None:
        await meshes.make().start()
        access = nats_access_of(meshes.state_dir / "a" / "center.toml")
        try:
            own = await access.jetstream("EV")
            client = access.connections["EV"].client
            with capture_logs() as logged:
                await client.subscribe(">")
                while not logged:
                    await client.flush()
            assert logged[0]["event"] == "NATS does not allow this"
            with pytest.raises((nats.errors.Error, TimeoutError)):
                await own.publish("ev.a.account.accounts", b"", headers={"Nats-Rollup": "all"})
        finally:
            await access.close()


@pytest.fixture
async def main(
    state_dir: Path, port_base: int, stand_in: list[str]
) -> AsyncIterator[Callable[[], Awaitable[asyncio.subprocess.Process]]]:
    """Starts a supervisor in its own process."""
    started: list[asyncio.subprocess.Process] = []

    async def start() -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            MAIN,
            str(state_dir),
            str(port_base),
            stand_in[-1],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def pids_of(process: asyncio.subprocess.Process) -> list[int]:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        word, *numbers = (await process.stdout.readline()).split()
    assert word == b"up"
    return [int(number) for number in numbers]


class TestProcess:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    async def test_a_signal_stops_everything(
        self,
        main: Callable[[], Awaitable[asyncio.subprocess.Process]],
        state_dir: Path,
        number: signal.Signals,
    ) -> None:
        process = await main()
        children = await pids_of(process)
        assert len(children) == 4
        process.send_signal(number)
        _, errors = await asyncio.wait_for(process.communicate(), 15)
        assert (process.returncode, errors) == (0, b"")
        assert not any(is_alive(pid) for pid in children)
        assert not (state_dir / "mesh.json").exists()

    @pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' parent-death signal")
    async def test_kill_9_leaves_no_orphans_and_the_mesh_starts_again(
        self, main: Callable[[], Awaitable[asyncio.subprocess.Process]], state_dir: Path
    ) -> None:
        process = await main()
        children = await pids_of(process)
        process.kill()
        await process.communicate()
        await eventually(lambda: not any(is_alive(pid) for pid in children), "all children end")
        with pytest.raises(NoMesh, match="is gone"):
            mesh_file.read(state_dir)
        again = await main()
        assert len(await pids_of(again)) == 4
        assert mesh_file.read(state_dir).supervisor_pid == again.pid
        again.terminate()
        await asyncio.wait_for(again.communicate(), 15)

    async def test_a_signal_while_it_starts_stops_what_was_started(
        self,
        main: Callable[[], Awaitable[asyncio.subprocess.Process]],
        state_dir: Path,
        port_base: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("STAND_IN_HANGS", "b/gateway")
        process = await main()
        gateway = f"127.0.0.1:{port_base + 200}"
        await eventually(lambda: accepts(gateway), "the stand-in listens")
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), 15)
        assert process.returncode == 130
        assert not accepts(gateway)
        assert not (state_dir / "mesh.json").exists()

    async def test_what_goes_wrong_is_said_with_exit_code_1(
        self,
        main: Callable[[], Awaitable[asyncio.subprocess.Process]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("STAND_IN_FAILS", "a/gateway")
        process = await main()
        output, errors = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, errors) == (1, b"")
        assert b"serve of center a ended" in output
