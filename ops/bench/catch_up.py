"""Catch-up: a center was away while another one went on; how fast does it apply what it has missed?

Two real centers on one machine. While b is stopped, a's log grows by many entries of one kind. Then b
is started, and its status is asked until its cursors have reached a's heads. All the while a user asks
a for an account, to see what the catch-up costs those who are served. `duohuo verify` must pass at the
end. The cases are kinds of entries: `ledger` (transfers; normally by JetStream) and `changes`
(profile fields; by the change feed).
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from account_svc.passwords import Argon2Passwords
from account_svc.registry import AccountRow
from duohuo.v1.account_service_pb2 import Account, GetAccountRequest
from duohuo.v1.operator_service_pb2 import CenterStatus, GetStatusRequest, RoadStatus
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from ops import mesh_file, verify
from ops.bench.backlog import Writer
from ops.bench.benchmark import Benchmark, Figures, Setup
from ops.bench.calls import Calls
from ops.bench.mesh import command_center, processor_s, running_mesh
from ops.client import Client, Login, Sessions, ask_operator
from ops.local_config import config_name
from ops.output import Failure
from ops.serve import nats_access_of
from ops.status import duration
from runtime.errors import RpcError
from sync_bus.bus import BusFault
from sync_bus.jetstream import JetStreamBus

SOURCE, BACK = "a", "b"
LEDGER, CHANGES = "ledger", "changes"
USERS = 1000
PASSWORD = "bench-Passw0rd"  # noqa: S105 - of users that exist for the benchmark alone
COPIED_WITHIN_S = 60.0
VERIFIED_WITHIN_S = 60.0
STUCK_AFTER_S = 60.0
PUBLISHED_WITHIN_S = 300.0
BEFORE_S = 5.0
POLL_INTERVAL_S = 0.1
POLL_INTERVAL_AWAY_S = 0.02
TELL_INTERVAL_S = 2.0


async def run(case: str, setup: Setup) -> Figures:
    """One outage and one catch-up. Raises Failure, RpcError or ControlError."""
    writer = Writer(SOURCE, (SOURCE, BACK), setup.directory / SOURCE / "stores")
    passwords = Argon2Passwords()
    password_hash = await passwords.hash(PASSWORD)
    passwords.close()
    async with running_mesh(setup.directory, writer.centers, setup.port_base):
        setup.tell(f"making {USERS} users at {SOURCE}")
        await command_center(setup.directory, "stop", SOURCE)
        users = await writer.make_users(USERS, password_hash)
        await command_center(setup.directory, "start", SOURCE)
        await verified(setup, COPIED_WITHIN_S)
        copied = await writer.heads()
        await command_center(setup.directory, "stop", BACK)
        await command_center(setup.directory, "stop", SOURCE)
        await _make(case, writer, users, setup)
        heads = await writer.heads()
        await command_center(setup.directory, "start", SOURCE)
        if case == LEDGER:
            await _wait_published(heads[case], setup)
        figures = await _measure(case, copied[case], heads, users[0], setup)
        setup.tell("verify")
        await verified(setup, VERIFIED_WITHIN_S)
    return figures


CATCH_UP = Benchmark("catch-up", (LEDGER, CHANGES), run)


@dataclass(slots=True)
class Watch:
    """What was seen of the center that catches up."""

    topic: str
    heads: Mapping[str, int]
    """What it has to reach, by topic."""
    start: int
    """Its cursor of the topic when it went away."""
    away_s: float
    """The last moment at which it did not answer."""
    moved_s: float
    """The last moment at which its cursor had moved."""
    roads: Mapping[str, RoadStatus] = field(default_factory=dict)
    processor_s: float | None = None
    first: tuple[RoadStatus, float] | None = None
    """The topic and the processor time when that was first known: starting up is not applying."""

    def saw(self, now_s: float, roads: Mapping[str, RoadStatus], processor_s: float | None) -> None:
        """Takes what its status said, and the processor time that its process has used."""
        before = self.roads[self.topic].cursor if self.roads else -1
        if self.first is None and processor_s is not None:
            self.first = roads[self.topic], processor_s
        self.roads, self.processor_s = roads, processor_s
        if self.cursor > before:
            self.moved_s = now_s

    def require_progress(self, now_s: float) -> None:
        """Raises Failure if it has stood still, or not answered, for too long."""
        if now_s - self.moved_s > STUCK_AFTER_S:
            reached = self.cursor if self.roads else self.start
            raise Failure(
                f"{BACK} has not moved for {STUCK_AFTER_S:.0f} s: it has applied"
                f" {reached} of {self.heads[self.topic]} entries of {self.topic}"
            )

    @property
    def cursor(self) -> int:
        return self.roads[self.topic].cursor

    def is_done(self) -> bool:
        return all(
            topic in self.roads and self.roads[topic].cursor >= head
            for topic, head in self.heads.items()
        )

    def figures(self) -> Figures:
        """The rate from the last moment at which it did not answer to the last entry."""
        entries, took_s = self.cursor - self.start, self.moved_s - self.away_s
        figures = {"entries_per_s": entries / took_s, "catch_up_s": took_s}
        if self.first is None or self.processor_s is None:
            return figures
        road, processor_s = self.first
        if applied := self.cursor - road.cursor:
            used_us = (self.processor_s - processor_s) * 1e6
            figures["processor_us_per_entry"] = used_us / applied
            by_feed = self.roads[self.topic].from_feed - road.from_feed
            figures["by_feed_percent"] = 100 * by_feed / applied
        return figures

    def told(self, now_s: float) -> str:
        """A line for people."""
        done, wanted = self.cursor - self.start, self.heads[self.topic] - self.start
        rate = done / max(now_s - self.away_s, 0.001)
        left = ""
        if self.roads[self.topic].HasField("catch_up_ms"):
            left = f", {duration(self.roads[self.topic].catch_up_ms)} left by its own estimate"
        return f"{done} of {wanted} entries applied, {rate:.0f}/s{left}"


async def _measure(
    topic: str, start: int, heads: Mapping[str, int], user: AccountRow, setup: Setup
) -> Figures:
    """Starts the center that was away and watches it until it has everything."""
    mesh = mesh_file.read(setup.directory)
    client = Client({SOURCE: mesh.centers[SOURCE].gateway}, Sessions())
    try:
        call = await _logged_in(client, user)
        before, during = Calls(call), Calls(call)
        setup.tell(f"asking {SOURCE} for {BEFORE_S:.0f} s while {BACK} is away")
        await before.run_for(BEFORE_S)
        setup.tell(f"starting {BACK}")
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(during.run())
            tasks.create_task(command_center(setup.directory, "start", BACK))
            watch = await _watch(topic, start, heads, setup)
            asking.cancel()
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await client.close()
    return {**watch.figures(), **before.figures("before"), **during.figures("during")}


async def _watch(topic: str, start: int, heads: Mapping[str, int], setup: Setup) -> Watch:
    """Asks for the status until all is applied."""
    told_s = time.monotonic()
    watch = Watch(topic, heads, start, away_s=told_s, moved_s=told_s)
    while True:
        roads = await _roads(setup)
        now_s = time.monotonic()
        watch.require_progress(now_s)
        if roads is None and not watch.roads:
            watch.away_s = now_s
            await asyncio.sleep(POLL_INTERVAL_AWAY_S)
            continue
        if roads is not None:
            # Its process is not listed before it says that it is ready; it applies before that.
            pid = mesh_file.read(setup.directory).centers[BACK].pids.get("serve")
            watch.saw(now_s, roads, processor_s(pid) if pid is not None else None)
        if watch.is_done():
            return watch
        if now_s - told_s > TELL_INTERVAL_S:
            told_s = now_s
            setup.tell(watch.told(now_s))
        await asyncio.sleep(POLL_INTERVAL_S)


async def _roads(setup: Setup) -> Mapping[str, RoadStatus] | None:
    """How far the center that was away has applied each topic; None if it does not answer."""
    try:
        status = await ask_operator(
            setup.directory, BACK, "GetStatus", GetStatusRequest(), CenterStatus, timeout_s=5.0
        )
    except RpcError:
        return None
    return {road.topic: road for road in status.roads} if not status.silent_roles else None


async def _make(case: str, writer: Writer, users: list[AccountRow], setup: Setup) -> None:
    told = _every(10, setup.entries, setup.tell)
    if case == LEDGER:
        await writer.transfer(users, setup.entries, told)
    else:
        await writer.change_profiles(users, setup.entries, told)


def _every(parts: int, entries: int, tell: Callable[[str], None]) -> Callable[[int], None]:
    """Tells about so many times how much is done."""
    told = 0

    def done(count: int) -> None:
        nonlocal told
        if count * parts // entries > told:
            told = count * parts // entries
            tell(f"{count} of {entries} entries made at {SOURCE} while {BACK} is away")

    return done


async def _wait_published(head: int, setup: Setup) -> None:
    """Until the source's JetStream holds what was made: an outage lasts longer than publishing does."""
    setup.tell(f"waiting until {SOURCE} has published them to its JetStream")
    access = nats_access_of(setup.directory / SOURCE / config_name("serve"))
    bus = JetStreamBus(access, "transfer", [BACK])
    try:
        async with asyncio.timeout(PUBLISHED_WITHIN_S):
            while await _last_published(bus) < head:  # noqa: ASYNC110 - it asks another process
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError:
        raise Failure(f"{SOURCE} did not publish its entries in time") from None
    finally:
        await access.close()


async def _last_published(bus: JetStreamBus) -> int:
    try:
        last = await bus.last_published(LEDGER)
    except BusFault:  # it has only just been started
        return 0
    return last.seq if last else 0


async def _logged_in(
    client: Client, user: AccountRow
) -> Callable[[], Coroutine[Any, Any, Account]]:
    """A cheap call of a user who is logged in: the session is checked, and an account read."""
    request = LoginRequest(identifier=user.identifier, password=PASSWORD, device="bench")
    session = await client.call("SessionService/Login", request, Session)
    login = Login(session.account_id, session.token)
    asked = GetAccountRequest(account_id=user.account_id)
    return partial(client.call, "AccountService/GetAccount", asked, Account, login)


async def verified(setup: Setup, within_s: float) -> None:
    """Returns once `duohuo verify` passes. Raises Failure if it does not."""
    deadline_s = time.monotonic() + within_s
    while True:
        report = await verify.verify(setup.directory, within_s)
        if report.passed:
            return
        # On a busy machine a center that has just started may be too slow for one connection.
        if report.violations or not report.missing or time.monotonic() > deadline_s:
            raise Failure(f"`duohuo verify` does not pass:\n{report.text()}")
        await asyncio.sleep(POLL_INTERVAL_S)
