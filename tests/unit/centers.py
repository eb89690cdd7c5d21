"""One whole service of several centers in one process, and the lines between them in a test's hands."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import account_svc.app
import transfer_svc.app
from account_svc.passwords import Passwords
from duohuo.internal.v1.peer_services_pb2 import (
    CollectFactsRequest,
    ExchangeRequest,
    ExchangeResponse,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import CenterFacts, CopyName
from duohuo.v1.transfer_service_pb2 import APPLICATION_STATE_QUEUED, Application
from ops.verify import judge
from runtime.dispatcher import Dispatcher, Incoming
from runtime.endpoint import Call, Endpoint, Reply, ask
from runtime.errors import unreachable
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.store import SqliteStore
from sync_bus import inbox, log, recovery, snapshot
from sync_bus.anti_entropy import AntiEntropy
from sync_bus.bus import Delivery
from sync_bus.facts import digest_of
from sync_bus.log import Topic
from sync_bus.node import ServiceNode
from sync_bus.recovery import Recovery
from tests.fakes import FakeClock, FakeCourier, placement, resolves, see, site, temporary_store
from tests.unit.bank import Bank, Center
from transfer_svc import applications

ROUNDS_MAX = 100
TURNS_MAX = 10_000
BECOMES_LOST_AFTER_MS = 1000
"""Between a center's start and its loss: two lives must not begin in the same millisecond."""


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until the condition holds."""
    for _ in range(TURNS_MAX):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come true")


class NoBus:
    """Takes everything and brings nothing: the feed must do."""

    async def last_published(self, _topic: str) -> None:
        return None

    async def publish(self, _topic: str, _entries: object) -> None:
        return None

    def doubt(self, _source: str) -> None:
        """There is nothing to doubt."""

    async def deliveries(self, _source: str) -> AsyncIterator[Delivery]:
        await asyncio.Event().wait()
        yield Delivery([], lambda: asyncio.sleep(0))


class NoPasswords(Passwords):
    """Nobody logs in."""

    async def hash(self, password: str) -> str:
        raise NotImplementedError

    async def verify(self, password_hash: str | None, password: str) -> bool:
        raise NotImplementedError

    def is_outdated(self, password_hash: str) -> bool:
        raise NotImplementedError


@dataclass
class Service(Center):
    """One center's service on its present store."""

    dispatcher: Dispatcher
    node: ServiceNode
    role: str
    topics: Sequence[Topic]

    @property
    def recovery(self) -> Recovery:
        return self.node._recovery

    @property
    def anti_entropy(self) -> AntiEntropy:
        return self.node._anti_entropy

    async def exchange(self, peer: str) -> bool:
        """Tells a peer how far its topics have been applied here, and hears of its life; False if this
        center cannot follow it."""
        cursors = await self.store.read(inbox.cursors(peer))
        generation = await self.store.read(inbox.generation_of(peer))
        answer = await ask(
            self.site.mesh.at(peer),
            peer_method(self.role, "Exchange"),
            ExchangeRequest(center=self.site.here, cursors=cursors, generation=generation),
            ExchangeResponse,
            1.0,
        )
        return await self.node._replicator._follows(peer, generation, answer)

    async def fill(self, peer: str, topic: str) -> None:
        await self.node._replicator._fill(peer, topic)

    async def follow(self, peer: str) -> None:
        """One exchange, then everything that the peer has."""
        if await self.exchange(peer):
            for topic in self.topics:
                await self.fill(peer, topic.name)

    async def cursor(self, source: str, topic: str) -> int:
        return (await self.store.read(inbox.cursors(source)))[topic]

    async def copy_of(self, source: str, topic: str) -> inbox.Copy:
        return await self.store.read(inbox.copy_of(source, topic))

    async def digest(self, source: str, topic: Topic) -> str:
        return await self.store.read(digest_of(topic, source))

    async def repaired(self) -> dict[str, int]:
        """How many rows were put right, by source."""
        cursors = await self.store.read(inbox.inspect())
        sources = {cursor.source for cursor in cursors}
        return {
            source: sum(cursor.repaired for cursor in cursors if cursor.source == source)
            for source in sources
        }


@dataclass
class Line:
    """How other centers reach one. `parts_left` of its streams pass, then it breaks once."""

    centers: "Centers"
    name: str
    parts_left: float = math.inf
    seen: list[Call] = field(default_factory=list)

    async def unary(self, call: Call) -> Reply:
        self._check()
        self.seen.append(call)
        return await self.centers.service(self.name).dispatcher.unary(call)

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        self._check()
        self.seen.append(call)
        async for part in self.centers.service(self.name).dispatcher.stream(call):
            if self.parts_left <= 0:
                self.parts_left = math.inf
                raise unreachable(self.name, ran=True)
            self.parts_left -= 1
            yield part

    def _check(self) -> None:
        if self.name in self.centers.silent:
            raise unreachable(self.name, ran=False)


