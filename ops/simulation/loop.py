"""An asyncio event loop on virtual time, with a seeded order of whatever is ready.

Time jumps to the next timer when nothing can run. A killed process is an `Incarnation` whose callbacks
never run again: no `finally`, no `except`, as after SIGKILL.
"""

import asyncio
import contextlib
import gc
import heapq
from asyncio import base_events, events
from collections.abc import Awaitable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from hashlib import blake2b
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
PROCESS: ContextVar["Incarnation | None"] = ContextVar("process", default=None)


class LeftTheSimulation(RuntimeError):
    """Code tried to use real threads, sockets or subprocesses, or nothing can ever run again."""


class Incarnation:
    """One life of one simulated process, from start to kill."""

    def __init__(self, loop: "SimulatedLoop", name: str) -> None:
        self.name = name
        self.dead = False
        self.tasks: list[asyncio.Task[Any]] = []
        self._loop = loop
        self._context = Context()
        self._context.run(PROCESS.set, self)
        loop.processes.append(self)

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Runs a coroutine as part of this process."""
        return self._loop.create_task(work, context=self._context.copy())

    def end(self) -> None:
        """After the run: closes what the process left behind, so that nothing warns about it."""
        self.dead = True
        for task in self.tasks:
            work = task.get_coro()
            if not task.done() and work is not None:
                task._log_destroy_pending = False  # type: ignore[attr-defined] # not in typeshed
                with contextlib.suppress(BaseException):
                    work.close()

    def keep(self, task: "asyncio.Task[Any]") -> None:
        # A strong reference, so that a killed process's tasks are not collected, which would close
        # their coroutines and run the `finally` blocks that a real SIGKILL does not run.
        self.tasks.append(task)
        if len(self.tasks) > 4096:
            self.tasks = [kept for kept in self.tasks if not kept.done()]


class _OrderedTask(asyncio.Task[T]):
    """Hashes by creation number, so that sets of tasks (TaskGroup, asyncio.wait) iterate alike."""

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        loop: "SimulatedLoop",
        number: int,
        name: str | None,
        context: Context,
    ) -> None:
        self._number = number
        super().__init__(work, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self._number


class _Handle(events.TimerHandle):
    """A callback, due at once or later. asyncio's own handles ask for debug mode at every turn."""

    def __init__(
        self, when_s: float, callback: Any, args: Any, loop: "SimulatedLoop", context: Context
    ) -> None:
        self._when = when_s
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True


class _Pause:
    """A future whose timer wakes the task itself, without a turn of the loop in between."""

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_delay_s", "_loop", "_timer", "_wake")

    def __init__(self, loop: "SimulatedLoop", delay_s: float) -> None:
        self._loop = loop
        self._delay_s = delay_s
        self._cancelled = False

    def __await__(self) -> Generator[Any, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> "SimulatedLoop":
        return self._loop

    def add_done_callback(self, wake: Any, *, context: Context) -> None:
        self._wake = wake, context
        self._timer = self._loop.call_later(self._delay_s, wake, self, context=context)

    def result(self) -> None:
        if self._cancelled:
            raise asyncio.CancelledError

    def cancel(self, msg: Any = None) -> bool:  # noqa: ARG002 - as asyncio calls it
        if self._cancelled:
            return False
        self._cancelled = True
        self._timer.cancel()
        wake, context = self._wake
        self._loop.call_soon(wake, self, context=context)
        return True


class SimulatedLoop(base_events.BaseEventLoop):
    """Runs until its main coroutine ends; `digest` is a hash of the schedule it took."""

    _ready: list[_Handle]
    _stopping: bool

    def __init__(self, seed: str) -> None:
        super().__init__()
        self._now_s = 0.0
        self._ready = []
        self._timers: list[tuple[float, int, _Handle]] = []
        self._timer_number = 0
        self._random = Random(f"schedule {seed}")
        self._created = 0
        self._hash = blake2b(digest_size=16)
        self.processes: list[Incarnation] = []
        self.escaped: list[str] = []
        self.set_exception_handler(self._on_unhandled)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def time(self) -> float:
        return self._now_s

    def note(self, what: str) -> None:
        """Makes something that happened part of the history's hash."""
        self._hash.update(f"{self._now_s:.6f} {what}\n".encode())

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Runs the simulation to its end, then forgets everything that still waits."""
        gc_was_on = gc.isenabled()
        gc.disable()
        task: asyncio.Task[T] = self.create_task(main)
        try:
            return self.run_until_complete(task)
        finally:
            for process in self.processes:
                process.end()
            self._ready.clear()
            self._timers.clear()
            self.close()
            if gc_was_on:
                gc.enable()

    def create_task(  # type: ignore[override] # typeshed takes any awaitable that the loop may run
        self,
        work: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> "asyncio.Task[T]":
        context = copy_context() if context is None else context
        self._created += 1
        task = _OrderedTask(work, self, self._created, name, context)
        process = context.get(PROCESS)
        if process is not None:
            process.keep(task)
        return task

    def _on_unhandled(self, _loop: events.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.escaped.append(f"{context.get('message')}: {error!r}")

    def call_soon(  # type: ignore[override] # typeshed ties callback and arguments together
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> events.Handle:
        handle = _Handle(
            self._now_s, callback, args, self, copy_context() if context is None else context
        )
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override] # as above
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override] # as above
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        handle = _Handle(when, callback, args, self, copy_context() if context is None else context)
        if when <= self._now_s:
            self._ready.append(handle)
        else:
            # Tuples compare without running Python code; asyncio's own heap of handles does not.
            self._timer_number += 1
            heapq.heappush(self._timers, (when, self._timer_number, handle))
        return handle

    def pause(self, delay_s: float) -> Awaitable[None]:
        """As asyncio.sleep, for the simulator's own many short delays, at half the cost."""
        return _Pause(self, delay_s)

    def _run_once(self) -> None:
        ready, timers, random = self._ready, self._timers, self._random.random
        while not self._stopping:
            if not ready:
                if not timers:
                    raise LeftTheSimulation("nothing can run, and no timer is set")
                when_s, _, handle = heapq.heappop(timers)
                if handle._cancelled:
                    continue
                self._now_s = when_s
                ready.append(handle)
                while timers and timers[0][0] <= when_s:
                    ready.append(heapq.heappop(timers)[2])
            handle = ready.pop()
            if ready:
                position = int(random() * (len(ready) + 1))
                if position < len(ready):
                    ready[position], handle = handle, ready[position]
            process = handle._context.get(PROCESS)
            if handle._cancelled or (process is not None and process.dead):
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - a loop reports what its callbacks raise
                self.call_exception_handler({"message": "a callback failed", "exception": error})

    # What a simulation must not touch.

    def _forbidden(self, *_args: Any, **_kwargs: Any) -> Any:
        raise LeftTheSimulation("real threads, sockets and processes do not exist here")

    run_in_executor = _forbidden  # type: ignore[assignment] # it takes anything, to refuse it
    create_connection = _forbidden
    create_server = _forbidden
    getaddrinfo = _forbidden
    subprocess_exec = _forbidden
    _add_reader = _forbidden
    _add_writer = _forbidden

    # All futures ask. A type that makes False answers without running Python code.
    get_debug = bool

    # The one thread there is.
    call_soon_threadsafe = call_soon  # type: ignore[assignment] # as call_soon

    def _check_closed(self) -> None:
        """What is collected after the run may still ask for callbacks; they never run."""

    def _process_events(self, event_list: Any) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""
