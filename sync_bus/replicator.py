"""Keeps both roads moving for one service: publishes its log, applies the others'.

Per topic on the JetStream road, one publisher. Per other center: one consumer of the bus, one
exchange of cursors against heads every second (it confirms what was applied, and finds what the bus
lost), and one follower for each topic on the feed road.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial

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
from duohuo.v1.operator_service_pb2 import RoadStatus
from runtime import telemetry
from runtime.clock import timestamp
from runtime.endpoint import Call, answer_of, ask
from runtime.errors import RpcError
from runtime.hlc import TooFarAhead
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Store
from sync_bus import audit, inbox, lag, log, parked
from sync_bus.audit import Action
from sync_bus.bus import Bus, BusFault
from sync_bus.growth import Growth
from sync_bus.inbox import Arrival, Cursor, Handler, Outcome
from sync_bus.lag import Sight
from sync_bus.log import Road, Topic
from sync_bus.parked import Parked
from sync_bus.site import Site
from sync_bus.snapshot import Snapshots

EXCHANGE_INTERVAL_S = 1.0
EXCHANGE_TIMEOUT_S = 2.0
PUBLISH_ENTRIES_MAX = 200
RETRY_DELAY_S_MAX = 2.0
TRACED_ENTRIES_MAX = 100
"""More entries than this arrive together only in a catch-up. They go on in their traces without a span
for each: recording one costs more than applying the entry."""
_SYSTEMS = {Road.JETSTREAM: "nats", Road.FEED: "duohuo_feed"}

_logger = structlog.get_logger()


class Replicator:
    """The tasks of one service; run `run` for as long as the service lives."""

    def __init__(
        self,
        role: str,
        topics: Sequence[Topic],
        store: Store,
        site: Site,
        bus: Bus,
        handler: Handler,
        snapshots: Snapshots,
        growth: Growth,
    ) -> None:
        self._role = role
        self._topics = {topic.name: topic for topic in topics}
        self._store = store
        self._mesh = site.mesh
        self._bus = bus
        self._stamps = site.stamps
        self._handler = handler
        self._random = site.random
        self._log_entries_max = site.log_entries_max
        self._snapshots = snapshots
        self._heads: dict[tuple[str, str], int] = {}
        self._heard_ms: dict[str, int] = {}
        self._heard_monotonic_ms: dict[str, int] = {}
        self._sights: dict[tuple[str, str], Sight] = {}
        self._lost: dict[str, set[str]] = {peer: set() for peer in self._mesh.peers}
        self._found_lost = Signal()
        self._current_ms: dict[tuple[str, str], int] = {}
        self._growth = growth

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._persist(self._bound))
            for topic in self._topics.values():
                if topic.road is Road.JETSTREAM:
                    tasks.create_task(self._persist(partial(self._publish, topic)))
            for peer in self._mesh.peers:
                tasks.create_task(self._persist(partial(self._consume, peer)))
                tasks.create_task(self._persist(partial(self._exchange, peer)))
                tasks.create_task(self._persist(partial(self._fill_lost, peer)))
                for topic in self._topics.values():
                    if topic.road is Road.FEED:
                        tasks.create_task(self._persist(partial(self._follow, peer, topic)))

    async def roads(self) -> list[RoadStatus]:
        """How far this service has applied the others' logs, and by which road."""
        cursors = await self._store.read(inbox.inspect())
        return [self._road(cursor) for cursor in cursors if cursor.topic in self._topics]

    async def retry(self, who: str, waiting: Sequence[Parked]) -> list[Action]:
        """Applies parked entries once more, each in a unit of its own, in this order."""
        done = []
        for one in waiting:
            spans: list[telemetry.Span] = []
            try:
                arrival = self._arrive(one.source, one.entry, "duohuo_parked", spans)
                here = self._mesh.here
                unit = parked.retry(self._role, here, who, one, arrival, self._handler)
                action = await self._store.write("retry parked", unit)
            finally:
                for span in spans:
                    span.end()
            if action is not None:
                audit.tell(self._role, action)
                done.append(action)
        return done

    def current_ms(self, source: str, topic: Topic) -> int:
        """Wall time at which the local copy of a topic was last known to be complete; 0 if never."""
        return self._current_ms.get((source, topic.name), 0)

    def _road(self, cursor: Cursor) -> RoadStatus:
        now_ms = self._stamps.clock.monotonic_ms()
        name = cursor.source, cursor.topic
        head = max(cursor.seq, self._heads.get(name, 0))
        behind = lag.measure(self._sights.get(name), cursor.seq, head, now_ms)
        heard_ms = self._heard_monotonic_ms.get(cursor.source)
        return RoadStatus(
            source_center=cursor.source,
            topic=cursor.topic,
            road=self._topics[cursor.topic].road.value,
            cursor=cursor.seq,
            head=head,
            heard_time=self._heard(cursor.source),
            parked=cursor.parked,
            from_jetstream=cursor.from_jetstream,
            from_feed=cursor.from_feed,
            installing=cursor.installing,
            diverged=cursor.diverged,
            repaired=cursor.repaired,
            lag_ms=behind.lag_ms,
            catch_up_ms=behind.catch_up_ms,
            heard_ago_ms=None if heard_ms is None else now_ms - heard_ms,
        )

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

    async def _bound(self) -> None:
        """Keeps the log short while a center is away for long."""
        while True:
            for topic in self._topics:
                if not await self._store.read(log.is_too_long(topic, self._log_entries_max)):
                    continue
                unit = log.bound(topic, self._log_entries_max)
                for destination in await self._store.write("bound", unit):
                    _logger.error(
                        "center away for too long: it will need a snapshot",
                        center=destination,
                        topic=topic,
                        entries_max=self._log_entries_max,
                    )
            await asyncio.sleep(EXCHANGE_INTERVAL_S)

    async def _publish(self, topic: Topic) -> None:
        last = await self._bus.last_published(topic.name)
        life = await self._store.read(log.life())
        # What the bus holds of an earlier life does not count.
        sent = last.seq if last is not None and last.generation == life.generation else 0
        grown = self._growth.of(topic.name)
        while True:
            change = grown.next()
            entries = await self._store.read(log.read_after(topic.name, sent, PUBLISH_ENTRIES_MAX))
            if entries:
                await self._bus.publish(topic.name, entries)
                sent = entries[-1].seq
            else:
                await grown.wait(change)

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
            generation = await self._store.read(inbox.generation_of(peer))
            asked_ms = self._stamps.clock.monotonic_ms()
            answer = await ask(
                self._mesh.at(peer),
                peer_method(self._role, "Exchange"),
                ExchangeRequest(center=self._mesh.here, cursors=cursors, generation=generation),
                ExchangeResponse,
                EXCHANGE_TIMEOUT_S,
            )
            self._heard_ms[peer] = self._stamps.clock.wall_ms()
            self._heard_monotonic_ms[peer] = self._stamps.clock.monotonic_ms()
            self._mesh.clocks.heard(peer, answer.time_ms, asked_ms)
            if not await self._follows(peer, generation, answer):
                await asyncio.sleep(EXCHANGE_INTERVAL_S)
                continue
            self._see(peer, cursors, answer)
            for topic in await self._store.read(inbox.incomplete(peer)):
                self._lost[peer].add(topic)
                self._found_lost.notify()
            for topic in sorted(answer.heads):
                head = answer.heads[topic]
                cursor = cursors.get(topic, 0)
                if cursor >= head:
                    self._current_ms[peer, topic] = self._heard_ms[peer]
                # Behind, and no progress since the last exchange: the bus has lost something.
                if cursor < head and behind.get(topic) == cursor:
                    self._bus.doubt(peer)
                    self._lost[peer].add(topic)
                    self._found_lost.notify()
                behind[topic] = cursor if cursor < head else -1
            await asyncio.sleep(EXCHANGE_INTERVAL_S)

    def _see(self, peer: str, cursors: Mapping[str, int], answer: ExchangeResponse) -> None:
        """Notes what a source has answered about its topics."""
        now_ms = self._stamps.clock.monotonic_ms()
        for topic in answer.heads:
            head = answer.heads[topic]
            waiting_ms = None
            if topic in answer.missing_since_ms:
                waiting_ms = max(answer.time_ms - answer.missing_since_ms[topic], 0)
            before = self._sights.get((peer, topic))
            cursor = cursors.get(topic, 0)
            self._heads[peer, topic] = head
            self._sights[peer, topic] = lag.see(before, now_ms, cursor, head, waiting_ms)

    async def _fill_lost(self, peer: str) -> None:
        """Fills what the exchange has found to be lost. That may take long; the exchange goes on."""
        while True:
            found = self._found_lost.next()
            for topic in sorted(self._lost[peer]):
                await self._fill(peer, topic)
                self._lost[peer].discard(topic)
            await self._found_lost.wait(found)

    async def _follows(self, peer: str, known: int, answer: ExchangeResponse) -> bool:
        """Is the source alive, and in a life in which this center can follow it?"""
        if answer.generation == known:
            return known > 0
        if answer.generation < known:
            return False  # it has not begun the life for which it has sealed this center
        unit = inbox.adopt(peer, answer.generation, answer.bases)
        followed = await self._store.write("adopt", unit)
        if not followed:
            _logger.error("source lost entries that were applied here", source=peer)
        return followed

    async def _retry_ahead(self, peer: str) -> None:
        """Applies entries that were stamped too far ahead, once the local clock has caught up."""
        waiting = await self._store.read(parked.ahead(peer))
        ripe = [one for one in waiting if not self._stamps.hybrid.is_too_far_ahead(one.hlc)]
        if ripe:
            await self.retry(audit.CLOCK, ripe)

    async def _follow(self, peer: str, topic: Topic) -> None:
        await self._pull(peer, topic.name, follow=True)

    async def _fill(self, peer: str, topic: str) -> None:
        await self._pull(peer, topic, follow=False)

    async def _pull(self, peer: str, topic: str, *, follow: bool) -> None:
        copy = await self._store.read(inbox.copy_of(peer, topic))
        if copy.installing:
            await self._snapshots.install(peer, topic)
            return
        try:
            await self._pull_after(peer, topic, copy.position.seq, follow=follow)
        except RpcError as error:
            if error.reason != "SNAPSHOT_NEEDED":
                raise
            await self._snapshots.install(peer, topic)

    async def _pull_after(self, peer: str, topic: str, seq: int, *, follow: bool) -> None:
        request = PullRequest(topic=topic, after_seq=seq, follow=follow)
        call = Call(
            peer_method(self._role, "Pull"), request.SerializeToString(), EXCHANGE_TIMEOUT_S
        )
        async with aclosing(self._mesh.stream(peer, call)) as answers:  # type: ignore[type-var]
            async for payload in answers:
                response = answer_of(payload, PullResponse)
                self._heads[peer, topic] = max(self._heads.get((peer, topic), 0), response.head)
                await self._apply(peer, response.entries, Road.FEED)

    async def _apply(self, peer: str, entries: Sequence[LogEntry], road: Road) -> set[str]:
        """Applies entries in order, in one unit; returns the topics that have a gap."""
        arrived = [entry for entry in entries if entry.topic in self._topics]
        if not arrived:
            return set()
        spans: list[telemetry.Span] = []
        kept = spans if len(arrived) <= TRACED_ENTRIES_MAX else None
        try:
            arrivals = [self._arrive(peer, entry, _SYSTEMS[road], kept) for entry in arrived]
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
        self, peer: str, entry: LogEntry, system: str, spans: list[telemetry.Span] | None
    ) -> Arrival:
        """Decodes an entry, and continues the trace of the request that made it: with a span of its
        own if there is a list to keep that."""
        record, unusable = LogRecord(), ""
        try:
            record = LogRecord.FromString(entry.record)
            self._stamps.hybrid.observe(record.hlc)
        except DecodeError:
            unusable = inbox.UNDECODABLE
        except TooFarAhead:
            unusable = inbox.TOO_FAR_AHEAD
        if spans is None or not record.traceparent:
            return Arrival(entry, record, self._stamps.now(record.traceparent), unusable)
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
