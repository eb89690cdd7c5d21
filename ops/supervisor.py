"""Runs a whole mesh on this machine: NATS servers, services, and the links between the centers.

Read it from the bottom: `run` is what `duohuo up` does, `Supervisor` holds the mesh, `_Center` the
processes of one center (each is a `Child`). No child outlives the supervisor, whatever ends it.
"""

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ops import mesh_file
from ops.child import Child
from ops.control import Answer, ControlError, ControlServer
from ops.links import Links
from ops.local_config import (
    StartError,
    check_ports,
    config_name,
    environment,
    find_nats_server,
    locked,
    nats_certificate_files,
    roles_by_process,
    settings,
    write_config,
    write_configs,
)
from ops.mesh_file import CenterState, CenterView, MeshView
from ops.ports import HOST, CenterPorts, address, plan
from runtime.credentials import stamp_of

NATS_READY_TIMEOUT_S = 10.0
NATS_RETRY_DELAY_S_MAX = 10.0
NATS_FILES_CHECK_INTERVAL_S = 1.0
SERVE_READY_TIMEOUT_S = 20.0
# -P: a directory `ops` or `runtime` where the user happens to be must not be taken for ours.
SERVE_COMMAND = (sys.executable, "-P", "-m", "ops.main", "serve")

# What may be done to a center in which state. Whatever is not listed is refused.
_AFTER: dict[tuple[str, CenterState], CenterState] = {
    ("kill", "running"): "killed",
    ("kill", "paused"): "killed",
    ("kill", "failed"): "killed",
    ("stop", "running"): "stopped",
    ("stop", "paused"): "stopped",
    ("stop", "failed"): "stopped",
    ("start", "stopped"): "running",
    ("start", "killed"): "running",
    ("start", "failed"): "running",
    ("pause", "running"): "paused",
    ("resume", "paused"): "running",
}


def state_after(center: str, state: CenterState, verb: str) -> CenterState:
    """The state of a center after an action. Raises ControlError if that makes no sense now."""
    if (verb, state) not in _AFTER:
        raise ControlError(f"cannot {verb} center {center}: it is {state}")
    return _AFTER[verb, state]


