"""A drained center takes nothing new that would stay with it; the last one is not drained by mistake."""

import pytest

from account_svc.draining import DrainingServicer
from duohuo.internal.v1.peer_services_pb2 import (
    CheckHealthRequest,
    CheckHealthResponse,
    ProbeResponse,
)
from duohuo.v1.operator_service_pb2 import SetDrainingRequest, SetDrainingResponse
from gateway.health import Health
from gateway.mesh_operator import MeshOperator
from gateway.routes import targets
from runtime.dispatcher import Incoming
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError
from runtime.ids import place_of
from runtime.mesh import Mesh
from runtime.methods import Method, method
from sync_bus import audit
from tests.fakes import FakeClock, RecordingEndpoint, placement, says, see
from tests.unit.centers import Centers, centers

OLGA = Incoming("", 5.0, operator="olga")
LOGIN = method("/duohuo.v1.SessionService/Login")
APPLY = method("/duohuo.v1.TransferService/ApplyTransfer")
REVOKE = method("/duohuo.v1.SessionService/RevokeSessions")


def at(made: Centers, name: str) -> DrainingServicer:
    one = made.service(name)
    return DrainingServicer(one.site, one.store, one.node)


async def test_it_is_remembered_told_and_audited() -> None:
    async with centers("a", "b", role="account") as made:
        for draining in (True, True, False):
            await at(made, "a").SetDraining(SetDrainingRequest(draining=draining), OLGA)
            told = await at(made, "a").CheckHealth(CheckHealthRequest(), OLGA)
            assert (told.draining, told.takes_writes) == (draining, True)
            made.clock.advance(1000)
        actions = await made.service("a").store.read(audit.find())
        assert [(one.who, one.action, one.target) for one in actions] == [
            ("olga", "undrain", "center a"),
            ("olga", "drain", "center a"),
        ]
        assert not (await at(made, "b").CheckHealth(CheckHealthRequest(), OLGA)).draining


class World:
    """The gateway of a, in a mesh with b and c, whose account service remembers what it is told."""

    def __init__(self) -> None:
        self.draining = False
        self.mesh = Mesh(
            "a",
            {"a": RecordingEndpoint(self.answer)}
            | {name: RecordingEndpoint(says(ProbeResponse())) for name in "bc"},
            FakeClock(),
        )
        self.health = Health(self.mesh, FakeClock())
        self.placement = placement("a", "b", "c")
        self.operator = MeshOperator(self.mesh, self.placement, self.health)

    def answer(self, call: Call) -> Reply:
        if call.method.name == "SetDraining":
            self.draining = SetDrainingRequest.FromString(call.request).draining
            return says(SetDrainingResponse())(call)
        return says(CheckHealthResponse(takes_writes=True, draining=self.draining))(call)

    async def drain(self, *, draining: bool = True, forced: bool = False) -> None:
        request = SetDrainingRequest(draining=draining, forced=forced)
        await self.operator.SetDraining(request, OLGA)

    def first(self, called: Method) -> str:
        place = place_of("alice@example.com")
        wanted = targets(called.policy, place, "a", self.placement)
        return self.health.ordered(wanted, called)[0].center


@pytest.mark.parametrize("called", [LOGIN, APPLY, REVOKE], ids=lambda one: one.name)
async def test_what_would_stay_there_goes_elsewhere(called: Method) -> None:
    world = World()
    assert world.first(called) == "a"
    await world.drain()
    assert world.first(called) != "a"
    await world.drain(draining=False)
    assert world.first(called) == "a"


async def test_while_all_others_are_lost_it_takes_everything() -> None:
    world = World()
    await world.drain()
    for peer in "bc":
        see(world.mesh, peer, answering=False)
    assert world.first(LOGIN) == "a"


async def test_health_checks_hear_of_it_once() -> None:
    world, heard = World(), list[bool]()

    async def hear(draining: bool) -> None:
        heard.append(draining)

    world.health.on_draining = hear
    for draining in (True, True, False):
        await world.drain(draining=draining)
    assert heard == [True, False]


async def test_the_last_center_that_takes_anything_new_is_drained_only_by_force() -> None:
    world = World()
    see(world.mesh, "b", answering=False)
    world.mesh._seen["c"].report = ProbeResponse(draining=True)
    with pytest.raises(RpcError, match="LAST_CENTER"):
        await world.drain()
    assert not world.health.draining("a")
    await world.drain(forced=True)
    assert world.health.draining("a")


def test_who_logs_in_with_rubbish_is_answered_here() -> None:
    wanted = targets(LOGIN.policy, place_of("rubbish"), "a", placement("a", "b"))
    assert [target.center for target in wanted] == ["a"]
