"""The queue's worker: each home has a lane of its own, each payer a line of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    DECIDE_INTENT_CANCEL,
    DECIDE_INTENT_EXECUTE,
    DecideRequest,
    DecideResponse,
)
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_QUEUED,
    APPLICATION_STATE_SUCCEEDED,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_FAILED,
    Application,
    TransferResult,
)
from ops.simulation.clocks import SimulatedClock
from ops.simulation.loop import SimulatedLoop
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, unreachable
from runtime.hlc import HybridClock
from runtime.mesh import Mesh
from runtime.store import SqliteStore, Unit, query
from sync_bus.log import Stamps
from sync_bus.site import Site
from tests.fakes import FakeDisk, account, see, site, temporary_store
from tests.unit.test_applications import BODY, made
from transfer_svc import app, applications, dispatch
from transfer_svc.dispatch import (
    ASIDE_AT_ONCE_MAX,
    AT_ONCE_MAX,
    DELAY_MS_MAX,
    LOOK_AGAIN_S,
    QueueWorker,
)

DEAD, LIVE = "b", "c"
"""Homes of slots 1 and 2; the queue is at a."""
ANSWER_S = 0.01
LIVE_WITHIN_S = 2 * ANSWER_S
ROWS = 2000
PAYERS = [account(1, number) for number in range(100)]
LIVE_PAYER = account(2)

recovering = RpcError(StatusCode.UNAVAILABLE, "CENTER_RECOVERING", "not yet")
no_payee_home = RpcError(StatusCode.UNAVAILABLE, "PAYEE_HOME_UNAVAILABLE", "another center")


@dataclass
class Home:
    """A center that decides. `error` is raised instead; while `silent` it answers nobody."""

    name: str
    silent: bool = False
    error: Callable[[DecideRequest], RpcError | None] = lambda _request: None
    reason: str = ""
    asked: list[DecideRequest] = field(default_factory=list)
    asked_at_s: list[float] = field(default_factory=list)
    busy: int = 0
    busy_max: int = 0

    async def unary(self, call: Call) -> Reply:
        request = DecideRequest.FromString(call.request)
        self.asked.append(request)
        self.asked_at_s.append(asyncio.get_running_loop().time())
        self.busy += 1
        self.busy_max = max(self.busy_max, self.busy)
        try:
            await asyncio.sleep(call.timeout_s if self.silent else ANSWER_S)
            if self.silent:
                raise RpcError(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "", ran=True)
            if error := self.error(request):
                raise error
        finally:
            self.busy -= 1
        state = TRANSFER_STATE_FAILED if self.reason else TRANSFER_STATE_CREDITED
        result = TransferResult(state=state, reason=self.reason)
        return Reply(DecideResponse(result=result).SerializeToString(), {})

    async def stream(self, _call: Call) -> Any:
        yield b""

    def transfers_of(self, payer: str) -> list[str]:
        return [
            one.transfer.transfer_id for one in self.asked if one.transfer.payer_account_id == payer
        ]


@dataclass
class Place:
    """Center a with its queue, and the homes that it asks."""

    site: Site
    store: SqliteStore
    disk: FakeDisk
    worker: QueueWorker
    homes: dict[str, Home]

    def see(self, home: str, *, answering: bool) -> None:
        see(self.site.mesh, home, answering=answering)

    async def accept(self, number: int, payer: str, home: str, *, cancelled: bool = False) -> str:
        """If cancelled, then after the commit, before the worker was told."""
        unit = applications.accept(made(number, payer), BODY, home, self.site.stamps.now())
        row = await self.store.write("accept", unit)
        if not cancelled:
            self.worker.notice(payer)
        return row.message.application_id

    async def fill(self, count: int = ROWS) -> None:
        """A queue for the dead home: as many applications of each payer, in turn."""
        for number in range(count):
            await self.accept(number, PAYERS[number % len(PAYERS)], DEAD)

    async def application(self, application_id: str) -> Application:
        row = await self.store.read(applications.find(application_id))
        assert row is not None
        return row.message

    async def live_one_took_s(self, number: int) -> float:
        """How long an application for the live home takes to be decided."""
        began_s = asyncio.get_running_loop().time()
        accepted = await self.accept(10**6 + number, LIVE_PAYER, LIVE)
        await self.until_decided(accepted)
        return asyncio.get_running_loop().time() - began_s

    async def open_count(self) -> int:
        return await self.store.read(applications.open_count())

    async def until_decided(self, application_id: str) -> None:
        async def open_() -> bool:
            return not (await self.application(application_id)).HasField("decide_time")

        await self._while(open_)

    async def drained(self) -> None:
        async def open_() -> bool:
            return await self.open_count() > 0

        await self._while(open_)

    async def _while(self, condition: Callable[[], Awaitable[bool]]) -> None:
        while await condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


def run(scenario: Callable[[Place], Awaitable[None]]) -> None:
    """Runs a scenario in simulated time, with a queue's worker at work."""
    loop = SimulatedLoop("queue")

    async def work() -> None:
        clock = SimulatedClock(loop)
        plain = site("a", "a", "b", "c")
        homes = {name: Home(name) for name in plain.placement.centers}
        here = replace(
            plain, mesh=Mesh("a", dict(homes), clock), stamps=Stamps(clock, HybridClock(clock))
        )
        disk = FakeDisk()
        async with temporary_store(app.SCHEMA, app.TOPICS, ["b", "c"], disk) as store:
            worker = QueueWorker(here, store)
            running = asyncio.ensure_future(worker.run())
            await scenario(Place(here, store, disk, worker, homes))
            assert not running.done()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    loop.run(work())


