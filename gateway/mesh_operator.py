"""The operators' port, for the mesh: who is home of what, who is drained, what users are told."""

from google.protobuf.message import Message
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    HandOverRequest,
    HandOverResponse,
    LookupAccountRequest,
    LookupAccountResponse,
)
from duohuo.v1.announcement_service_pb2 import Announcement
from duohuo.v1.operator_service_pb2 import (
    CountSlotsRequest,
    CountSlotsResponse,
    GetPlacementRequest,
    GetRouteRequest,
    LiftAnnouncementRequest,
    MoveSlotRequest,
    MoveSlotResponse,
    PlacementView,
    RaiseAnnouncementRequest,
    Route,
    SetDrainingRequest,
    SetDrainingResponse,
)
from gateway.at_home import TIMEOUT_S, AtHome, slot_of_user
from gateway.health import DRAINING_ROLE, Health
from runtime.dispatcher import Incoming
from runtime.endpoint import OPERATOR, ask
from runtime.errors import RpcError, invalid
from runtime.ids import account_slot
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.placement import SLOTS, Placement


class MeshOperator:
    """Serves the part of OperatorService that is about centers."""

    def __init__(self, mesh: Mesh, placement: Placement, health: Health) -> None:
        self._mesh = mesh
        self._placement = placement
        self._health = health
        self._at_home = AtHome(mesh, placement)

    async def GetPlacement(
        self, _request: GetPlacementRequest, _incoming: Incoming
    ) -> PlacementView:
        placement = self._placement
        centers = sorted({*placement.centers, *(placement.home(slot) for slot in range(SLOTS))})
        return PlacementView(
            centers=centers,
            homes=[centers.index(placement.home(slot)) for slot in range(SLOTS)],
            epochs=[placement.epoch_of(slot) for slot in range(SLOTS)],
        )

    async def CountSlots(
        self, request: CountSlotsRequest, _incoming: Incoming
    ) -> CountSlotsResponse:
        counted = CountSlotsResponse()
        for role in ("account", "transfer"):
            method = peer_method(role, "CountSlots")
            counted.MergeFrom(
                await ask(self._mesh.local, method, request, CountSlotsResponse, TIMEOUT_S)
            )
        return counted

    async def SetDraining(
        self, request: SetDrainingRequest, incoming: Incoming
    ) -> SetDrainingResponse:
        others = [
            peer
            for peer in self._mesh.peers
            if self._mesh.reachable(peer) and not self._health.draining(peer)
        ]
        if request.draining and not others and not request.forced:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                "LAST_CENTER",
                "no other center that answers takes anything new",
                advice="Undrain or start another one first; --force does it all the same.",
            )
        asked = peer_method("account", "SetDraining")
        who = {OPERATOR: incoming.operator}
        done = await ask(self._mesh.local, asked, request, SetDrainingResponse, TIMEOUT_S, who)
        await self._health.check(DRAINING_ROLE)
        return done

    async def RaiseAnnouncement(
        self, request: RaiseAnnouncementRequest, incoming: Incoming
    ) -> Announcement:
        if request.center:
            self._require_center(request.center)
        return await self._announce("RaiseAnnouncement", request, incoming)

    async def LiftAnnouncement(
        self, request: LiftAnnouncementRequest, incoming: Incoming
    ) -> Announcement:
        return await self._announce("LiftAnnouncement", request, incoming)

    async def _announce(self, name: str, request: Message, incoming: Incoming) -> Announcement:
        asked = peer_method("account", name)
        who = {OPERATOR: incoming.operator}
        return await ask(self._mesh.local, asked, request, Announcement, TIMEOUT_S, who)

    def _require_center(self, name: str) -> None:
        if name not in (self._mesh.here, *self._mesh.peers):
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                "UNKNOWN_CENTER",
                "there is no such center in this mesh",
                advice="See `duohuo status`.",
            )

    async def MoveSlot(self, request: MoveSlotRequest, incoming: Incoming) -> MoveSlotResponse:
        what, slot = request.WhichOneof("what"), request.slot
        if what is None:
            raise invalid("what", "must be a user or a slot")
        if what == "user":
            slot, _ = await self._at_home.find(request.user)
        self._require_center(request.home)
        before = self._placement.home(slot)
        asked = HandOverRequest(slot=slot, home=request.home)
        if request.HasField("epoch"):
            asked.epoch = request.epoch
        answer = HandOverResponse()
        # Money first: should the second step fail, whoever asks again goes on with it.
        for role in ("transfer", "account"):
            method = peer_method(role, "HandOver")
            one = await self._at_home.ask(slot, method, asked, HandOverResponse, incoming)
            answer.accounts_moved += one.accounts_moved
            answer.epoch, answer.taken_over = one.epoch, one.taken_over
        return MoveSlotResponse(
            slot=slot,
            before=before,
            home=request.home,
            epoch=answer.epoch,
            taken_over=answer.taken_over,
            accounts_moved=answer.accounts_moved,
        )

    async def GetRoute(self, request: GetRouteRequest, _incoming: Incoming) -> Route:
        place = slot_of_user(request.user)
        found = await ask(
            self._mesh.local,
            peer_method("account", "LookupAccount"),
            LookupAccountRequest(user=request.user),
            LookupAccountResponse,
            TIMEOUT_S,
        )
        slot = account_slot(found.account_id)
        slot = place if slot is None else slot
        return Route(
            slot=slot,
            account_id=found.account_id,
            placement_epoch=self._placement.epoch_of(slot),
            centers=self._placement.order[slot],
        )
