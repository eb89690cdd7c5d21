"""Snapshots: one topic of one center as rows, for whoever cannot have it as entries any more.

A snapshot holds exactly what a topic adds up to at one position. Whoever has that may give it: the source
itself, or, when the source has lost its store, the center that had applied most of it. The rows arrive in
pages, at a bounded rate, while both sides go on serving; entries behind the position apply after it.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

import structlog
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    CompareRequest,
    CompareResponse,
    CopyEnd,
    CopyPage,
    CopyRequest,
    CopyResponse,
    CopyStart,
    SealRequest,
    SealResponse,
)
from runtime.dispatcher import Incoming
from runtime.endpoint import Call, answer_of
from runtime.errors import RpcError, invalid, unreachable
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.store import Row, Store, Unit
from sync_bus import copies, inbox, log
from sync_bus.copies import CopiedTable, Range
from sync_bus.log import Position, Stamps, Topic

T = TypeVar("T")

PAGE_ROWS_MAX = 500
ROWS_PER_S_MAX = 20_000
SNAPSHOTS_AT_ONCE_MAX = 4
COMPARED_ROWS_MAX = 2000
COPY_TIMEOUT_S = 10.0

Reconcile = Callable[[str, str], Unit[int]]
"""What a source's entries of a topic would have caused here, found from its rows: does some of it, and
returns how much; 0 when nothing is left to be done."""

_logger = structlog.get_logger()


class SnapshotServicer:
    """Serves `Seal`, `Copy` and `Compare` of a service's peer interface."""

    def __init__(self, topics: Sequence[Topic], store: Store, mesh: Mesh) -> None:
        self._topics = {topic.name: topic for topic in topics}
        self._store = store
        self._mesh = mesh
        self._giving = 0

    async def Seal(self, request: SealRequest, _incoming: Incoming) -> SealResponse:
        if request.center not in self._mesh.peers:
            raise invalid("center", "not a center of this mesh")
        generation = await self._store.write("seal", inbox.seal(request.center, request.generation))
        return await self._store.read(self._sealed(request.center, generation))

    async def Copy(self, request: CopyRequest, _incoming: Incoming) -> AsyncIterator[CopyResponse]:
        topic = self._topic(request.topic)
        if request.source not in (self._mesh.here, *self._mesh.peers):
            raise invalid("source", "not a center of this mesh")
        if self._giving >= SNAPSHOTS_AT_ONCE_MAX:
            raise RpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "SNAPSHOTS_BUSY",
                "this center gives as many snapshots as it may at once",
                retry_after_ms=1000,
            )
        self._giving += 1
        try:
            with self._store.frozen() as frozen:
                yield CopyResponse(start=await frozen.read(self._start(request.source, topic)))
                for table in topic.tables:
                    after: Row | None = None
                    while rows := await frozen.read(
                        copies.rows_in(table, request.source, Range(after), PAGE_ROWS_MAX)
                    ):
                        after = table.key(rows[-1])
                        page = CopyPage(table=table.name, rows=copies.encoded(rows))
                        yield CopyResponse(page=page)
                        await asyncio.sleep(len(rows) / ROWS_PER_S_MAX)
                yield CopyResponse(end=CopyEnd())
        finally:
            self._giving -= 1

    async def Compare(self, request: CompareRequest, _incoming: Incoming) -> CompareResponse:
        topic = self._topic(request.topic)
        table = next((one for one in topic.tables if one.name == request.table), None)
        if table is None:
            raise invalid("table", "is not copied")
        return await self._store.read(self._compared(topic, table, request))

    def _topic(self, name: str) -> Topic:
        if name not in self._topics:
            raise invalid("topic", "not a topic of this service")
        return self._topics[name]

    def _sealed(self, center: str, generation: int) -> Unit[SealResponse]:
        cursors = yield from inbox.cursors(center)
        incomplete = yield from inbox.lacking(center)
        return SealResponse(generation=generation, cursors=cursors, incomplete=incomplete)

    def _start(self, source: str, topic: Topic) -> Unit[CopyStart]:
        if source == self._mesh.here:
            generation = (yield from log.life()).generation
            position = yield from log.position(topic.name)
        else:
            copy = yield from inbox.copy_of(source, topic.name)
            if copy.installing:
                raise RpcError(
                    StatusCode.FAILED_PRECONDITION,
                    "COPY_INCOMPLETE",
                    f"center {self._mesh.here} has not all of it itself",
                )
            if copy.parked:
                raise RpcError(
                    StatusCode.FAILED_PRECONDITION,
                    "COPY_INCOMPLETE",
                    f"center {self._mesh.here} has entries of it parked: {copy.parked}"
                    f" (duohuo parked list {self._mesh.here})",
                )
            generation, position = copy.generation, copy.position
        # A merged topic's rows are of all centers: none is newer than what this one has ever seen.
        return CopyStart(generation=generation, seq=position.seq, hlc=(yield from log.latest_hlc()))

    def _compared(
        self, topic: Topic, table: CopiedTable, request: CompareRequest
    ) -> Unit[CompareResponse]:
        keys = Range(
            copies.decoded_key(table, request.after), copies.decoded_key(table, request.last)
        )
        rows = yield from copies.rows_in(table, self._mesh.here, keys, COMPARED_ROWS_MAX)
        life = yield from log.life()
        answer = CompareResponse(
            same=copies.digest(rows) == request.digest,
            generation=life.generation,
            seq=(yield from log.position(topic.name)).seq,
        )
        if not answer.same:
            given = rows[:PAGE_ROWS_MAX]  # a message holds no more of the longest
            answer.rows.extend(copies.encoded(given))
            if len(rows) > len(given) or len(rows) == COMPARED_ROWS_MAX:
                answer.last.CopyFrom(copies.encoded([table.key(given[-1])])[0])
        return answer


