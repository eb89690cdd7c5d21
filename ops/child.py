"""One process on this machine: start it, know when it is ready, end it.

Read it from the bottom: `Child` is all that others use. No child outlives the process that started
it, whatever ends that one.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

STOP_GRACE_S = 5.0
READY_LINE_BYTES_MAX = 64 * 1024
LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 4096

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with(parent_pid: int) -> Callable[[], None]:
    """Run in the new process: even kill -9 of the supervisor leaves no orphans (on Linux)."""

    def prepare() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent_pid:
                os._exit(1)

    return prepare


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


class Child:
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
        """Until it has ended. Returns at once if it was never started."""
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

    async def wait_ready_line(self, timeout_s: float) -> None:
        """Until the process says that it serves. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
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
