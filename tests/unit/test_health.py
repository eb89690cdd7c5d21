"""Services that are slow, fail or take no writes are asked after others, and come back step by step."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import CheckHealthResponse, ProbeResponse, RoleHealth
from gateway.health import (
    AT_ONCE_FIRST,
    BAD_IN_A_ROW,
    BAD_RETURNING,
    CALM_MS,
    HOLD_MS_FIRST,
    HOLD_MS_MAX,
    RAMP_MS,
    SLOW_MS,
    TRANSITIONS,
    Event,
    Health,
    Path,
    State,
)
from gateway.routes import Target
from runtime.endpoint import Call
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.methods import method
from tests.fakes import Answer, FakeClock, RecordingEndpoint, fails, in_turn, says, see

WRITES = method("/duohuo.v1.AccountService/UpdateProfile")
READS = method("/duohuo.v1.TransferService/GetBalance")
CALL = Call(WRITES, b"", 1.0)
BOTH = (Target("b", "forwarded"), Target("a", "failed-over"))


class World:
    """The gateway of a, which sees b, and a clock in the test's hands."""

    def __init__(self, here: Answer | None = None) -> None:
        self.clock = FakeClock()
        self.b = RecordingEndpoint(says(ProbeResponse()))
        own = RecordingEndpoint(here or says(CheckHealthResponse(takes_writes=True)))
        self.mesh = Mesh("a", {"a": own, "b": self.b}, self.clock)
        self.health = Health(self.mesh, self.clock)

    def order(self, called: object = WRITES) -> str:
        assert called in (WRITES, READS)
        wanted = self.health.ordered(BOTH, WRITES if called is WRITES else READS)
        return "".join(target.center for target in wanted)

    async def call(self, took_ms: int = 0, error: RpcError | None = None) -> None:
        """A user's call to b."""
        with suppress(RpcError):
            async with self.health.asking("b", CALL):
                self.clock.advance(took_ms)
                if error is not None:
                    raise error

    def reports(self, *, answers: bool = True, takes_writes: bool = True) -> None:
        """What b says of its account service."""
        role = RoleHealth(role="account", answers=answers, takes_writes=takes_writes)
        self.mesh._seen["b"].report = ProbeResponse(center="b", roles=[role])