class Snapshots:
    """Gets snapshots from other centers, one at a time from each."""

    def __init__(
        self,
        role: str,
        topics: Sequence[Topic],
        store: Store,
        mesh: Mesh,
        stamps: Stamps,
        reconcile: Reconcile,
    ) -> None:
        self._copy = peer_method(role, "Copy")
        self._role = role
        self._topics = {topic.name: topic for topic in topics}
        self._store = store
        self._mesh = mesh
        self._stamps = stamps
        self._reconcile = reconcile
        self._locks: Mapping[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def install(self, source: str, topic: str) -> None:
        """Replaces what is held of a source's topic by what the source has now. Raises RpcError."""
        before = await self._store.read(inbox.copy_of(source, topic))
        async with self._locks[source]:
            copy = await self._store.read(inbox.copy_of(source, topic))
            if copy.diverged or copy.position.seq > before.position.seq:
                return  # whoever held the lock has done it
            _logger.warning("snapshot begins", role=self._role, source=source, topic=topic)
            await self._store.write("begin snapshot", inbox.begin_install(source, topic))
            start = await self._receive(source, source, topic)
            while await self._store.write(
                "reconcile", _in_life(source, start.generation, self._reconcile(source, topic))
            ):
                pass
            finish = inbox.finish_install(source, topic, Position(start.seq, start.hlc))
            await self._store.write("finish snapshot", _in_life(source, start.generation, finish))
            _logger.warning(
                "snapshot installed", role=self._role, source=source, topic=topic, seq=start.seq
            )

    async def restore(self, holder: str, topic: str) -> Position:
        """Gets this center's own topic back from the center that has most of it. Raises RpcError."""
        start = await self._receive(holder, self._mesh.here, topic)
        return Position(start.seq, start.hlc)

    async def _receive(self, holder: str, source: str, topic: str) -> CopyStart:
        """Stores all rows of a snapshot in the place of what was there; returns what it holds."""
        request = CopyRequest(source=source, topic=topic)
        call = Call(self._copy, request.SerializeToString(), COPY_TIMEOUT_S)
        tables = {table.name: table for table in self._topics[topic].tables}
        reached: dict[str, Row | None] = dict.fromkeys(tables)
        start = CopyStart()
        async with aclosing(self._mesh.stream(holder, call)) as parts:  # type: ignore[type-var] # a generator
            async for payload in parts:
                part = answer_of(payload, CopyResponse)
                match part.WhichOneof("part"):
                    case "start":
                        start = part.start
                        await self._believe(source, topic, start.hlc)
                    case "page":
                        table = tables[part.page.table]
                        rows = copies.decoded(table, part.page.rows)
                        keys = Range(reached[table.name], table.key(rows[-1]))
                        reached[table.name] = keys.last
                        unit = copies.install(table, source, keys, rows)
                        for refused in await self._store.write("install", unit):
                            _logger.error(
                                "row of a snapshot does not fit",
                                role=self._role,
                                source=source,
                                table=table.name,
                                key=[str(value) for value in table.key(refused)],
                            )
                    case "end":
                        for name, after in reached.items():
                            unit = copies.install(tables[name], source, Range(after), [])
                            await self._store.write("install", unit)
                        return start
        raise unreachable(holder, ran=False)

    async def _believe(self, source: str, topic: str, hlc: int) -> None:
        """What is written here from now on must win over every row of the snapshot."""
        self._stamps.hybrid.latest = max(self._stamps.hybrid.latest, hlc)
        await self._store.write("believe", inbox.believe(source, topic, hlc))


def _in_life(source: str, generation: int, unit: Unit[T]) -> Unit[T]:
    """Runs a unit, unless the source's store is in another life by now: that must be adopted first."""
    if (yield from inbox.generation_of(source)) != generation:
        raise unreachable(source, ran=False)
    return (yield from unit)