def test_what_was_accepted_by_a_call_that_was_cancelled_is_asked_for_all_the_same() -> None:
    async def scenario(place: Place) -> None:
        await place.live_one_took_s(0)
        began_s = asyncio.get_running_loop().time()
        await place.until_decided(await place.accept(1, LIVE_PAYER, LIVE, cancelled=True))
        assert asyncio.get_running_loop().time() - began_s <= LOOK_AGAIN_S + LIVE_WITHIN_S

    run(scenario)


def test_a_queue_for_a_dead_home_costs_nothing_and_drains_in_order_beside_the_live_ones() -> None:
    async def scenario(place: Place) -> None:
        dead, live = place.homes[DEAD], place.homes[LIVE]
        place.see(DEAD, answering=False)
        await place.fill()
        batches = place.disk.batches
        took_s = [await place.live_one_took_s(0)]
        await asyncio.sleep(3600)
        took_s.append(await place.live_one_took_s(1))
        # Accepting and deciding the live ones is all that was written within the hour.
        assert place.disk.batches - batches <= 2 * 2
        assert dead.asked == []
        assert (await place.application(made(5).application_id)).attempts == 0

        back_s = asyncio.get_running_loop().time()
        place.see(DEAD, answering=True)
        await asyncio.sleep(10 * ANSWER_S)
        took_s.append(await place.live_one_took_s(2))
        assert await place.open_count() > ROWS / 2  # the drain was still going on
        await place.drained()
        assert max(took_s) <= LIVE_WITHIN_S
        assert dead.asked_at_s[0] == back_s
        assert dead.busy_max == AT_ONCE_MAX
        assert len(dead.asked) == ROWS
        assert len(live.asked) == 3
        for payer in PAYERS:
            numbers = [int(one.removeprefix("transfer-")) for one in dead.transfers_of(payer)]
            assert numbers == sorted(numbers)
            assert len(numbers) == ROWS / len(PAYERS)

    run(scenario)


def test_a_home_that_does_not_answer_in_time_delays_nobody_else() -> None:
    async def scenario(place: Place) -> None:
        place.homes[DEAD].silent = True
        await place.fill(100)
        for number in range(20):
            assert await place.live_one_took_s(number) <= LIVE_WITHIN_S
            await asyncio.sleep(1)

    run(scenario)


def test_a_home_that_answers_probes_but_decides_nothing_is_asked_for_one_at_a_time() -> None:
    async def scenario(place: Place) -> None:
        dead = place.homes[DEAD]
        dead.error = lambda _request: recovering
        await place.fill()
        await asyncio.sleep(3600)
        at_once = len([at_s for at_s in dead.asked_at_s if at_s < 0.1])
        assert at_once <= AT_ONCE_MAX
        assert len(dead.asked) <= AT_ONCE_MAX + 7 + 3600 / (DELAY_MS_MAX / 2000)
        # Every attempt is seen by its user.
        noted = await place.store.read(query("SELECT sum(attempts) FROM application"))
        assert noted == [(len(dead.asked),)]
        dead.error = lambda _request: None
        await asyncio.sleep(DELAY_MS_MAX / 1000)
        await place.drained()

    run(scenario)


def test_pauses_grow_to_a_minute_and_end_when_home_is_seen_again() -> None:
    async def scenario(place: Place) -> None:
        dead = place.homes[DEAD]
        dead.error = lambda _request: unreachable(DEAD, ran=True)
        await place.accept(1, PAYERS[0], DEAD)
        await asyncio.sleep(100)
        # Two failed calls, and the mesh takes it for lost: it is asked no more.
        assert len(dead.asked) == 2
        dead.error = lambda _request: recovering
        place.see(DEAD, answering=True)
        began = len(dead.asked)
        await asyncio.sleep(3600)
        pauses = [
            after - before
            for before, after in zip(
                dead.asked_at_s[began:], dead.asked_at_s[began + 1 :], strict=False
            )
        ]
        assert max(pauses) <= DELAY_MS_MAX / 1000 + 1
        assert all(pause > 20 for pause in pauses[8:])
        place.see(DEAD, answering=False)
        place.see(DEAD, answering=True)
        assert dead.asked_at_s[-1] < asyncio.get_running_loop().time()
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert dead.asked_at_s[-1] >= asyncio.get_running_loop().time() - 0.001

    run(scenario)


