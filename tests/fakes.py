"""Stand-ins for the world around the code under test: time, ids, centers, a store in a temporary place."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from random import Random
from string import ascii_letters, digits
from typing import Any

from google.protobuf.message import Message

from ops.simulation.disk import DiskFullError
from runtime import ids
from runtime.destinations import Destinations
from runtime.endpoint import Call, Endpoint, Reply
from runtime.errors import RpcError, unreachable
from runtime.hlc import COUNTER_BITS, HybridClock
from runtime.mesh import IN_A_ROW, Mesh
from runtime.placement import SLOTS, Placement
from runtime.store import SqliteStore, Unit, in_place, run_batch
from runtime.token_seal import TokenSeal
from sync_bus import homes, inbox, log, node
from sync_bus.log import Stamp, Stamps, Topic
from sync_bus.site import Site
from transfer_svc.courier import Mail, Undelivered

NOON_MS = 1_900_000_000_000
"""The moment at which a fake clock starts."""

SEAL = TokenSeal([b"the key of all centers"])

Answer = Callable[[Call], Reply]


class FakeClock:
    """Stands still until it is told to move."""

    def __init__(self, wall_ms: int = NOON_MS) -> None:
        self._wall_ms = wall_ms
        self._monotonic_ms = 0

    def wall_ms(self) -> int:
        return self._wall_ms

    def monotonic_ms(self) -> int:
        return self._monotonic_ms

    def advance(self, by_ms: int) -> None:
        """Time passes."""
        self._wall_ms += by_ms
        self._monotonic_ms += by_ms

    def jump(self, by_ms: int) -> None:
        """Somebody sets the wall clock."""
        self._wall_ms += by_ms


class SeededIds:
    """The same ids in every run."""

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)  # noqa: S311 - nobody guards anything with it
        self._count = 0

    def unique(self) -> str:
        self._count += 1
        return f"{self._count:032x}"

    def secret(self) -> str:
        return "".join(self._random.choices(ascii_letters + digits + "-_", k=43))


class FakeCourier:
    """Remembers what was handed to it; fails with what it is told, once each, before it delivers."""

    def __init__(self, *failures: Undelivered) -> None:
        self.failures = list(failures)
        self.posted: list[tuple[str, Mapping[str, str], bytes]] = []
        self.mailed: list[Mail] = []

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        self.posted.append((url, headers, body))
        self._fail()

    async def mail(self, mail: Mail) -> None:
        self.mailed.append(mail)
        self._fail()

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


def resolves(**hosts: Sequence[str]) -> Destinations:
    """The usual rules, in a world with these hosts, each named after its key under example.com."""

    async def resolve(host: str) -> Sequence[str]:
        return hosts.get(host.removesuffix(".example.com"), ())

    return Destinations(resolve)


class RecordingEndpoint:
    """Remembers every call, and answers it as told."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[Call] = []

    async def unary(self, call: Call) -> Reply:
        self.calls.append(call)
        return self.answer(call)

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        self.calls.append(call)
        yield self.answer(call).payload


def says(message: Message) -> Answer:
    """Always the same message."""
    return lambda _call: Reply(message.SerializeToString(), {})


def fails(error: RpcError) -> Answer:
    """Always the same error, each time a new one: whoever passes it on may add to it."""

    def answer(_call: Call) -> Reply:
        raise copy(error)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other; asking more often is a fault of the test."""
    left: Iterator[Answer] = iter(answers)

    def answer(call: Call) -> Reply:
        return next(left)(call)

    return answer


def placement(*centers: str, epoch: int = 1) -> Placement:
    """Homes in turn: slot 0 at the first center, slot 1 at the second, and so on."""
    count = len(centers)
    orders = [tuple(centers[(first + n) % count] for n in range(count)) for first in range(count)]
    return Placement(epoch, tuple(sorted(centers)), [orders[slot % count] for slot in range(SLOTS)])


def account(slot: int, number: int = 1) -> str:
    """An account id of a slot."""
    return ids.account_id(slot, f"{number:032x}")


def mesh(here: str, *centers: str, clock: FakeClock | None = None) -> Mesh:
    """Centers of which none answers."""
    silent: dict[str, Endpoint] = {
        center: RecordingEndpoint(fails(unreachable(center, ran=False))) for center in centers
    }
    return Mesh(here, silent, clock or FakeClock())


def see(seen_from: Mesh, center: str, *, answering: bool) -> None:
    """Lets a mesh see so many answers, or failures, of a center that it believes them."""
    for _ in range(IN_A_ROW):
        seen_from._record(center, answered=answering)


def site(here: str, *centers: str, clock: FakeClock | None = None) -> Site:
    """What a service at `here` is handed, in a mesh where nobody answers."""
    clock = clock or FakeClock()
    return Site(
        mesh(here, *centers, clock=clock),
        placement(*centers),
        Stamps(clock, HybridClock(clock)),
        SeededIds(),
        Random(0),  # noqa: S311 - as above
    )


def stamp(at_ms: int, counter: int = 0) -> Stamp:
    """A stamp of a moment counted from noon."""
    time_ms = NOON_MS + at_ms
    return Stamp((time_ms << COUNTER_BITS) + counter, time_ms, "")


GENERATION = 1
"""The life in which all stores of tests are."""


class FakeDisk:
    """Takes every write, until it is told that it is full, or to take its time."""

    def __init__(self) -> None:
        self.full = False
        self.full_in_turn: list[bool] = []
        """What `full` becomes with each batch to come."""
        self.batches = 0
        self.came = asyncio.Event()
        self.answers = asyncio.Event()
        """Clear it, and batches wait."""
        self.answers.set()

    async def take(self) -> None:
        """One batch comes. Raises what SQLite does."""
        self.batches += 1
        self.came.set()
        await self.answers.wait()
        if self.full_in_turn:
            self.full = self.full_in_turn.pop(0)
        if self.full:
            raise DiskFullError("database or disk is full")


@asynccontextmanager
async def temporary_store(
    schema: str,
    topics: Sequence[Topic] = (),
    peers: Sequence[str] = (),
    disk: FakeDisk | None = None,
    *,
    alive: bool = True,
    first: Placement | None = None,
) -> AsyncIterator[SqliteStore]:
    """The real store with a log and an inbox, in memory and without a thread; one that is not alive is as
    empty as a new disk."""
    disk = disk or FakeDisk()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(node.SCHEMA + schema)

    async def hop(units: list[Unit[Any]]) -> list[Any]:
        await disk.take()
        return run_batch(connection, units)

    def copied() -> sqlite3.Connection:
        copy = sqlite3.connect(":memory:", isolation_level=None)
        copy.deserialize(connection.serialize())
        return copy

    store = SqliteStore(hop, connection, copied, in_place)
    try:
        await store.write("prepare", node.prepare(topics, peers))
        if "first_home" in schema:
            first = first or placement(*sorted({"a", "b", *peers}))
            await store.write("place", homes.prepare(first))
        if alive:
            await store.write("begin life", log.begin_life(GENERATION, {}))
            for peer in peers:
                await store.write("seal", inbox.seal(peer, GENERATION))
        yield store
    finally:
        await store.close()
