"""Puts the gateway role together: the only place that wires it."""

from dataclasses import dataclass

from duohuo.internal.v1.peer_services_pb2 import ProbeRequest, ProbeResponse
from gateway.announcements import AnnouncementServicer
from gateway.authenticator import Authenticator
from gateway.limits import Limiter, Limits
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

    async def Probe(self, _request: ProbeRequest, _incoming: Incoming) -> ProbeResponse:
        return ProbeResponse(center=self.center, placement_epoch=self.placement.epoch)


def build(
    mesh: Mesh,
    placement: Placement,
    clock: Clock,
    spans: Spans,
    dispatcher: Dispatcher,
    limits: Limits,
    seal: TokenSeal,
) -> Router:
    """Serves the gateway role from `dispatcher`; the returned router serves users' calls."""
    dispatcher.add("duohuo.v1.AnnouncementService", AnnouncementServicer(mesh))
    dispatcher.add("duohuo.v1.OperatorService", OperatorServicer(mesh, placement, spans))
    dispatcher.add("duohuo.internal.v1.GatewayPeerService", PeerServicer(mesh.here, placement))
    authenticator = Authenticator(mesh.here, clock, seal)
    return Router(mesh, placement, authenticator, clock, Limiter(limits, clock))