def test_what_waits_for_a_third_party_holds_up_neither_its_payer_nor_its_home() -> None:
    async def scenario(place: Place) -> None:
        home = place.homes[DEAD]
        stuck = {f"transfer-{number}" for number in range(100)}
        home.error = lambda request: (
            no_payee_home if request.transfer.transfer_id in stuck else None
        )
        await place.fill(100)
        await asyncio.sleep(600)
        home.asked.clear()
        began_s = asyncio.get_running_loop().time()
        accepted = await place.accept(100, PAYERS[0], DEAD)
        await place.until_decided(accepted)
        assert asyncio.get_running_loop().time() - began_s <= LIVE_WITHIN_S
        assert home.busy <= ASIDE_AT_ONCE_MAX
        assert await place.open_count() == 100
        stuck.clear()
        await asyncio.sleep(DELAY_MS_MAX / 1000 + 1)
        assert await place.open_count() == 0

    run(scenario)


@pytest.mark.parametrize(
    ("reason", "state"),
    [("CANCELLED", APPLICATION_STATE_CANCELLED), ("", APPLICATION_STATE_SUCCEEDED)],
)
def test_home_is_asked_to_cancel_what_was_withdrawn_and_its_answer_stands(
    reason: str, state: int
) -> None:
    async def scenario(place: Place) -> None:
        home = place.homes[DEAD]
        home.reason = reason
        place.see(DEAD, answering=False)
        withdrawn = await place.accept(1, PAYERS[0], DEAD)
        unit = applications.withdraw(withdrawn, "CENTER_UNREACHABLE", place.site.stamps.now())
        await place.store.write("withdraw", unit)
        place.see(DEAD, answering=True)
        await place.drained()
        (asked,) = home.asked
        assert asked.intent == DECIDE_INTENT_CANCEL
        assert (await place.application(withdrawn)).state == state

    run(scenario)


def test_an_expired_application_stays_queued_until_home_says_so() -> None:
    async def scenario(place: Place) -> None:
        place.see(DEAD, answering=False)
        accepted = await place.accept(1, PAYERS[0], DEAD)
        with patch.object(dispatch, "LOOK_AGAIN_S", 24 * 3600):  # or the test would take long
            await asyncio.sleep(40 * 24 * 3600)
        assert (await place.application(accepted)).state == APPLICATION_STATE_QUEUED
        place.see(DEAD, answering=True)
        await place.drained()
        assert [one.intent for one in place.homes[DEAD].asked] == [DECIDE_INTENT_EXECUTE]

    run(scenario)


def test_what_came_back_with_a_lost_disk_is_asked_for() -> None:
    async def scenario(place: Place) -> None:
        await place.store.write("copy", applications.copy(made(1, PAYERS[0]), BODY))
        again = QueueWorker(place.site, place.store)
        running = asyncio.ensure_future(again.run())
        await place.drained()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    run(scenario)


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """Counts how often a unit is made."""
    original, count = getattr(applications, name), [0]

    def counting(*arguments: Any) -> Any:
        count[0] += 1
        return original(*arguments)

    with patch.object(applications, name, counting):
        yield count


def test_other_commits_do_not_wake_the_worker() -> None:
    async def scenario(place: Place) -> None:
        place.see(DEAD, answering=False)
        await place.fill(100)
        await asyncio.sleep(1)
        with counted("due") as looks, counted("next_due_ms") as asks:
            for _ in range(100):
                await place.store.write("other", query("UPDATE log_head SET hlc = hlc + 1"))
                await asyncio.sleep(0.01)
        assert (looks, asks) == ([0], [0])

    run(scenario)


def explained(unit: Unit[Any], plan: list[str]) -> Unit[Any]:
    """Runs a unit, and notes how each of its statements finds its rows."""
    try:
        sql, values = next(unit)
        while True:
            steps = yield from query(f"EXPLAIN QUERY PLAN {sql}", *values)
            plan += [step[3] for step in steps]
            sql, values = unit.send((yield from query(sql, *values)))
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize(
    "unit",
    [
        lambda: applications.due("b", applications.NEXT, 1, 1, 16),
        lambda: applications.due("b", applications.ASIDE, 1, 1, 4),
        lambda: applications.next_due_ms("b", 1),
        lambda: applications.attempted(made().application_id, "REASON", 1),
        lambda: applications.attempted(made().application_id, "REASON", 1, 1),
        lambda: applications.line_up(
            [applications.Waiting(made().application_id, PAYERS[0], "b")], 1
        ),
        lambda: applications.touch(PAYERS[0], "transfer-1", BODY, "b"),
        lambda: applications.as_known(applications.changed_since(PAYERS[0], 0, 100), "b"),
    ],
)
async def test_the_work_is_found_without_searching(unit: Callable[[], Unit[Any]]) -> None:
    """Neither reads a whole table or index, nor sorts."""
    async with temporary_store(app.SCHEMA, app.TOPICS, ["b"]) as store:
        accept = applications.accept(
            made(payer=PAYERS[0]), BODY, "b", site("a", "a", "b").stamps.now()
        )
        await store.write("accept", accept)
        plan: list[str] = []
        await store.write("explained", explained(unit(), plan))
        read = [step for step in plan if step.startswith(("SEARCH", "SCAN", "USE"))]
        assert any(step.startswith("SEARCH") for step in read)
        assert [step for step in read if not step.startswith("SEARCH")] == []
