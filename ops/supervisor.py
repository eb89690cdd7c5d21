"""Runs a whole mesh on this machine: NATS servers, services, and the links between the centers.

Read it from the bottom: `run` is what `duohuo up` does, `Supervisor` holds the mesh, `_Center` the
processes of one center, `_Child` one process. No child outlives the supervisor, whatever ends it.
"""

import asyncio
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ops import mesh_file, nats_config
from ops.control import Answer, ControlError, ControlServer
from ops.links import Links
from ops.mesh_file import CenterState, CenterView, MeshView
from ops.ports import HOST, ROLES, CenterPorts, PortPlan, address, plan

NATS_READY_TIMEOUT_S = 10.0
SERVE_READY_TIMEOUT_S = 20.0
STOP_GRACE_S = 5.0
READY_LINE_BYTES_MAX = 64 * 1024
LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 4096
# -P: a directory `ops` or `runtime` where the user happens to be must not be taken for ours.
SERVE_COMMAND = (sys.executable, "-P", "-m", "ops.main", "serve")

_PASSWORD_VARIABLES = ("DUOHUO_PASSWORD", "DUOHUO_NEW_PASSWORD")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

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


class StartError(Exception):
    """The mesh did not start, and nothing of it is left running. The message is for people."""


def state_after(center: str, state: CenterState, verb: str) -> CenterState:
    """The state of a center after an action. Raises ControlError if that makes no sense now."""
    if (verb, state) not in _AFTER:
        raise ControlError(f"cannot {verb} center {center}: it is {state}")
    return _AFTER[verb, state]


def settings(
    center: str,
    processes: Mapping[str, Sequence[str]],
    process: str,
    ports: PortPlan,
    state_dir: Path,
) -> dict[str, object]:
    """What `runtime.config` must know in one process of a center."""
    own = ports.centers[center]
    roles = processes[process]
    return {
        "center": center,
        "centers": list(ports.centers),
        "roles": list(roles),
        "state_dir": str(state_dir / center / "stores"),
        "public_listen": address(own.gateway),
        "operator_listen": address(own.operator),
        "mesh_listen": address(own.mesh[roles[0]]),
        "role_addresses": {
            role: address(own.mesh[others[0]])
            for others in processes.values()
            for role in others
            if role not in roles
        },
        "peer_addresses": {peer: address(port) for peer, port in own.grpc_links.items()},
        "nats_url": f"nats://{address(own.nats)}",
        "nats_password_file": str(state_dir / mesh_file.NATS_PASSWORD_NAME),
        "operator_token_file": str(state_dir / mesh_file.OPERATOR_TOKEN_NAME),
    }


def to_toml(values: Mapping[str, object]) -> str:
    """Strings, lists of strings and maps of strings as TOML."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items())


def _toml_value(value: object) -> str:
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + " }"
        )
    # A string or a list of strings is written the same in both languages.
    return json.dumps(value, ensure_ascii=False)


def _processes(*, split: bool) -> dict[str, Sequence[str]]:
    """Which process of a center serves which roles."""
    return {role: [role] for role in ROLES} if split else {"serve": ROLES}


def _config_name(process: str) -> str:
    return "center.toml" if process == "serve" else f"{process}.toml"


def _nats_server() -> str:
    """The program, from where this Python's packages were installed."""
    ours = Path(sys.executable).with_name("nats-server")
    found = str(ours) if ours.exists() else shutil.which("nats-server")
    if found is None:
        raise StartError(f"there is no {ours}; install Duohuo again, with `make install`")
    return found


