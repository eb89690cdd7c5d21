"""One simulated mesh: its centers, their processes, disks, brokers and clocks."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from duohuo.internal.v1.peer_services_pb2 import (
    BookDepositRequest,
    ChangeControlRequest,
    EraseAtHomeRequest,
    GetControlRequest,
    HandOverRequest,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountControl,
    CenterFacts,
    GetFactsRequest,
    LiftAnnouncementRequest,
    RaiseAnnouncementRequest,
    SetDrainingRequest,
    SpanRecord,
)
from gateway import ring
from gateway.limits import Limits
from ops import wiring
from ops.simulation.bus import Broker, SimulatedBus
from ops.simulation.clocks import EPOCH_MS, SimulatedClock
from ops.simulation.courier import Receivers, SimulatedCourier, nowhere
from ops.simulation.disk import SimulatedDisk
from ops.simulation.loop import Incarnation, SimulatedLoop
from ops.simulation.network import Network
from ops.simulation.stage import placed
from runtime.center import LocalCenter
from runtime.config import ROLES
from runtime.destinations import Destinations
from runtime.dispatcher import Dispatcher
from runtime.endpoint import Call, Endpoint
from runtime.hlc import HybridClock
from runtime.mesh import Mesh
from runtime.methods import SERVICE_ROLES, method, peer_method
from runtime.placement import Placement
from runtime.store import SqliteStore
from runtime.token_seal import TokenSeal
from sync_bus.log import Stamps
from sync_bus.site import Site

_FACTS = method("/duohuo.v1.OperatorService/GetFacts")
_BOOK_DEPOSIT = peer_method("transfer", "BookDeposit")
_GET_CONTROL = peer_method("transfer", "GetControl")
_ERASE = peer_method("account", "EraseAtHome")
_ANNOUNCE = peer_method("account", "RaiseAnnouncement")
_DRAIN = peer_method("account", "SetDraining")
_LIFT = peer_method("account", "LiftAnnouncement")
_CHANGE_CONTROL = peer_method("transfer", "ChangeControl")
OPERATOR_TIMEOUT_S = 5.0
GATEWAYS_KNOW_S = 4.0


class SeededIds:
    """Ids from the seed, growing with simulated time."""

    def __init__(self, loop: SimulatedLoop, random: Random) -> None:
        self._loop = loop
        self._random = random

    def unique(self) -> str:
        now_ms = EPOCH_MS + int(self._loop.time() * 1000)
        return f"{now_ms:012x}{self._random.getrandbits(80):020x}"

    def secret(self) -> str:
        return f"{self._random.getrandbits(160):043d}"[:43]


class SimulatedPasswords:
    """Passwords that cost nothing to check. What is stored still differs from what is typed. Now and then
    a hash is outdated as soon as it is made."""

    def __init__(self, random: Random) -> None:
        self._random = random

    async def hash(self, password: str) -> str:
        await asyncio.sleep(0.01)
        form = _FORM if self._random.random() < 0.7 else _OUTDATED_FORM
        return form + password[::-1]

    async def verify(self, password_hash: str | None, password: str) -> bool:
        await asyncio.sleep(0.01)
        return password_hash is not None and fits(password_hash, password)

    def is_outdated(self, password_hash: str) -> bool:
        return password_hash.startswith(_OUTDATED_FORM)


_FORM, _OUTDATED_FORM = "hash-of-", "old-hash-of-"


def fits(password_hash: str, password: str) -> bool:
    """Does SimulatedPasswords keep this of a password?"""
    return password_hash in (_FORM + password[::-1], _OUTDATED_FORM + password[::-1])


class NoSpans:
    """Nothing is traced in a simulation."""

    def find(self, _wanted: str) -> list[SpanRecord]:
        return []


@dataclass(slots=True)
class Center:
    """A center's lasting parts, and the process that runs on them now, if any."""

    name: str
    disk: SimulatedDisk
    broker: Broker
    clock: SimulatedClock
    process: Incarnation | None = None
    dispatcher: Dispatcher | None = None
    ready: bool = False
    """Have all services of the process said that they may serve?"""

    @property
    def alive(self) -> bool:
        return self.process is not None and not self.process.dead


