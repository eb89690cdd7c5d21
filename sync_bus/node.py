"""What every service has besides its own work: a log that others read, copies of theirs, inspection."""

from collections.abc import Sequence
from typing import Protocol

from duohuo.internal.v1.peer_services_pb2 import (
    CollectFactsRequest,
    CollectFactsResponse,
    InspectRequest,
    InspectResponse,
)
from duohuo.v1.operator_service_pb2 import (
    DropParkedRequest,
    DropParkedResponse,
    EntryName,
    ListParkedRequest,
    ListParkedResponse,
    RetryParkedRequest,
    RetryParkedResponse,
)
from runtime.dispatcher import Incoming
from runtime.store import Store, Unit, query
from sync_bus import inbox, log, parked
from sync_bus.bus import Bus
from sync_bus.feed import FeedServicer
from sync_bus.inbox import Handler
from sync_bus.log import Topic
from sync_bus.replicator import Replicator
from sync_bus.site import Site

SCHEMA = log.SCHEMA + inbox.SCHEMA + parked.SCHEMA


class Inspection(Protocol):
    """A service's own part of status and verify."""

    async def counts(self) -> dict[str, int]: ...

    async def facts(self) -> CollectFactsResponse: ...


def is_prepared(topics: Sequence[Topic], peers: Sequence[str]) -> Unit[bool]:
    """Is there nothing for `prepare` to write? Then a start works on a full disk too."""
    rows = yield from query(
        "SELECT (SELECT count(*) FROM log_head), (SELECT count(*) FROM confirmed),"
        " (SELECT count(*) FROM cursor)"
    )
    pairs = len(topics) * len(peers)
    return rows[0] == (len(topics), pairs, pairs)


def prepare(topics: Sequence[Topic], peers: Sequence[str]) -> Unit[None]:
    """Makes a new store ready for replication."""
    yield from log.prepare(topics, peers)
    yield from inbox.prepare(topics, peers)


class ServiceNode:
    """The replication and inspection of one service; `run` for as long as it lives."""

    def __init__(
        self,
        role: str,
        topics: Sequence[Topic],
        site: Site,
        database: Store,
        bus: Bus,
        handler: Handler,
        inspection: Inspection,
    ) -> None:
        self.role = role
        self._replicator = Replicator(
            role, topics, database, site.mesh, bus, site.stamps, handler, site.random
        )
        self.run = self._replicator.run
        self.current_ms = self._replicator.current_ms
        self._inspection = inspection
        self._store = database
        self._here = site.here
        self._clock = site.clock
        self._clocks = site.mesh.clocks
        self.servicers = (
            FeedServicer(database, frozenset(site.mesh.peers), site.clock),
            self,
        )

    async def Inspect(self, _request: InspectRequest, _incoming: Incoming) -> InspectResponse:
        return InspectResponse(
            roads=await self._replicator.roads(),
            counts=await self._inspection.counts(),
            clock_drift_ms=self._clocks.drifts_ms(),
            clock_wrong=self._clocks.local_is_wrong(),
        )

    async def CollectFacts(
        self, _request: CollectFactsRequest, _incoming: Incoming
    ) -> CollectFactsResponse:
        facts = await self._inspection.facts()
        cursors = await self._store.read(inbox.inspect())
        facts.violations.extend(
            f"CONVERGE: {one.parked} of {one.topic} of center {one.source} could not be applied"
            f" (duohuo parked list {self._here})"
            for one in cursors
            if one.parked
        )
        return facts

    async def ListParked(
        self, _request: ListParkedRequest, _incoming: Incoming
    ) -> ListParkedResponse:
        waiting = await self._store.read(parked.find(None))
        return ListParkedResponse(
            entries=[one.shown() for one in waiting],
            actions=await self._store.read(parked.actions()),
        )

    async def RetryParked(
        self, request: RetryParkedRequest, _incoming: Incoming
    ) -> RetryParkedResponse:
        name: EntryName | None = request.name if request.HasField("name") else None
        waiting = await self._store.read(parked.find(name))
        return RetryParkedResponse(actions=await self._replicator.retry(parked.OPERATOR, waiting))

    async def DropParked(
        self, request: DropParkedRequest, _incoming: Incoming
    ) -> DropParkedResponse:
        done = DropParkedResponse()
        for one in await self._store.read(parked.find(request.name)):
            unit = parked.drop(parked.OPERATOR, one, self._clock.wall_ms())
            action = await self._store.write("drop parked", unit)
            if action is not None:
                parked.tell(self.role, action)
                done.actions.append(action)
        return done
