"""Keeps both roads moving for one service: publishes its log, applies the others'.

Per topic on the JetStream road, one publisher. Per other center: one consumer of the bus, one
exchange of cursors against heads every second (it confirms what was applied, and finds what the bus
lost), and one follower for each topic on the feed road.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from random import Random

import structlog
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from duohuo.internal.v1.peer_services_pb2 import (
    ExchangeRequest,
    ExchangeResponse,
    PullRequest,
    PullResponse,
)
from duohuo.v1.operator_service_pb2 import ParkedAction, RoadStatus
from runtime import telemetry
from runtime.clock import timestamp
from runtime.endpoint import Call, ask
from runtime.errors import RpcError
from runtime.hlc import TooFarAhead
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Store
from sync_bus import inbox, log, parked
from sync_bus.bus import Bus, BusFault
from sync_bus.inbox import Arrival, Handler, Outcome
from sync_bus.log import Road, Stamps, Topic
from sync_bus.parked import Parked

EXCHANGE_INTERVAL_S = 1.0
EXCHANGE_TIMEOUT_S = 2.0
PUBLISH_ENTRIES_MAX = 200
RETRY_DELAY_S_MAX = 2.0
_SYSTEMS = {Road.JETSTREAM: "nats", Road.FEED: "duohuo_feed"}

_logger = structlog.get_logger()


class Replicator:
    """The tasks of one service; run `run` for as long as the service lives."""

    def __init__(
        self,
        role: str,
        topics: Sequence[Topic],
        store: Store,
        mesh: Mesh,
        bus: Bus,
        stamps: Stamps,
        handler: Handler,
        random: Random,
    ) -> None:
        self._role = role
        self._topics = {topic.name: topic for topic in topics}
        self._store = store
        self._mesh = mesh
        self._bus = bus
        self._stamps = stamps
        self._handler = handler
        self._random = random
        self._heads: dict[tuple[str, str], int] = {}
        self._heard_ms: dict[str, int] = {}
        self._current_ms: dict[tuple[str, str], int] = {}
        self._committed = Signal()
        store.on_commit(self._committed.notify)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for topic in self._topics.values():
                if topic.road is Road.JETSTREAM:
                    tasks.create_task(self._persist(partial(self._publish, topic)))
            for peer in self._mesh.peers:
                tasks.create_task(self._persist(partial(self._consume, peer)))
                tasks.create_task(self._persist(partial(self._exchange, peer)))
                for topic in self._topics.values():
                    if topic.road is Road.FEED:
                        tasks.create_task(self._persist(partial(self._follow, peer, topic)))

    async def roads(self) -> list[RoadStatus]:
        """How far this service has applied the others' logs, and by which road."""
        cursors = await self._store.read(inbox.inspect())
        return [
            RoadStatus(
                source_center=cursor.source,
                topic=cursor.topic,
                road=self._topics[cursor.topic].road.value,
                cursor=cursor.seq,
                head=max(cursor.seq, self._heads.get((cursor.source, cursor.topic), 0)),
                heard_time=self._heard(cursor.source),
                parked=cursor.parked,
                from_jetstream=cursor.from_jetstream,
                from_feed=cursor.from_feed,
            )
            for cursor in cursors
            if cursor.topic in self._topics
        ]

    async def retry(self, who: str, waiting: Sequence[Parked]) -> list[ParkedAction]:
        """Applies parked entries once more, each in a unit of its own, in this order."""
        done = []
        for one in waiting:
            spans: list[telemetry.Span] = []
            try:
                arrival = self._arrive(one.source, one.entry, "duohuo_parked", spans)
                unit = parked.retry(who, one, arrival, self._handler)
                action = await self._store.write("retry parked", unit)
            finally:
                for span in spans:
                    span.end()
            if action is not None:
                parked.tell(self._role, action)
                done.append(action)
        return done

    def current_ms(self, source: str, topic: Topic) -> int:
        """Wall time at which the local copy of a topic was last known to be complete; 0 if never."""
        return self._current_ms.get((source, topic.name), 0)

    def _heard(self, source: str) -> Timestamp | None:
        return timestamp(self._heard_ms[source]) if source in self._heard_ms else None

    async def _persist(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeats a task after operating faults, with growing, jittered pauses."""
        delay_s = 0.1
        while True:
            started_ms = self._stamps.clock.monotonic_ms()
            with suppress(BusFault, RpcError, TimeoutError):
                await work()
            lasted_ms = self._stamps.clock.monotonic_ms() - started_ms
            delay_s = 0.1 if lasted_ms > 5000 else min(delay_s * 2, RETRY_DELAY_S_MAX)
            await asyncio.sleep(delay_s * (0.5 + self._random.random() / 2))

    async def _publish(self, topic: Topic) -> None:
        sent = await self._bus.last_published(topic.name)
        while True:
            committed = self._committed.next()
            entries = await self._store.read(log.read_after(topic.name, sent, PUBLISH_ENTRIES_MAX))
            if entries:
                await self._bus.publish(topic.name, entries)
                sent = entries[-1].seq
            else:
                await self._committed.wait(committed)

    async def _consume(self, peer: str) -> None:
        async with aclosing(self._bus.deliveries(peer)) as deliveries:  # type: ignore[type-var]
            async for delivery in deliveries:
                gaps = await self._apply(peer, delivery.entries, Road.JETSTREAM)
                await delivery.acknowledge()
                for topic in sorted(gaps):
                    await self._fill(peer, topic)

    async def _exchange(self, peer: str) -> None:
        behind: dict[str, int] = {}
        while True:
            await self._retry_ahead(peer)
            cursors = await self._store.read(inbox.cursors(peer))
            asked_ms = self._stamps.clock.monotonic_ms()
            answer = await ask(
                self._mesh.at(peer),
                peer_method(self._role, "Exchange"),
                ExchangeRequest(center=self._mesh.here, cursors=cursors),
                ExchangeResponse,
                EXCHANGE_TIMEOUT_S,
            )
            self._heard_ms[peer] = self._stamps.clock.wall_ms()
            self._mesh.clocks.heard(peer, answer.time_ms, asked_ms)
            for topic, head in sorted(answer.heads.items()):
                self._heads[peer, topic] = head
                cursor = cursors.get(topic, 0)
                if cursor >= head:
                    self._current_ms[peer, topic] = self._heard_ms[peer]
                # Behind, and no progress since the last exchange: the bus has lost something.
                if cursor < head and behind.get(topic) == cursor:
                    self._bus.doubt(peer)
                    await self._fill(peer, topic)
                behind[topic] = cursor if cursor < head else -1
            await asyncio.sleep(EXCHANGE_INTERVAL_S)

    async def _retry_ahead(self, peer: str) -> None:
        """Applies entries that were stamped too far ahead, once the local clock has caught up."""
        waiting = await self._store.read(parked.ahead(peer))
        ripe = [one for one in waiting if not self._stamps.hybrid.is_too_far_ahead(one.hlc)]
        if ripe:
            await self.retry(parked.CLOCK, ripe)

    async def _follow(self, peer: str, topic: Topic) -> None:
        await self._pull(peer, topic.name, follow=True)

    async def _fill(self, peer: str, topic: str) -> None:
        await self._pull(peer, topic, follow=False)

    async def _pull(self, peer: str, topic: str, *, follow: bool) -> None:
        cursors = await self._store.read(inbox.cursors(peer))
        request = PullRequest(topic=topic, after_seq=cursors.get(topic, 0), follow=follow)
        call = Call(
            peer_method(self._role, "Pull"), request.SerializeToString(), EXCHANGE_TIMEOUT_S
        )
        async with aclosing(self._mesh.stream(peer, call)) as answers:  # type: ignore[type-var]
            async for payload in answers:
                response = PullResponse.FromString(payload)
                self._heads[peer, topic] = max(self._heads.get((peer, topic), 0), response.head)
                await self._apply(peer, response.entries, Road.FEED)

    async def _apply(self, peer: str, entries: Sequence[LogEntry], road: Road) -> set[str]:
        """Applies entries in order, in one unit; returns the topics that have a gap."""
        arrived = [entry for entry in entries if entry.topic in self._topics]
        if not arrived:
            return set()
        spans: list[telemetry.Span] = []
        try:
            arrivals = [self._arrive(peer, entry, _SYSTEMS[road], spans) for entry in arrived]
            outcomes = await self._store.write(
                "apply", inbox.apply(peer, arrivals, road, self._handler)
            )
        finally:
            for span in spans:
                span.end()
        for entry, outcome in zip(arrived, outcomes, strict=True):
            if outcome is Outcome.PARKED:
                _logger.error("entry parked", source=peer, topic=entry.topic, seq=entry.seq)
        return {
            entry.topic
            for entry, outcome in zip(arrived, outcomes, strict=True)
            if outcome is Outcome.GAP
        }

    def _arrive(
        self, peer: str, entry: LogEntry, system: str, spans: list[telemetry.Span]
    ) -> Arrival:
        """Decodes an entry, and continues the trace of the request that made it."""
        record, unusable = LogRecord(), ""
        try:
            record = LogRecord.FromString(entry.record)
            self._stamps.hybrid.observe(record.hlc)
        except DecodeError:
            unusable = inbox.UNDECODABLE
        except TooFarAhead:
            unusable = inbox.TOO_FAR_AHEAD
        kind = record.WhichOneof("body") or "nothing"
        span, traceparent = telemetry.begin(
            f"apply {kind}",
            {
                "messaging.system": system,
                "messaging.operation.type": "process",
                "messaging.destination.name": entry.topic,
                "duohuo.hop": "cross-center",
                "duohuo.role": self._role,
                "duohuo.source": peer,
                "duohuo.seq": entry.seq,
                **_named(record, kind),
            },
            telemetry.SpanKind.CONSUMER,
            parent=record.traceparent,
        )
        spans.append(span)
        return Arrival(entry, record, self._stamps.now(traceparent), unusable)


def _named(record: LogRecord, kind: str) -> dict[str, str]:
    """The ids by which people look for a trace."""
    body = getattr(record, kind, None)
    body = getattr(body, "application", body)
    found = {
        f"duohuo.{name}": str(getattr(body, name, "")) for name in ("transfer_id", "application_id")
    }
    return {name: value for name, value in found.items() if value}
