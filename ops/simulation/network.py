"""A network between simulated processes: delay, loss, duplication, reordering, one-way cuts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextvars import Context
from dataclasses import dataclass, field
from random import Random
from typing import Any

from grpc import StatusCode

from ops.simulation.loop import Incarnation, SimulatedLoop
from runtime.config import ROLES
from runtime.endpoint import CALLER, Call, Endpoint, Reply
from runtime.errors import RpcError, unreachable
from runtime.identity import Identity

KEEPALIVE_S = 4.0
"""How long a broken stream goes unnoticed."""

HANG_UP_S_MAX = 0.008
"""About as long as handlers take."""


@dataclass(slots=True)
class Conditions:
    """What the network does to messages now."""

    lose: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    hang_up: float = 0.0
    """How often a caller is gone before it is answered."""
    unreceived: float = 0.0
    """How often a notification, or the receiver's answer, is lost."""
    latency_s: tuple[float, float] = (0.0005, 0.015)
    cut: set[tuple[str, str]] = field(default_factory=set)


class Network:
    """Connects processes by name. A server is what a process listens with, until it dies."""

    def __init__(self, loop: SimulatedLoop, random: Random) -> None:
        self.conditions = Conditions()
        self.counts: dict[str, int] = {}
        self._loop = loop
        self._random = random
        self._servers: dict[str, tuple[Incarnation, Endpoint]] = {}
        self._outside: Context = Context()

    def listen(self, name: str, process: Incarnation, endpoint: Endpoint) -> None:
        self._servers[name] = process, endpoint

    def serves(self, name: str) -> bool:
        found = self._servers.get(name)
        return found is not None and not found[0].dead

    def connect(self, source: str, target: str) -> Endpoint:
        """The target as an endpoint, called from the source."""
        return _Connection(self, source, target)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def passes(self, source: str, target: str) -> bool:
        """Does one message get through now?"""
        conditions = self.conditions
        lost = self._chance(conditions.lose) and _between_centers(source, target)
        if lost or (conditions.cut and (source, target) in conditions.cut):
            self.count("message lost")
            return False
        return True

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def delay_s(self, source: str, target: str) -> float:
        """How long one message takes."""
        delay_s = self._random.uniform(*self.conditions.latency_s)
        if self._chance(self.conditions.slow) and _between_centers(source, target):
            self.count("message late")
            delay_s += self._random.expovariate(1.0)
        return delay_s

    def later(self, delay_s: float, action: Any, *arguments: Any) -> None:
        """Lets something happen that no process owns."""
        self._loop.call_later(delay_s, action, *arguments, context=self._outside)

    def pause(self, delay_s: float) -> Awaitable[None]:
        """Lets simulated time pass."""
        return self._loop.pause(delay_s)

    async def unary(self, source: str, target: str, call: Call) -> Reply:
        answered: asyncio.Future[Reply] = self._loop.create_future()
        deadline = self._loop.call_later(call.timeout_s, self._run_out, target, answered)
        copies = 1
        # A client's call is repeated by the client alone, which knows of it; the workload's do that.
        if self._chance(self.conditions.duplicate) and source != "client":
            self.count("message duplicated")
            copies = 2
        for _ in range(copies):
            if self.passes(source, target):
                self.later(
                    self.delay_s(source, target),
                    *(self._deliver, source, target, call, answered, copies > 1),
                )
        try:
            return await answered
        finally:
            deadline.cancel()

    def _run_out(self, target: str, answered: "asyncio.Future[Reply]") -> None:
        if answered.done():
            return
        self.count("deadline exceeded")
        answered.set_exception(
            RpcError(
                StatusCode.DEADLINE_EXCEEDED,
                "DEADLINE_EXCEEDED",
                f"{target} did not answer in time",
                ran=True,
            )
        )

    def _deliver(
        self,
        source: str,
        target: str,
        call: Call,
        answered: "asyncio.Future[Reply]",
        another: bool,
    ) -> None:
        process, endpoint = self._servers.get(target, (None, None))
        self._loop.note(f"{source}>{target} {call.method.name}")
        if process is None or endpoint is None or process.dead:
            refused = unreachable(target, ran=another)
            if self.passes(target, source):
                self.later(self.delay_s(source, target), _settle, answered, None, refused)
            return
        process.spawn(self._serve(source, target, endpoint, call, answered, another))

    async def _serve(
        self,
        source: str,
        target: str,
        endpoint: Endpoint,
        call: Call,
        answered: "asyncio.Future[Reply]",
        another: bool,
    ) -> None:
        reply, error = None, None
        serving = asyncio.current_task()
        assert serving is not None  # noqa: S101 - narrows a type: this is a task
        # As gRPC does: the handler is cancelled at the caller's deadline, or when its connection ends.
        left_s = call.timeout_s
        if self._chance(self.conditions.hang_up) and _between_centers(source, target):
            left_s = self._random.uniform(0, HANG_UP_S_MAX)
        deadline = self._loop.call_later(left_s, serving.cancel)
        try:
            reply = await endpoint.unary(call)
        except RpcError as raised:
            error = RpcError.from_status(raised.to_status())
            error.ran = error.ran or another
        except asyncio.CancelledError:
            self.count("handler cancelled")
            raise
        finally:
            deadline.cancel()
        if self.passes(target, source):
            self.later(self.delay_s(source, target), _settle, answered, reply, error)

    async def stream(self, source: str, target: str, call: Call) -> AsyncIterator[bytes]:
        """Messages in order over one connection, which breaks when one of them is lost."""
        process, endpoint = self._servers.get(target, (None, None))
        if process is None or endpoint is None or process.dead:
            raise unreachable(target, ran=False)
        arrived: asyncio.Queue[bytes | RpcError | None] = asyncio.Queue(64)
        sender = process.spawn(self._send_stream(source, target, endpoint, call, arrived))
        try:
            while True:
                try:
                    async with asyncio.timeout(KEEPALIVE_S):
                        message = await arrived.get()
                except TimeoutError:
                    alive = not process.dead and self.passes(source, target)
                    if alive and self.passes(target, source) and not sender.done():
                        continue
                    self.count("stream broken")
                    raise unreachable(target, ran=True) from None
                if message is None:
                    return
                if isinstance(message, RpcError):
                    raise message
                yield message
        finally:
            sender.cancel()

    async def _send_stream(
        self,
        source: str,
        target: str,
        endpoint: Endpoint,
        call: Call,
        arrived: "asyncio.Queue[bytes | RpcError | None]",
    ) -> None:
        end: RpcError | None = None
        try:
            await self.pause(self.delay_s(source, target))
            async for message in endpoint.stream(call):
                await self.pause(self.delay_s(source, target))
                if not self.passes(target, source):
                    return
                await arrived.put(message)
        except RpcError as error:
            end = error
        await self.pause(self.delay_s(source, target))
        if self.passes(target, source):
            await arrived.put(end)


@dataclass(frozen=True, slots=True)
class _Connection:
    network: Network
    source: str
    target: str

    def unary(self, call: Call) -> Coroutine[Any, Any, Reply]:
        return self.network.unary(self.source, self.target, self._identified(call))

    def stream(self, call: Call) -> AsyncIterator[bytes]:
        return self.network.stream(self.source, self.target, self._identified(call))

    def _identified(self, call: Call) -> Call:
        """With what the source's certificate would say."""
        if not _between_centers(self.source, self.target):
            return call
        caller = str(Identity(self.source, frozenset(ROLES)))
        return call._replace(metadata={**call.metadata, CALLER: caller})


def _between_centers(source: str, target: str) -> bool:
    """A user's own way to a gateway is not the mesh's to promise anything about."""
    return source != "client" and target != "client"


def _settle(answered: "asyncio.Future[Reply]", reply: Reply | None, error: RpcError | None) -> None:
    if answered.done():
        return
    if error is not None:
        answered.set_exception(error)
    elif reply is not None:
        answered.set_result(reply)