class World:
    """All centers of one simulated mesh; a stage for users (`ops.simulation.stage`)."""

    def __init__(self, seed: str, names: list[str], loop: SimulatedLoop, directory: Path) -> None:
        self.loop = loop
        self.seed = seed
        self.network = Network(loop, Random(f"network {seed}"))
        self._first: Placement = _placement(tuple(names))
        self.receivers = Receivers()
        self.crashes: list[str] = []
        self._brokers: dict[str, Broker] = {}
        self.centers: dict[str, Center] = {}
        self._started = 0
        self._drained_until_s: dict[str, float] = {}
        self.may_move = True
        self.log_entries_max = 1_000_000
        self.limits = Limits()
        for name in names:
            random = Random(f"{name} {seed}")
            self._brokers[name] = Broker(name, self.network, random)
            self.centers[name] = Center(
                name,
                SimulatedDisk(directory / name, loop, random),
                self._brokers[name],
                SimulatedClock(loop),
            )

    def start(self, name: str) -> None:
        """Starts a center's process on its disk."""
        center = self.centers[name]
        self._started += 1
        process = Incarnation(self.loop, name)
        center.process, center.ready = process, False
        self.loop.note(f"start {name}")
        process.spawn(self._live(center, process))

    def kill(self, name: str) -> None:
        """SIGKILL: what is committed stays, nothing else does."""
        center = self.centers[name]
        if center.process is not None:
            center.process.dead = True
        center.dispatcher = None
        center.disk.crash()
        self.loop.note(f"kill {name}")

    @property
    def names(self) -> list[str]:
        return list(self.centers)

    @property
    def placement(self) -> Placement:
        """Who is home of what at last, whoever knows it."""
        return placed(self, self._first)

    def now_s(self) -> float:
        return self.loop.time()

    def now_ms(self) -> int:
        return EPOCH_MS + int(self.loop.time() * 1000)

    def note(self, what: str) -> None:
        self.loop.note(what)

    def ids(self, random: Random) -> SeededIds:
        return SeededIds(self.loop, random)

    def disk(self, center: str) -> SimulatedDisk:
        return self.centers[center].disk

    def gateway(self, center: str) -> Endpoint:
        return self.network.connect("client", f"gateway {center}")

    async def deposit(self, center: str, deposit_id: str, account_id: str, amount: int) -> None:
        request = BookDepositRequest(
            deposit_id=deposit_id,
            account_id=account_id,
            amount=Money(currency_code="CNY", minor_units=amount),
        )
        call = Call(_BOOK_DEPOSIT, request.SerializeToString(), OPERATOR_TIMEOUT_S)
        await self.network.connect("client", center).unary(call)

    async def move(self, center: str, slot: int, to: str) -> None:
        for role in ("transfer", "account"):
            request = HandOverRequest(slot=slot, home=to)
            method = peer_method(role, "HandOver")
            call = Call(method, request.SerializeToString(), OPERATOR_TIMEOUT_S)
            await self.network.connect("client", center).unary(call)
        self.network.count("slot moved")

    async def set_frozen(self, center: str, account_id: str, *, frozen: bool) -> None:
        home = self.network.connect("client", center)
        look = GetControlRequest(account_id=account_id).SerializeToString()
        found = await home.unary(Call(_GET_CONTROL, look, OPERATOR_TIMEOUT_S))
        request = ChangeControlRequest(
            account_id=account_id,
            status=ACCOUNT_STATUS_FROZEN if frozen else ACCOUNT_STATUS_OPEN,
            version=AccountControl.FromString(found.payload).version,
        )
        call = Call(_CHANGE_CONTROL, request.SerializeToString(), OPERATOR_TIMEOUT_S)
        await home.unary(call)

    async def set_draining(self, center: str, *, draining: bool) -> None:
        self._drained_until_s[center] = math.inf
        request = SetDrainingRequest(draining=draining)
        call = Call(_DRAIN, request.SerializeToString(), OPERATOR_TIMEOUT_S)
        await self.network.connect("client", center).unary(call)
        self.network.count("drained")
        if not draining:
            self._drained_until_s[center] = self.loop.time() + GATEWAYS_KNOW_S

    async def announce(self, center: str, announcement_id: str) -> None:
        request = RaiseAnnouncementRequest(announcement_id=announcement_id, texts={"en": "Now."})
        call = Call(_ANNOUNCE, request.SerializeToString(), OPERATOR_TIMEOUT_S)
        await self.network.connect("client", center).unary(call)

    async def lift(self, center: str, announcement_id: str) -> None:
        request = LiftAnnouncementRequest(announcement_id=announcement_id)
        call = Call(_LIFT, request.SerializeToString(), OPERATOR_TIMEOUT_S)
        await self.network.connect("client", center).unary(call)

    async def erase(self, center: str, account_id: str) -> None:
        home = self.network.connect("client", center)
        closing = ChangeControlRequest(account_id=account_id, status=ACCOUNT_STATUS_CLOSED)
        await home.unary(Call(_CHANGE_CONTROL, closing.SerializeToString(), OPERATOR_TIMEOUT_S))
        erasing = EraseAtHomeRequest(account_id=account_id)
        await home.unary(Call(_ERASE, erasing.SerializeToString(), OPERATOR_TIMEOUT_S))

    def fits(self, stored: str, password: str) -> bool:
        return fits(stored, password)

    def undisturbed(self, center: str) -> object | None:
        """The process, while it serves users, with all its stores had, and logs them in itself. A full disk
        is no excuse."""
        found = self.centers[center]
        serving = found.alive and found.ready and self.network.serves(f"gateway {center}")
        serving = serving and self._drained_until_s.get(center, 0.0) < self.loop.time()
        return found.process if serving and self.has_all(center) else None

    def has_all(self, center: str) -> bool:
        disk = self.disk(center)
        alive = "SELECT 1 FROM life WHERE generation > 0"
        return all(disk.rows(role, alive) for role in SERVICE_ROLES)

    def all_is_copied(self, center: str) -> bool:
        """Does every other center have everything that this one has made, and has it no promise left?"""
        if self.disk(center).rows("account", "SELECT 1 FROM revocation_due"):
            return False
        peers = [name for name in self.names if name != center]
        for role in SERVICE_ROLES:
            if not self.centers[center].disk.has(role) or not self.has_all(center):
                return False
            for topic, head in self.disk(center).rows(role, "SELECT topic, seq FROM log_head"):
                copied = "SELECT 1 FROM cursor WHERE source = ? AND topic = ? AND seq = ?"
                complete = f"{copied} AND NOT installing"
                for peer in peers:
                    disk = self.disk(peer)
                    if not disk.has(role) or not disk.rows(role, complete, center, topic, head):
                        return False
        return True

    async def facts(self) -> Mapping[str, CenterFacts]:
        """What each living center says of itself, asked without a network."""
        found = {}
        call = Call(_FACTS, GetFactsRequest().SerializeToString(), 60.0)
        for name, center in self.centers.items():
            if center.dispatcher is not None:
                reply = await center.dispatcher.unary(call)
                found[name] = CenterFacts.FromString(reply.payload)
        return found

    async def _live(self, center: Center, process: Incarnation) -> None:
        try:
            await self._run(center, process)
        except Exception as bug:  # noqa: BLE001 - a bug stops the process; the simulator reports it
            self.crashes.append(f"{center.name}: {_innermost(bug)!r}")

    async def _run(self, center: Center, process: Incarnation) -> None:
        name, clock = center.name, center.clock
        random = Random(f"{name} life {self._started} {self.seed}")
        hybrid = HybridClock(clock)
        dispatcher = Dispatcher(name, hybrid)
        local = LocalCenter(dispatcher, {})
        endpoints: dict[str, Endpoint] = {
            peer: local if peer == name else self.network.connect(name, peer)
            for peer in self.centers
        }
        site = Site(
            Mesh(name, endpoints, clock),
            self._first.copy(),
            Stamps(clock, hybrid),
            SeededIds(self.loop, random),
            random,
            log_entries_max=self.log_entries_max,
        )

        async def open_store(role: str, schema: str) -> SqliteStore:
            return center.disk.store(role, schema)

        outside = wiring.Outside(
            open_store,
            lambda role: SimulatedBus(self._brokers, name, role),
            SimulatedPasswords(random),
            NoSpans(),
            SimulatedCourier(self.network, self.receivers, random),
            Destinations(nowhere, networks_allowed=("127.0.0.0/8",)),
            TokenSeal([b"the key of all centers"]),
            email_offered=True,
            limits=self.limits,
        )
        built = await wiring.build(ROLES, site, outside, dispatcher)
        assert built.gateway is not None  # noqa: S101 - the gateway is one of the roles
        center.dispatcher = dispatcher
        self.network.listen(name, process, local)
        self.network.listen(f"gateway {name}", process, built.gateway.router)
        async with asyncio.TaskGroup() as tasks:
            for duty in built.duties:
                tasks.create_task(duty())
            await asyncio.gather(*(wait() for wait in built.wait_alive))
            center.ready = True


_placements: dict[tuple[str, ...], Placement] = {}


def _placement(names: tuple[str, ...]) -> Placement:
    if names not in _placements:
        _placements[names] = ring.compute(dict.fromkeys(names, 1), 1)
    return _placements[names]


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
