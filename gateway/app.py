"""Puts the gateway role together: the only place that wires it."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from duohuo.internal.v1.peer_services_pb2 import ProbeRequest, ProbeResponse
from gateway.announcements import Announcements, AnnouncementServicer
from gateway.authenticator import Authenticator
from gateway.health import Health
from gateway.limits import Limiter, Limits
from gateway.mesh_operator import MeshOperator
from gateway.operator import OperatorServicer, Spans
from gateway.router import Router
from runtime.clock import Clock
from runtime.dispatcher import Dispatcher, Incoming
from runtime.mesh import Mesh
from runtime.placement import Placement
from runtime.token_seal import TokenSeal


@dataclass(frozen=True, slots=True)
class PeerServicer:
    """What other centers may ask of a gateway."""

    center: str
    placement: Placement
    health: Health

    async def Probe(self, _request: ProbeRequest, _incoming: Incoming) -> ProbeResponse:
        return ProbeResponse(
            center=self.center,
            placement_epoch=self.placement.epoch,
            roles=self.health.own(),
            draining=self.health.draining(self.center),
        )


@dataclass(frozen=True, slots=True)
class Gateway:
    """What serves users' calls, and what must run for as long as it does."""

    router: Router
    duties: Sequence[Callable[[], Coroutine[None, None, None]]]
    health: Health


def build(
    mesh: Mesh,
    placement: Placement,
    clock: Clock,
    spans: Spans,
    dispatcher: Dispatcher,
    limits: Limits,
    seal: TokenSeal,
) -> Gateway:
    """Serves the gateway role from `dispatcher`."""
    health = Health(mesh, clock)
    announcements = Announcements(mesh, clock, health)
    announced = AnnouncementServicer(announcements, placement)
    dispatcher.add("duohuo.v1.AnnouncementService", announced)
    dispatcher.add(
        "duohuo.v1.OperatorService",
        OperatorServicer(mesh, placement, spans, health),
        MeshOperator(mesh, placement, health),
    )
    dispatcher.add(
        "duohuo.internal.v1.GatewayPeerService", PeerServicer(mesh.here, placement, health)
    )
    authenticator = Authenticator(mesh.here, clock, seal)
    limiter = Limiter(limits, clock)
    router = Router(mesh, placement, authenticator, clock, limiter, announcements, health)
    return Gateway(router, (announcements.follow, health.run), health)
