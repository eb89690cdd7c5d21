"""JetStream as its worst self: it forgets, repeats, reorders, and acknowledges what it then loses."""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from random import Random

from duohuo.internal.v1.log_pb2 import LogEntry
from ops.simulation.network import Network
from runtime.signal import Signal
from sync_bus.bus import BusFault, Delivery

FETCH_ENTRIES_MAX = 20


@dataclass(slots=True)
class Broker:
    """The NATS server of one center: what it has published, and what it has received, by source."""

    center: str
    network: Network
    random: Random
    up: bool = True
    forgetful: float = 0.0
    repeating: float = 0.0
    published: dict[tuple[str, str], LogEntry] = field(default_factory=dict)
    backlog: dict[str, list[tuple[str, LogEntry]]] = field(default_factory=dict)
    received: dict[tuple[str, str], list[LogEntry]] = field(default_factory=dict)
    acknowledged: dict[tuple[str, str], int] = field(default_factory=dict)
    arrived: dict[tuple[str, str], Signal] = field(default_factory=lambda: defaultdict(Signal))

    def wipe(self) -> None:
        """Loses everything: what waits to be sent, what was received, and what was acknowledged."""
        for kept in (self.published, self.backlog, self.received, self.acknowledged):
            kept.clear()
        for arrived in self.arrived.values():
            arrived.notify()

    def receive(self, source: str, role: str, entry: LogEntry) -> None:
        if not self.up:
            return
        stream = self.received.setdefault((source, role), [])
        stream.append(entry)
        if self.random.random() < self.repeating:
            self.network.count("bus repeated")
            stream.append(self.random.choice(stream))
        self.arrived[source, role].notify()


class SimulatedBus:
    """One service's use of its center's broker."""

    def __init__(self, brokers: dict[str, Broker], center: str, role: str) -> None:
        self._brokers = brokers
        self._broker = brokers[center]
        self._center = center
        self._role = role

    async def last_published(self, topic: str) -> LogEntry | None:
        await self._reach()
        return self._broker.published.get((self._role, topic))

    async def publish(self, topic: str, entries: Sequence[LogEntry]) -> None:
        broker = self._broker
        await self._reach()
        for entry in entries:
            broker.published[self._role, topic] = entry
            if broker.random.random() < broker.forgetful:
                broker.network.count("bus forgot")
                continue
            for peer in self._brokers:
                if peer != self._center:
                    broker.backlog.setdefault(peer, []).append((self._role, entry))
        await self._reach()
        for peer in self._brokers:
            if peer != self._center:
                self._forward(peer)

    async def deliveries(self, source: str) -> AsyncIterator[Delivery]:
        key = source, self._role
        position = self._broker.acknowledged.get(key, 0)
        signal = self._broker.arrived[key]
        await self._reach()
        while True:
            arrived = signal.next()
            there = len(self._broker.received.get(key, ()))
            position = min(position, there)
            if position == there:
                await signal.wait(arrived, 5.0)
                SimulatedBus(self._brokers, source, self._role)._forward(self._center)
            await self._reach()
            batch = self._broker.received.get(key, [])[position : position + FETCH_ENTRIES_MAX]
            if batch:
                position += len(batch)
                yield Delivery(batch, self._acknowledgement(key, position))

    def doubt(self, source: str) -> None:
        """Nothing here gets stuck that a retry would not move."""

    def _acknowledgement(self, key: tuple[str, str], position: int) -> "Acknowledge":
        return Acknowledge(self._broker, key, position)

    def _forward(self, peer: str) -> None:
        """Sends the backlog for a peer over the link, in order, if the link is up."""
        broker, target = self._broker, self._brokers[peer]
        network = broker.network
        if not broker.up or not target.up or (self._center, peer) in network.conditions.cut:
            return
        delay_s = 0.0
        for role, entry in broker.backlog.pop(peer, []):
            delay_s = max(delay_s, network.delay_s(self._center, peer))
            network.later(delay_s, target.receive, self._center, role, entry)

    async def _reach(self) -> None:
        await self._broker.network.pause(self._broker.random.random() * 0.003)
        if not self._broker.up:
            await self._broker.network.pause(0.2)
            raise BusFault


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Remembers how far a service has taken what arrived."""

    broker: Broker
    key: tuple[str, str]
    position: int

    async def __call__(self) -> None:
        present = self.broker.acknowledged.get(self.key, 0)
        self.broker.acknowledged[self.key] = max(present, self.position)
