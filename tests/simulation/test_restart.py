"""What a center knows again when it has started again."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from duohuo.v1.account_service_pb2 import Account, RegisterRequest
from duohuo.v1.operator_service_pb2 import PlacementView
from duohuo.v1.session_service_pb2 import (
    GetSessionRequest,
    LoginRequest,
    RevokeSessionsRequest,
    RevokeSessionsResponse,
    Session,
)
from ops.simulation.loop import SimulatedLoop
from ops.simulation.world import World
from runtime.endpoint import AUTHORIZATION, Call, ask
from runtime.errors import RpcError
from runtime.methods import method
from runtime.placement import SLOTS

USER, PASSWORD = "alice@example.com", "correct horse battery staple 9"
REGISTER = method("/duohuo.v1.AccountService/Register")
LOGIN = method("/duohuo.v1.SessionService/Login")
GET = method("/duohuo.v1.SessionService/GetSession")
PLACEMENT = method("/duohuo.v1.OperatorService/GetPlacement")
REVOKE = method("/duohuo.v1.SessionService/RevokeSessions")
SET_BACK_MS = -600_000
STARTED_S = 3.0
TURNS_MAX = 10_000


async def scenario(world: World) -> None:
    for name in world.names:
        world.start(name)
    await asyncio.sleep(STARTED_S)
    entrance = world.gateway("a")
    registered = RegisterRequest(identifier=USER, password=PASSWORD, request_id="register-1")
    account = await ask(entrance, REGISTER, registered, Account, 5.0)
    login = LoginRequest(identifier=USER, password=PASSWORD)
    first, second = [await ask(entrance, LOGIN, login, Session, 5.0) for _ in range(2)]
    world.kill("a")
    world.centers["a"].clock.offset_ms = SET_BACK_MS
    world.start("a")
    await asyncio.sleep(STARTED_S)
    entrance = world.gateway("a")
    bearer = {AUTHORIZATION: f"Bearer {first.token}"}
    every = RevokeSessionsRequest(account_id=account.account_id)
    done = await ask(entrance, REVOKE, every, RevokeSessionsResponse, 5.0, bearer)
    assert done.revoked == 2
    for session in (first, second):
        with pytest.raises(RpcError, match="SESSION_INVALID"):
            await ask(entrance, GET, GetSessionRequest(token=session.token), Session, 5.0)


async def moved(world: World) -> None:
    for name in world.names:
        world.start(name)
    await asyncio.sleep(STARTED_S)
    slot = next(slot for slot in range(SLOTS) if world.placement.home(slot) == "a")
    await world.move("a", slot, "b")
    await asyncio.sleep(STARTED_S)
    world.kill("a")
    world.start("a")
    for _ in range(TURNS_MAX):
        if (dispatcher := world.centers["a"].dispatcher) is not None:
            break
        await asyncio.sleep(0)
    assert dispatcher is not None
    answer = await dispatcher.unary(Call(PLACEMENT, b"", 1.0))
    found = PlacementView.FromString(answer.payload)
    assert (found.centers[found.homes[slot]], found.epochs[slot]) == ("b", 2)


def test_a_clock_that_was_set_back_lets_no_session_survive(tmp_path: Path) -> None:
    run(scenario, tmp_path)


def test_a_center_knows_at_once_what_has_moved(tmp_path: Path) -> None:
    run(moved, tmp_path)


def run(scenario: Callable[[World], Coroutine[None, None, None]], directory: Path) -> None:
    loop = SimulatedLoop("restart")
    asyncio.set_event_loop(loop)
    world = World("restart", ["a", "b"], loop, directory)
    try:
        loop.run(scenario(world))
    finally:
        for center in world.centers.values():
            center.disk.crash()
        asyncio.set_event_loop(None)
