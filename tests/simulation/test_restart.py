"""A center that starts again with its clock set back still ends the sessions that it has made."""

import asyncio
from pathlib import Path

import pytest

from duohuo.v1.account_service_pb2 import Account, RegisterRequest
from duohuo.v1.session_service_pb2 import (
    GetSessionRequest,
    LoginRequest,
    RevokeSessionsRequest,
    RevokeSessionsResponse,
    Session,
)
from ops.simulation.loop import SimulatedLoop
from ops.simulation.world import World
from runtime.endpoint import AUTHORIZATION, ask
from runtime.errors import RpcError
from runtime.methods import method

USER, PASSWORD = "alice@example.com", "correct horse battery staple 9"
REGISTER = method("/duohuo.v1.AccountService/Register")
LOGIN = method("/duohuo.v1.SessionService/Login")
GET = method("/duohuo.v1.SessionService/GetSession")
REVOKE = method("/duohuo.v1.SessionService/RevokeSessions")
SET_BACK_MS = -600_000
STARTED_S = 3.0


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


def test_a_clock_that_was_set_back_lets_no_session_survive(tmp_path: Path) -> None:
    loop = SimulatedLoop("clock set back")
    asyncio.set_event_loop(loop)
    world = World("clock set back", ["a", "b"], loop, tmp_path)
    try:
        loop.run(scenario(world))
    finally:
        for center in world.centers.values():
            center.disk.crash()
        asyncio.set_event_loop(None)