async def _together(starts: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Waits for all; when one fails, cancels the others and raises its error."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for start in starts:
                tasks.create_task(start)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


class _Center:
    """The processes of one center, NATS first."""

    def __init__(
        self,
        name: str,
        ports: CenterPorts,
        directory: Path,
        nats_certificate_files: Sequence[Path],
        children: Sequence[Child],
        prepare: Callable[[], None],
        changed: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.state: CenterState = "stopped"
        self._ports = ports
        self._directory = directory
        self._nats_certificate_files = nats_certificate_files
        self._nats, *self._services = children
        self._prepare = prepare
        self._changed = changed
        self._say = say
        self._lock = asyncio.Lock()
        self._reviving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    def view(self) -> CenterView:
        return CenterView(
            state=self.state,
            gateway=address(self._ports.gateway),
            operator=address(self._ports.operator),
            nats=f"tls://{address(self._ports.nats)}",
            nats_monitor=f"http://{address(self._ports.nats_monitor)}",
            logs=str(self._directory),
            pids={child.name: child.pid for child in self._children() if child.pid is not None},
        )

    async def do(self, verb: str) -> None:
        """An action of `duohuo center`. Raises ControlError."""
        async with self._lock:
            after = state_after(self.name, self.state, verb)
            if verb == "start":
                try:
                    await self._start()
                except StartError as error:
                    raise ControlError(str(error)) from None
                return
            self._enter(after)
            match verb:
                case "kill":
                    self._signal(signal.SIGKILL)
                    for child in self._children():
                        await child.wait_ended()
                case "stop":
                    await self._stop()
                case "pause":
                    self._signal(signal.SIGSTOP)
                case "resume":
                    self._signal(signal.SIGCONT)
                    self._revive_nats()
            self._changed()

    async def start(self) -> None:
        """Starts what is not running and waits until it is ready. Raises StartError."""
        async with self._lock:
            await self._start()

    async def stop(self) -> None:
        """Stops whatever runs, in any state."""
        for task in (self._reviving, self._watching):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        async with self._lock:
            self._enter("stopped")
            await self._stop()

    async def _start(self) -> None:
        self._enter("starting")
        try:
            self._make_files()
            await self._start_child(self._nats)
            await _together(self._start_child(child) for child in self._services)
            for child in self._children():
                if child.pid is None:
                    raise self._start_error(child, "ended")
        except StartError:
            await self._stop()
            self._enter("failed")
            raise
        self._enter("running")

    def _make_files(self) -> None:
        """What its processes read; the disk may have been lost while they were down."""
        try:
            self._prepare()
        except OSError as error:
            raise StartError(f"cannot prepare center {self.name}: {error}") from None

    async def _start_child(self, child: Child) -> None:
        if child.pid is not None:
            return
        certificates = stamp_of(self._nats_certificate_files)
        try:
            await child.start()
        except OSError as error:
            raise StartError(f"cannot run {child.name} of center {self.name}: {error}") from None
        assert child.ended is not None  # noqa: S101 - just started
        child.ended.add_done_callback(lambda _: self._on_end(child))
        ready = asyncio.create_task(
            self._nats_answers()
            if child is self._nats
            else child.wait_ready_line(SERVE_READY_TIMEOUT_S)
        )
        try:
            await asyncio.wait([ready, child.ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if ready.done() and not ready.cancelled() and ready.exception() is None:
            if child is self._nats:
                self._watching = asyncio.create_task(self._watch_nats(child.ended, certificates))
            return
        raise self._start_error(child, "ended" if child.ended.done() else "was not ready in time")

    def _start_error(self, child: Child, what: str) -> StartError:
        return StartError(
            f"{child.name} of center {self.name} {what}; the end of {child.log}:\n"
            f"{child.last_words()}"
        )

    async def _nats_answers(self) -> None:
        async with asyncio.timeout(NATS_READY_TIMEOUT_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(HOST, self._ports.nats)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    async def _stop(self) -> None:
        """Services first: they hand over what they can while NATS is still there."""
        await asyncio.gather(*(child.stop() for child in self._services))
        await self._nats.stop()

    def _on_end(self, child: Child) -> None:
        if child is self._nats:
            self._revive_nats()
        elif self.state in ("running", "paused", "failed"):
            self._enter("failed")
            self._say(
                f"{child.name} of center {self.name} ended by itself; its log is {child.log}. "
                f"`duohuo center start {self.name}` starts it again."
            )

    def _revive_nats(self) -> None:
        """Starts NATS again if it has died: it is no record of anything, so nobody need look first.

        A service that ends by itself has a bug or a bad disk; that one waits for an operator.
        """
        if self._is_nats_missing() and (self._reviving is None or self._reviving.done()):
            self._say(
                f"nats of center {self.name} ended by itself and is started again; its log is"
                f" {self._nats.log}."
            )
            self._reviving = asyncio.create_task(self._start_nats_again())

    async def _start_nats_again(self) -> None:
        delay_s = 0.1
        while True:
            async with self._lock:
                if not self._is_nats_missing():
                    return
                try:
                    await self._start_child(self._nats)
                except StartError as error:
                    self._say(str(error))
                self._changed()
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, NATS_RETRY_DELAY_S_MAX)

    async def _watch_nats(self, ended: asyncio.Task[int], certificates: Sequence[object]) -> None:
        """Has NATS read its certificates again when they have changed, and ends it once files of its
        streams have vanished; then it is started again, without them.

        It would go on, and call itself healthy, but take nothing more from the moment it has to open
        one of them again. Nobody may delete a stream, so what was there must be there.
        """
        streams: set[str] = set()
        while not ended.done():
            now = stamp_of(self._nats_certificate_files)
            if now != certificates:
                self._nats.signal(signal.SIGHUP)
            certificates = now
            there = {path for path, _, _ in os.walk(self._directory / "nats" / "jetstream")}
            if streams - there:
                self._say(f"files of NATS of center {self.name} have vanished.")
                self._nats.signal(signal.SIGKILL)
                return
            streams = there
            await asyncio.sleep(NATS_FILES_CHECK_INTERVAL_S)

    def _is_nats_missing(self) -> bool:
        return self.state in ("running", "failed") and self._nats.pid is None

    def _enter(self, state: CenterState) -> None:
        self.state = state
        self._changed()

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children():
            child.signal(number)

    def _children(self) -> list[Child]:
        return [self._nats, *self._services]


class Supervisor:
    """A mesh on this machine. `start`, then wait for `asked_to_stop`, then `stop`."""

    def __init__(
        self,
        centers: Sequence[str],
        state_dir: Path,
        port_base: int,
        wan_latency_ms: int,
        *,
        split: bool,
        serve_command: Sequence[str] = SERVE_COMMAND,
        say: Callable[[str], None],
    ) -> None:
        try:
            self._ports = plan(centers, port_base)
            self._links = Links(self._ports, wan_latency_ms)
        except ValueError as error:
            raise StartError(str(error)) from None
        self.asked_to_stop = asyncio.Event()
        self._say = say
        self._state_dir = state_dir.absolute()
        self._split = split
        self._token = secrets.token_hex(24)
        self._control = ControlServer(self._token, self._handle)
        self._published = False
        self._operations: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._holding = ExitStack()
        nats_server = find_nats_server()
        processes = roles_by_process(split=split)
        self._centers = {}
        for name, own in self._ports.centers.items():
            directory = self._state_dir / name
            commands = {"nats": [nats_server, "-c", str(directory / "nats.conf")]} | {
                process: [*serve_command, "--config", str(directory / config_name(process))]
                for process in processes
            }
            decided = settings(name, processes, next(iter(processes)), self._ports, state_dir)
            children = [
                Child(process, command, environment(decided), directory / f"{process}.log")
                for process, command in commands.items()
            ]
            prepare = partial(write_config, self._state_dir, self._ports, name, split=split)
            self._centers[name] = _Center(
                name,
                own,
                directory,
                nats_certificate_files(self._state_dir, name),
                children,
                prepare,
                self._publish,
                say,
            )

    async def start(self) -> MeshView:
        """Starts everything and waits until it is ready. Raises StartError; then call `stop`."""
        self._holding.enter_context(locked(self._state_dir))
        check_ports(self._ports.listening(split=self._split))
        try:
            mesh_file.remove(self._state_dir)
            write_configs(self._state_dir, self._ports, split=self._split)
            await self._links.open()
            await self._control.open(self._ports.supervisor)
        except OSError as error:
            raise StartError(f"cannot prepare the mesh in {self._state_dir}: {error}") from None
        await _together(center.start() for center in self._centers.values())
        self._published = True
        self._publish()
        return self.view()

    async def stop(self) -> None:
        """Stops everything, in whatever state it is."""
        was_published, self._published = self._published, False
        for operation in self._operations:
            operation.cancel()
        await asyncio.gather(*self._operations, return_exceptions=True)
        await asyncio.gather(*(center.stop() for center in self._centers.values()))
        await self._links.close()
        if was_published:
            mesh_file.remove(self._state_dir)
        self._holding.close()
        self._stopped.set()
        await self._control.close()

    def view(self) -> MeshView:
        """The mesh as it is now."""
        return MeshView(
            supervisor=address(self._ports.supervisor),
            supervisor_pid=os.getpid(),
            control_token=self._token,
            console=None,
            centers={name: center.view() for name, center in self._centers.items()},
            links=self._links.view(),
        )

    def _publish(self) -> None:
        if self._published:
            try:
                mesh_file.write(self._state_dir, self.view())
            except OSError as error:
                self._say(f"cannot write {self._state_dir / mesh_file.FILE_NAME}: {error.strerror}")

    async def _handle(self, action: str, arguments: Mapping[str, object]) -> Answer:
        """Actions: `center kill|stop|start|pause|resume`, `link cut|heal|delay`, `stop`."""
        if not self._published:
            raise ControlError("the mesh is still starting, or already stopping")
        if action == "stop":
            self.asked_to_stop.set()
            await self._stopped.wait()
            return {}
        operation = asyncio.create_task(self._do(action, arguments))
        self._operations.add(operation)
        operation.add_done_callback(self._operations.discard)
        await asyncio.wait([operation])
        if operation.cancelled():
            raise ControlError("the mesh is stopping")
        operation.result()
        return self._summary()

    async def _do(self, action: str, arguments: Mapping[str, object]) -> None:
        try:
            match action.split():
                case ["center", ("kill" | "stop" | "start" | "pause" | "resume") as verb]:
                    await self._center(arguments["center"]).do(verb)
                case ["link", ("cut" | "heal" | "delay") as verb]:
                    self._do_link(verb, arguments)
                case _:
                    raise ControlError(f"there is no action `{action}`")
        except KeyError as error:
            raise ControlError(f"`{action}` needs {error}") from None

    def _do_link(self, verb: str, arguments: Mapping[str, object]) -> None:
        first, second = str(arguments["first"]), str(arguments["second"])
        match verb:
            case "cut":
                self._links.cut(first, second)
            case "heal":
                self._links.heal(first, second)
            case "delay":
                self._links.delay(first, second, arguments["delay_ms"])
        self._publish()

    def _center(self, name: object) -> _Center:
        if not isinstance(name, str) or name not in self._centers:
            raise ControlError(f"there is no center {name}; there is {', '.join(self._centers)}")
        return self._centers[name]

    def _summary(self) -> dict[str, Any]:
        view = self.view()
        return {
            "centers": {name: center.state for name, center in view.centers.items()},
            "links": {
                name: {"state": link.state, "delay_ms": link.delay_ms}
                for name, link in view.links.items()
            },
        }


def say_on_stderr(sentence: str) -> None:
    """A line for whoever started the mesh; they may have closed the terminal meanwhile."""
    with suppress(OSError, ValueError):
        sys.stderr.write(sentence + "\n")
        sys.stderr.flush()


async def run(
    centers: Sequence[str],
    state_dir: Path,
    port_base: int,
    wan_latency_ms: int,
    split: bool,
    announce: Callable[[MeshView], None],
    *,
    serve_command: Sequence[str] = SERVE_COMMAND,
) -> int:
    """Starts a mesh, announces it, and runs it until a signal or `stop`. Returns the exit code.

    Raises StartError, with nothing left running, when the mesh did not come up.
    """
    supervisor = Supervisor(
        centers,
        state_dir,
        port_base,
        wan_latency_ms,
        split=split,
        serve_command=serve_command,
        say=say_on_stderr,
    )
    loop = asyncio.get_running_loop()
    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in stop_signals:
        loop.add_signal_handler(number, supervisor.asked_to_stop.set)
    stopping = asyncio.create_task(supervisor.asked_to_stop.wait())
    starting = asyncio.create_task(supervisor.start())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return 130
        mesh = starting.result()
        with suppress(BrokenPipeError):  # whoever was to read it has gone; the mesh need not go too
            announce(mesh)
        await stopping
        return 0
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await supervisor.stop()
        for number in stop_signals:
            loop.remove_signal_handler(number)