def _check_ports(wanted: Iterable[tuple[int, str]]) -> None:
    for port, purpose in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                why = "is in use" if error.errno == errno.EADDRINUSE else f"fails: {error.strerror}"
                raise StartError(
                    f"port {port}, for {purpose}, {why}; stop what uses it, or choose other ports "
                    "with --port-base"
                ) from None


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Makes the state directory and holds it, so that only one mesh uses it."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state_dir / mesh_file.LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(
            f"cannot keep the mesh's state in {state_dir}: {error.strerror}; choose another "
            "directory with --state"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StartError(
            f"a mesh is already running on {state_dir}; stop it first, or choose another directory "
            "with --state"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def _secret(path: Path) -> str:
    """The secret in the file, made the first time."""
    if not path.exists():
        mesh_file.write_private(path, secrets.token_hex(24) + "\n")
    return path.read_text("utf-8").strip()


def _write_configs(state_dir: Path, ports: PortPlan, *, split: bool) -> None:
    password = _secret(state_dir / mesh_file.NATS_PASSWORD_NAME)
    _secret(state_dir / mesh_file.OPERATOR_TOKEN_NAME)
    processes = _processes(split=split)
    for name, own in ports.centers.items():
        directory = state_dir / name
        for part in (directory, directory / "stores", directory / "nats"):
            part.mkdir(mode=0o700, exist_ok=True)
        server = nats_config.NatsServer(
            center=name,
            client_port=own.nats,
            leaf_port=own.nats_leaf,
            monitor_port=own.nats_monitor,
            links=own.nats_links,
            store_dir=directory / "nats",
            password=password,
        )
        mesh_file.write_private(directory / "nats.conf", nats_config.render(server))
        for process in processes:
            text = to_toml(settings(name, processes, process, ports, state_dir))
            mesh_file.write_private(directory / _config_name(process), text)


def _environment(decided: Iterable[str]) -> dict[str, str]:
    """What children inherit: nothing that overrides what the mesh has decided, no user's password."""
    hidden = {f"DUOHUO_{name.upper()}" for name in decided} | set(_PASSWORD_VARIABLES)
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _die_with(parent_pid: int) -> Callable[[], None]:
    """Run in the new process: even kill -9 of the supervisor leaves no orphans (on Linux)."""

    def prepare() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent_pid:
                os._exit(1)

    return prepare


class _Child:
    """One process. Its output goes to its log; on stdout it may say that it is ready."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._log_start = 0
        self.ended: asyncio.Task[int] | None = None

    @property
    def pid(self) -> int | None:
        """None when it is not running."""
        if self._process is None or self.ended is None or self.ended.done():
            return None
        return self._process.pid

    async def start(self) -> None:
        """Starts the process in its own session, so that Ctrl-C does not reach it. Raises OSError."""
        self._ready.clear()
        with _open_log(self.log) as log:
            self._log_start = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                umask=0o077,
                preexec_fn=_die_with(os.getpid()),
            )
        self.ended = asyncio.create_task(self._watch(self._process))

    def signal(self, number: signal.Signals) -> None:
        """Signals the process and its own children, if it is there."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)

    async def wait_ended(self) -> None:
        if self.ended is not None:
            await asyncio.wait([self.ended])

    async def stop(self) -> None:
        """Ends the process, by force if it does not end by itself in time."""
        if self.ended is None:
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        await asyncio.wait([self.ended], timeout=STOP_GRACE_S)
        self.signal(signal.SIGKILL)
        await self.wait_ended()

    async def wait_ready_line(self) -> None:
        """Until the process says that it serves. Raises TimeoutError."""
        async with asyncio.timeout(SERVE_READY_TIMEOUT_S):
            await self._ready.wait()

    def last_words(self) -> str:
        """The end of what this run has logged."""
        with suppress(OSError), self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            return "\n".join("  " + "".join(c for c in line if c.isprintable()) for line in lines)
        return ""

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        """Copies stdout to the log and looks for the line that says ready, until the process ends."""
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        begun = b""
        with _open_log(self.log) as log:
            while output := await process.stdout.read(READY_LINE_BYTES_MAX):
                with suppress(OSError):  # a full disk must not stop the process
                    log.write(output)
                if not self._ready.is_set():
                    *lines, begun = (begun + output).split(b"\n")
                    begun = begun[-READY_LINE_BYTES_MAX:]
                    if any(_says_ready(line) for line in lines):
                        self._ready.set()
        return await process.wait()


def _open_log(path: Path) -> IO[bytes]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    log = os.fdopen(descriptor, "ab", buffering=0)
    log.seek(0, os.SEEK_END)
    return log


def _says_ready(line: bytes) -> bool:
    try:
        said = json.loads(line)
    except ValueError:
        return False
    return isinstance(said, dict) and said.get("ready") is True


class _Center:
    """The processes of one center, NATS first."""

    def __init__(
        self,
        name: str,
        ports: CenterPorts,
        directory: Path,
        children: Sequence[_Child],
        changed: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.state: CenterState = "stopped"
        self._ports = ports
        self._directory = directory
        self._nats, *self._services = children
        self._changed = changed
        self._say = say
        self._lock = asyncio.Lock()

    def view(self) -> CenterView:
        return CenterView(
            state=self.state,
            gateway=address(self._ports.gateway),
            operator=address(self._ports.operator),
            nats=f"nats://{address(self._ports.nats)}",
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
            self._changed()

    async def start(self) -> None:
        """Starts what is not running and waits until it is ready. Raises StartError."""
        async with self._lock:
            await self._start()

    async def stop(self) -> None:
        """Stops whatever runs, in any state."""
        async with self._lock:
            self._enter("stopped")
            await self._stop()

    async def _start(self) -> None:
        self._enter("starting")
        try:
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

    async def _start_child(self, child: _Child) -> None:
        if child.pid is not None:
            return
        try:
            await child.start()
        except OSError as error:
            raise StartError(f"cannot run {child.name} of center {self.name}: {error}") from None
        assert child.ended is not None  # noqa: S101 - just started
        child.ended.add_done_callback(lambda _: self._on_end(child))
        ready = asyncio.create_task(
            self._nats_answers() if child is self._nats else child.wait_ready_line()
        )
        try:
            await asyncio.wait([ready, child.ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if ready.done() and not ready.cancelled() and ready.exception() is None:
            return
        raise self._start_error(child, "ended" if child.ended.done() else "was not ready in time")

    def _start_error(self, child: _Child, what: str) -> StartError:
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

    def _on_end(self, child: _Child) -> None:
        if self.state in ("running", "paused", "failed"):
            self._enter("failed")
            self._say(
                f"{child.name} of center {self.name} ended by itself; its log is {child.log}. "
                f"`duohuo center start {self.name}` starts it again."
            )

    def _enter(self, state: CenterState) -> None:
        self.state = state
        self._changed()

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children():
            child.signal(number)

    def _children(self) -> list[_Child]:
        return [self._nats, *self._services]


async def _together(starts: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Waits for all; when one fails, cancels the others and raises its error."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for start in starts:
                tasks.create_task(start)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


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
        nats_server = _nats_server()
        processes = _processes(split=split)
        self._centers = {}
        for name, own in self._ports.centers.items():
            directory = self._state_dir / name
            commands = {"nats": [nats_server, "-c", str(directory / "nats.conf")]} | {
                process: [*serve_command, "--config", str(directory / _config_name(process))]
                for process in processes
            }
            decided = settings(name, processes, next(iter(processes)), self._ports, state_dir)
            children = [
                _Child(process, command, _environment(decided), directory / f"{process}.log")
                for process, command in commands.items()
            ]
            self._centers[name] = _Center(name, own, directory, children, self._publish, say)

    async def start(self) -> MeshView:
        """Starts everything and waits until it is ready. Raises StartError; then call `stop`."""
        self._holding.enter_context(_locked(self._state_dir))
        _check_ports(self._ports.listening(split=self._split))
        try:
            mesh_file.remove(self._state_dir)
            _write_configs(self._state_dir, self._ports, split=self._split)
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
