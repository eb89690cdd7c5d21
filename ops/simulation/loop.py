"""An asyncio event loop on virtual time, with a seeded order of whatever is ready.

Time jumps to the next timer when nothing can run. A killed process is an `Incarnation` whose callbacks
never run again: no `finally`, no `except`, as after SIGKILL.
"""

import asyncio
import contextlib
import gc
import heapq
from asyncio import base_events, events
from collections.abc import Coroutine
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
        loop.processes.append(self)

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Runs a coroutine as part of this process."""
        context = copy_context()
        context.run(PROCESS.set, self)
        return self._loop.create_task(work, context=context)

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

    def __init__(self, *args: Any, number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimulatedLoop(base_events.BaseEventLoop):
    """Runs until its main coroutine ends; `digest` is a hash of the schedule it took."""

    _ready: Any
    _stopping: bool

    def __init__(self, seed: str) -> None:
        super().__init__()
        self._now_s = 0.0
        self._ready = []
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self._timer_number = 0
        self._random = Random(f"schedule {seed}")
        self._created = 0
        self._hash = blake2b(digest_size=16)
        self.steps = 0
        self.processes: list[Incarnation] = []
        self.escaped: list[str] = []
        self.set_task_factory(self._make_task)  # type: ignore[arg-type] # a generic method
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

    def _make_task(
        self, _loop: events.AbstractEventLoop, work: Coroutine[Any, Any, T], **kwargs: Any
    ) -> "asyncio.Task[T]":
        self._created += 1
        task: asyncio.Task[T] = _OrderedTask(work, loop=self, number=self._created, **kwargs)
        context: Context | None = kwargs.get("context")
        process = context.get(PROCESS) if context is not None else PROCESS.get()
        if process is not None:
            process.keep(task)
        return task

    def _on_unhandled(self, _loop: events.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.escaped.append(f"{context.get('message')}: {error!r}")

    def call_at(  # type: ignore[override] # typeshed ties callback and arguments together
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> events.TimerHandle:
        # Tuples compare without running Python code; asyncio's own heap of handles does not.
        handle = events.TimerHandle(when, callback, args, self, context)
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, handle))
        return handle

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while True:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not ready:
                if not timers:
                    raise LeftTheSimulation("nothing can run, and no timer is set")
                self._now_s = max(self._now_s, timers[0][0])
            while timers and timers[0][0] <= self._now_s:
                handle: Any = heapq.heappop(timers)[2]
                if not handle._cancelled:
                    ready.append(handle)
            if not ready:
                continue
            position = self._random.randrange(len(ready)) if len(ready) > 1 else 0
            ready[position], ready[-1] = ready[-1], ready[position]
            handle = ready.pop()
            if not handle._cancelled:
                process = handle._context.get(PROCESS)
                if process is None or not process.dead:
                    self.steps += 1
                    handle._run()
            if self._stopping:
                return

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

    # The one thread there is.
    call_soon_threadsafe = base_events.BaseEventLoop.call_soon

    def _check_closed(self) -> None:
        """What is collected after the run may still ask for callbacks; they never run."""

    def _process_events(self, event_list: Any) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""