REFUSED = RpcError(StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN", "taken")


@pytest.mark.parametrize(
    ("took_ms", "error", "order"),
    [
        (SLOW_MS, None, "ab"),
        (SLOW_MS - 1, None, "ba"),
        (0, unreachable("b", ran=False), "ab"),
        (0, REFUSED, "ba"),
    ],
    ids=["slow", "not slow", "fails", "refuses"],
)
async def test_who_is_slow_or_fails_several_times_in_a_row_is_asked_last(
    took_ms: int, error: RpcError | None, order: str
) -> None:
    world = World()
    for _ in range(BAD_IN_A_ROW - 1):
        await world.call(took_ms, error)
    assert world.order() == "ba"
    await world.call(took_ms, error)
    assert world.order() == order


async def test_one_good_call_in_between_is_enough() -> None:
    world = World()
    for _ in range(3):
        for _ in range(BAD_IN_A_ROW - 1):
            await world.call(SLOW_MS)
        await world.call()
    assert world.order() == "ba"


async def test_other_services_of_the_same_center_are_not_left() -> None:
    world = World()
    for _ in range(BAD_IN_A_ROW):
        await world.call(SLOW_MS)
    assert (world.order(WRITES), world.order(READS)) == ("ab", "ba")


async def test_who_fails_again_on_returning_is_left_for_twice_as_long_up_to_a_minute() -> None:
    world, holds = World(), []
    for _ in range(BAD_IN_A_ROW):
        await world.call(SLOW_MS)
    for _ in range(8):
        left_ms = world.clock.monotonic_ms()
        while world.order() == "ab":
            world.clock.advance(100)
        holds.append(world.clock.monotonic_ms() - left_ms)
        for _ in range(BAD_RETURNING):
            await world.call(SLOW_MS)
    assert holds[:3] == [HOLD_MS_FIRST, 2 * HOLD_MS_FIRST, 4 * HOLD_MS_FIRST]
    assert holds[-1] == HOLD_MS_MAX


def test_after_a_calm_while_it_is_left_for_as_short_as_at_first() -> None:
    path = Path(state=State.GOOD, hold_ms=HOLD_MS_MAX)
    path.happen(Event.FAILING, CALM_MS + 1)
    assert path.hold_ms == HOLD_MS_FIRST


def test_the_table_ends_nowhere() -> None:
    assert {before for before, _ in TRANSITIONS} == set(State)
    assert set(TRANSITIONS.values()) == set(State)


async def test_who_takes_no_writes_is_good_for_reading() -> None:
    world = World()
    world.reports(takes_writes=False)
    assert world.health.cannot_store("b")
    reads = replace(WRITES, needs_no_write=True)
    assert world.order() == "ab"
    assert [one.center for one in world.health.ordered(BOTH, reads)] == ["b", "a"]
    world.reports(answers=False)
    assert [one.center for one in world.health.ordered(BOTH, reads)] == ["a", "b"]
    world.reports()
    assert world.order() == "ba"


async def test_a_lost_center_is_asked_last() -> None:
    world = World()
    see(world.mesh, "b", answering=False)
    assert world.order() == "ab"


async def test_the_only_one_is_asked_whatever_it_is_like() -> None:
    world = World()
    world.reports(answers=False)
    assert world.health.ordered(BOTH[:1], WRITES) == [BOTH[0]]


async def test_a_center_that_is_back_gets_few_calls_at_once_and_then_more() -> None:
    world, running, done = World(), 0, asyncio.Event()

    async def call() -> None:
        nonlocal running
        async with world.health.asking("b", CALL._replace(timeout_s=60.0)):
            running += 1
            await done.wait()

    see(world.mesh, "b", answering=False)
    see(world.mesh, "b", answering=True)
    calls = [asyncio.ensure_future(call()) for _ in range(5 * AT_ONCE_FIRST)]
    await asyncio.sleep(0)
    assert running == AT_ONCE_FIRST
    world.clock.advance(1000)
    extra = asyncio.ensure_future(call())
    await asyncio.sleep(0)
    assert running == AT_ONCE_FIRST + 1
    world.clock.advance(RAMP_MS)
    done.set()
    await asyncio.gather(*calls, extra)
    assert running == len(calls) + 1


async def test_who_cannot_wait_for_its_turn_is_refused_and_definitely_not_run() -> None:
    world = World()
    see(world.mesh, "b", answering=False)
    see(world.mesh, "b", answering=True)
    async with (
        world.health.asking("b", CALL),
        world.health.asking("b", CALL),
        world.health.asking("b", CALL),
        world.health.asking("b", CALL),
    ):
        with pytest.raises(RpcError) as refused:
            async with world.health.asking("b", CALL._replace(timeout_s=0.0)):
                raise AssertionError
    assert (refused.value.reason, refused.value.ran) == ("CENTER_UNREACHABLE", False)


async def test_a_gateway_tells_what_it_finds_of_its_own_services_once_it_is_sure() -> None:
    silent = fails(unreachable("a", ran=False))
    full = says(CheckHealthResponse(takes_writes=False))
    world = World(in_turn(says(CheckHealthResponse(takes_writes=True)), silent, silent, full))
    found = []
    for _ in range(4):
        await world.health.check("account")
        found += [(one.answers, one.takes_writes) for one in world.health.own()]
    assert found == [(True, True), (True, True), (False, False), (True, False)]
    assert [one.role for one in world.health.shown()] == ["account"]


async def test_who_waited_for_its_turn_has_what_is_left_of_its_time() -> None:
    world = World()
    see(world.mesh, "b", answering=False)
    see(world.mesh, "b", answering=True)
    first = [world.health.asking("b", CALL) for _ in range(AT_ONCE_FIRST)]
    for one in first:
        await one.__aenter__()
    waiting = world.health.asking("b", CALL)
    entering = asyncio.ensure_future(waiting.__aenter__())
    await asyncio.sleep(0)
    world.clock.advance(300)
    await first[0].__aexit__(None, None, None)
    assert (await entering).timeout_s == pytest.approx(0.7)
    for one in (*first[1:], waiting):
        await one.__aexit__(None, None, None)


async def test_a_call_that_was_given_up_soon_says_nothing_of_the_service() -> None:
    world = World()
    for _ in range(BAD_IN_A_ROW - 1):
        await world.call(SLOW_MS)
    with pytest.raises(asyncio.CancelledError):
        async with world.health.asking("b", CALL):
            raise asyncio.CancelledError
    assert world.order() == "ba"
    await world.call(SLOW_MS)
    assert world.order() == "ab"


async def test_that_somebody_else_is_unreachable_says_nothing_against_who_says_so() -> None:
    world = World()
    error = RpcError.from_status(unreachable("c", ran=False).to_status())
    for _ in range(BAD_IN_A_ROW):
        await world.call(0, error)
    assert world.order() == "ba"


async def test_what_is_not_sent_to_a_lost_center_says_nothing_of_its_services() -> None:
    world = World()
    see(world.mesh, "b", answering=False)
    for _ in range(BAD_IN_A_ROW):
        await world.call(0, unreachable("b", ran=False))
    assert world.health.shown() == []
    see(world.mesh, "b", answering=True)
    assert world.order() == "ba"