@dataclass
class Centers(Bank):
    """Services by their center's name; `silent` ones answer nobody."""

    role: str = "transfer"
    lone_start: bool = False
    passwords: Passwords = field(default_factory=NoPasswords)
    clock: FakeClock = field(default_factory=FakeClock)
    names: Sequence[str] = ()
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    lines: dict[str, Line] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def service(self, name: str) -> Service:
        found = self.centers[name]
        assert isinstance(found, Service)
        return found

    @property
    def topics(self) -> Sequence[Topic]:
        return account_svc.app.TOPICS if self.role == "account" else transfer_svc.app.TOPICS

    async def new_store(self, name: str, *, alive: bool = False) -> SqliteStore:
        schema = account_svc.app.SCHEMA if self.role == "account" else transfer_svc.app.SCHEMA
        peers = [other for other in self.names if other != name]
        return await self.stack.enter_async_context(
            temporary_store(schema, self.topics, peers, alive=alive, first=placement(*self.names))
        )

    def start(self, name: str, store: SqliteStore, clock: FakeClock | None = None) -> Service:
        """A new process of a center, on a store."""
        plain = site(name, *self.names, clock=clock or self.clock)
        endpoints: dict[str, Endpoint] = {one: self.lines[one] for one in self.names}
        mesh = Mesh(name, endpoints, plain.clock)
        own = replace(plain, mesh=mesh, lone_start=self.lone_start)
        dispatcher = Dispatcher(name, own.stamps.hybrid)
        bus = NoBus()
        if self.role == "account":
            accounts = account_svc.app.build(
                own, store, bus, self.passwords, dispatcher, resolves(), email_offered=True
            )
            node, slots = accounts.node, accounts.homes
        else:
            transfers = transfer_svc.app.build(own, store, bus, dispatcher, FakeCourier())
            node, slots = transfers.node, transfers.homes
        made = Service(own, store, slots, dispatcher, node, self.role, self.topics)
        self.centers[name] = made
        return made

    async def lose_disk(self, name: str) -> Service:
        """The center's process starts again on an empty store; its life has not begun."""
        self.clock.advance(BECOMES_LOST_AFTER_MS)
        return self.start(name, await self.new_store(name))

    async def recover(self, name: str) -> Service:
        """The center loses its disk and gets everything back; it has not followed the others yet."""
        service = await self.lose_disk(name)
        await service.recovery.run()
        return service

    async def apply(
        self, origin: str, payer: str, payee: str, minor_units: int, transfer_id: str
    ) -> str:
        """Queues an application at a center; returns its id."""
        service = self.service(origin)
        application = Application(
            application_id=f"{transfer_id} at {origin}",
            transfer_id=transfer_id,
            state=APPLICATION_STATE_QUEUED,
            payer_account_id=payer,
            payee_account_id=payee,
            origin_center=origin,
            amount=Money(currency_code="CNY", minor_units=minor_units),
        )
        unit = applications.accept(
            application, b"body", self.home(payer).site.here, service.site.stamps.now()
        )
        return (await service.store.write("accept", unit)).message.application_id

    def hush(self, *names: str) -> None:
        """From now on these answer nobody."""
        self.silent.update(names)

    def answer(self, name: str) -> None:
        """It answers, and everybody has seen that it does."""
        self.silent.discard(name)
        for other in self.names:
            if other != name:
                see(self.service(other).site.mesh, name, answering=True)

    async def settle(self) -> None:
        """All follow all until nothing changes any more."""
        before = None
        for _ in range(ROUNDS_MAX):
            now = [await self._progress(name) for name in self.names]
            if now == before:
                return
            before = now
            for name in self.names:
                for peer in self.names:
                    if peer != name:
                        await self.service(name).follow(peer)
        raise AssertionError("centers do not settle")

    async def facts(
        self, compare: Mapping[str, Sequence[CopyName]] | None = None
    ) -> dict[str, CenterFacts]:
        """Of each center, some also comparing copies row by row."""
        found = {}
        for name in self.names:
            request = CollectFactsRequest(compare=(compare or {}).get(name, ()))
            one = await self.service(name).node.CollectFacts(request, Incoming("", 60))
            found[name] = CenterFacts(
                ledger_sums=one.ledger_sums,
                digests=one.digests,
                violations=one.violations,
                transits=one.transits,
                compared=one.compared,
            )
        return found

    async def check_same(self) -> None:
        """What `duohuo verify` says of them."""
        report = judge(await self.facts(), list(self.names))
        assert report.passed, report.text()

    async def _progress(self, name: str) -> object:
        store = self.service(name).store
        peers = [peer for peer in self.names if peer != name]
        copies = [
            await store.read(inbox.copy_of(peer, topic.name))
            for peer in peers
            for topic in self.topics
        ]
        return await store.read(log.heads()), copies


@asynccontextmanager
async def centers(
    *names: str,
    role: str = "transfer",
    lone_start: bool = False,
    passwords: Passwords | None = None,
) -> AsyncIterator[Centers]:
    """Centers in their first life, with all pauses taken out."""
    async with AsyncExitStack() as stack:
        stack.enter_context(patch.object(snapshot, "ROWS_PER_S_MAX", math.inf))
        stack.enter_context(patch.object(recovery, "RETRY_DELAY_S", 0))
        made = Centers(
            role=role,
            lone_start=lone_start,
            passwords=passwords or NoPasswords(),
            names=names,
            stack=stack,
        )
        made.lines = {name: Line(made, name) for name in names}
        for name in names:
            made.start(name, await made.new_store(name, alive=True))
        for name in names:
            await made.service(name).recovery.run()
        yield made
