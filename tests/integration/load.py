"""Users at work on a real mesh while something is done to it, and what must hold afterwards.

The users and the checks are the simulator's, as in `ops.nemesis`. Besides them somebody registers new
users all the time, so that every road has something to carry.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord, ProfileChanged
from duohuo.v1.account_service_pb2 import Account, RegisterRequest
from duohuo.v1.operator_service_pb2 import CenterStatus, GetStatusRequest, RoadStatus
from ops import verify
from ops.client import ask_operator
from ops.drill import identifier_of
from ops.nemesis.stage import RealMesh
from ops.serve import nats_access_of
from ops.simulation import checks
from ops.simulation.history import History, Outcome
from ops.simulation.workload import User, Workload
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.ids import RandomIds
from runtime.methods import method
from sync_bus.bus import BusFault
from sync_bus.jetstream import JetStreamBus
from tests.integration.conftest import PASSWORD, RunningMesh

USERS = 6
THINK_S = 0.05
INTERVAL_S = 0.1


class Load:
    """Running load; make one with `load_on`."""

    def __init__(self, mesh: RunningMesh) -> None:
        self.stage = RealMesh(mesh.cli.state)
        self.history = History()
        self.registered = 0
        self._ids = RandomIds()
        self._workload = Workload(
            self.stage,
            self.history,
            self._ids.unique(),
            USERS,
            f"load-{self._ids.unique()[-12:]}-",
            THINK_S,
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def users(self) -> list[User]:
        return self._workload.users

    async def start(self) -> None:
        """From its return on every user has an account and money."""
        forever = float("inf")
        self._tasks = [
            asyncio.create_task(self._workload.run(user, forever)) for user in self._workload.users
        ]
        for name in self.stage.names:
            self._tasks.append(asyncio.create_task(self._register(name)))
        await self.until(lambda: len(self.history.of("deposit", Outcome.OK)) == USERS)

    async def stop(self) -> None:
        """Their clients die; what they had asked for may still be done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def more(self, operations: int = 60) -> None:
        """Until the users have got so much more done, in every kind of work."""
        done = len(self._done())
        registered = self.registered
        await self.until(
            lambda: len(self._done()) >= done + operations and self.registered >= registered + 6
        )

    async def until(
        self, holds: Callable[[], bool | Awaitable[bool]], within_s: float = 60.0
    ) -> None:
        """Waits for a condition, and notices when the load itself has failed."""
        async with asyncio.timeout(within_s):
            while True:
                for task in self._tasks:
                    if task.done() and not task.cancelled():
                        task.result()
                found = holds()
                if found if isinstance(found, bool) else await found:
                    return
                await asyncio.sleep(INTERVAL_S)

    async def settled(self, within_s: float = 60.0) -> None:
        """All centers agree, nothing is open or parked, nothing was lost, and nothing came twice."""
        await self.stop()
        report = verify.Report([], [], [], [])

        still_open: list[str] = []

        async def agree() -> bool:
            nonlocal report, still_open
            report = await verify.verify(self.stage.state, 0)
            still_open = [
                *checks.still_open(self.stage),
                *(
                    f"holds at {name}"
                    for name in self.stage.names
                    if self.stage.disk(name).rows("transfer", "SELECT 1 FROM hold WHERE state = 2")
                ),
            ]
            return report.passed and not still_open

        try:
            await self.until(agree, within_s)
        except TimeoutError:
            raise AssertionError(f"{report.text()}\nstill open: {still_open}") from None
        roads = await self.roads()
        assert {road.parked for road in roads.values()} == {0}
        assert [key for key, road in roads.items() if road.cursor != road.head] == []
        found = [
            *self.history.broken,
            *checks.after(self.stage, self._workload.users, self.history),
        ]
        assert not found, "\n".join(found)

    async def roads(self) -> dict[tuple[str, str, str], RoadStatus]:
        """By source, destination and topic."""
        found = {}
        for name in self.stage.names:
            status = await ask_operator(
                self.stage.state, name, "GetStatus", GetStatusRequest(), CenterStatus
            )
            for road in status.roads:
                found[road.source_center, name, road.topic] = road
        return found

    async def jetstream_carries_again(self, within_s: float = 180.0) -> None:
        """New entries of every center come to every other one by JetStream, not only by the feed."""
        before = await self.roads()

        async def carried() -> bool:
            for name in self.stage.names:
                with suppress(RpcError):
                    await self.register(name)
            after = await self.roads()
            return all(
                after[key].from_jetstream > before[key].from_jetstream
                for key in before
                if key[2] == "accounts"
            )

        await self.until(carried, within_s)

    async def fill_jetstream(self, center: str) -> None:
        """Makes a center publish 10 MB that no service knows: more than one file of a stream holds,
        and so many messages that all others together would not reach their number."""
        access = nats_access_of(self.stage.state / center / "center.toml")
        peers = [name for name in self.stage.names if name != center]
        bus = JetStreamBus(access, "account", peers)
        record = LogRecord(profile_changed=ProfileChanged(account_id="x" * 2500))
        entry = LogEntry(topic="unknown", seq=1, record=record.SerializeToString())
        filled = 0

        async def full() -> bool:
            nonlocal filled
            with suppress(BusFault):
                await bus.publish(entry.topic, [entry] * 200)
                filled += 1
            return filled == 20

        try:
            await self.until(full)
        finally:
            await access.close()

    async def register(self, home: str) -> Account:
        """A new user of this home. Raises RpcError."""
        request = RegisterRequest(
            identifier=identifier_of(home, self.stage.names),
            password=PASSWORD,
            request_id=self._ids.unique(),
        )
        called = method("/duohuo.v1.AccountService/Register")
        return await ask(self.stage.gateway(home), called, request, Account, 5.0)

    async def _register(self, home: str) -> None:
        while True:
            with suppress(RpcError):  # its center may be away just now
                await self.register(home)
                self.registered += 1
            await asyncio.sleep(INTERVAL_S)

    def _done(self) -> list[Any]:
        return [one for one in self.history.operations if one.outcome is Outcome.OK]


@asynccontextmanager
async def load_on(mesh: RunningMesh) -> AsyncIterator[Load]:
    """Load on a mesh, already running."""
    load = Load(mesh)
    try:
        await load.start()
        yield load
    finally:
        await load.stop()
        await load.stage.close()
