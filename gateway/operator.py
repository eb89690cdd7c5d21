"""The operators' port: deposits, status, facts for `verify`, and what `why` tells."""

import asyncio
from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import Message
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    BookDepositRequest,
    BookDepositResponse,
    ChangeControlRequest,
    CollectFactsRequest,
    CollectFactsResponse,
    EraseAtHomeRequest,
    GetControlRequest,
    HandOverRequest,
    HandOverResponse,
    InspectRequest,
    InspectResponse,
    LimitsChange,
    LookupAccountRequest,
    LookupAccountResponse,
)
from duohuo.v1.announcement_service_pb2 import Announcement
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountControl,
    AccountControlChange,
    CenterFacts,
    CenterStatus,
    CloseAccountRequest,
    CountSlotsRequest,
    CountSlotsResponse,
    DepositRequest,
    DepositResponse,
    DropNotificationRequest,
    DropNotificationResponse,
    DropParkedRequest,
    DropParkedResponse,
    EraseAccountRequest,
    EraseAccountResponse,
    FindSpansRequest,
    FindSpansResponse,
    FindTransfersRequest,
    FindTransfersResponse,
    FreezeAccountRequest,
    GetAccountControlRequest,
    GetFactsRequest,
    GetPlacementRequest,
    GetRouteRequest,
    GetStatusRequest,
    LiftAnnouncementRequest,
    ListAuditRequest,
    ListAuditResponse,
    ListNotificationsRequest,
    ListNotificationsResponse,
    ListParkedRequest,
    ListParkedResponse,
    ListVersionsRequest,
    ListVersionsResponse,
    MoveSlotRequest,
    MoveSlotResponse,
    ParkedAction,
    PeerStatus,
    PlacementView,
    RaiseAnnouncementRequest,
    RetryNotificationsRequest,
    RetryNotificationsResponse,
    RetryParkedRequest,
    RetryParkedResponse,
    Route,
    SetDrainingRequest,
    SetDrainingResponse,
    SetLimitsRequest,
    SpanRecord,
    UnfreezeAccountRequest,
)
from gateway.health import DRAINING_ROLE, Health
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import OPERATOR, ask
from runtime.errors import RpcError, invalid
from runtime.home_calls import ask_home
from runtime.ids import account_slot, place_of
from runtime.mesh import Mesh
from runtime.methods import Method, peer_method
from runtime.peer_clocks import ALARM_MS
from runtime.placement import SLOTS, Placement

SERVICE_ROLES = ("account", "session", "transfer")
ROLE_TIMEOUT_S = 5.0
FACTS_TIMEOUT_S = 240.0
"""All rows are read, 10 s for a million entries; a busy machine may take longer."""
RETRY_TIMEOUT_S = 30.0
"""All operators share one token, and so one name."""
M = TypeVar("M", bound=Message)
_Change = FreezeAccountRequest | UnfreezeAccountRequest | CloseAccountRequest | SetLimitsRequest


class Spans(Protocol):
    """Finds recent spans by trace, transfer or application id."""

    def find(self, wanted: str) -> list[SpanRecord]: ...


class OperatorServicer:
    """Serves OperatorService at this center."""

    def __init__(self, mesh: Mesh, placement: Placement, spans: Spans, health: Health) -> None:
        self._mesh = mesh
        self._health = health
        self._placement = placement
        self._spans = spans

    async def Deposit(self, request: DepositRequest, incoming: Incoming) -> DepositResponse:
        slot, account = await self._find(request.user)
        deposit = BookDepositRequest(
            deposit_id=request.deposit_id, account_id=account, amount=request.amount
        )
        method = peer_method("transfer", "BookDeposit")
        booked = await self._at_home(slot, method, deposit, BookDepositResponse, incoming)
        return DepositResponse(account_id=account, balance=booked.balance)

    async def FreezeAccount(
        self, request: FreezeAccountRequest, incoming: Incoming
    ) -> AccountControlChange:
        change = ChangeControlRequest(status=ACCOUNT_STATUS_FROZEN)
        return await self._change(request, change, incoming)

    async def UnfreezeAccount(
        self, request: UnfreezeAccountRequest, incoming: Incoming
    ) -> AccountControlChange:
        change = ChangeControlRequest(status=ACCOUNT_STATUS_OPEN)
        return await self._change(request, change, incoming)

    async def CloseAccount(
        self, request: CloseAccountRequest, incoming: Incoming
    ) -> AccountControlChange:
        change = ChangeControlRequest(status=ACCOUNT_STATUS_CLOSED)
        return await self._change(request, change, incoming)

    async def EraseAccount(
        self, request: EraseAccountRequest, incoming: Incoming
    ) -> EraseAccountResponse:
        slot, account = await self._find(request.user)
        closing = ChangeControlRequest(account_id=account, status=ACCOUNT_STATUS_CLOSED)
        close = peer_method("transfer", "ChangeControl")
        await self._at_home(slot, close, closing, AccountControlChange, incoming)
        erase = peer_method("account", "EraseAtHome")
        erasing = EraseAtHomeRequest(account_id=account)
        return await self._at_home(slot, erase, erasing, EraseAccountResponse, incoming)

    async def SetLimits(
        self, request: SetLimitsRequest, incoming: Incoming
    ) -> AccountControlChange:
        limits = LimitsChange()
        if request.HasField("per_transfer_minor_units_max"):
            limits.per_transfer_minor_units_max = request.per_transfer_minor_units_max
        if request.HasField("per_day_minor_units_max"):
            limits.per_day_minor_units_max = request.per_day_minor_units_max
        return await self._change(request, ChangeControlRequest(limits=limits), incoming)

    async def GetAccountControl(
        self, request: GetAccountControlRequest, incoming: Incoming
    ) -> AccountControl:
        slot, account = await self._find(request.user)
        asked = GetControlRequest(account_id=account)
        method = peer_method("transfer", "GetControl")
        return await self._at_home(slot, method, asked, AccountControl, incoming)

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
                await ask(self._mesh.local, method, request, CountSlotsResponse, ROLE_TIMEOUT_S)
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
        done = await ask(self._mesh.local, asked, request, SetDrainingResponse, ROLE_TIMEOUT_S, who)
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
        return await ask(self._mesh.local, asked, request, Announcement, ROLE_TIMEOUT_S, who)

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
            slot, _ = await self._find(request.user)
        self._require_center(request.home)
        before = self._placement.home(slot)
        asked = HandOverRequest(slot=slot, home=request.home)
        if request.HasField("epoch"):
            asked.epoch = request.epoch
        answer = HandOverResponse()
        # Money first: should the second step fail, whoever asks again goes on with it.
        for role in ("transfer", "account"):
            method = peer_method(role, "HandOver")
            one = await self._at_home(slot, method, asked, HandOverResponse, incoming)
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

    async def _change(
        self, request: _Change, change: ChangeControlRequest, incoming: Incoming
    ) -> AccountControlChange:
        slot, change.account_id = await self._find(request.user)
        if request.HasField("version"):
            change.version = request.version
        method = peer_method("transfer", "ChangeControl")
        return await self._at_home(slot, method, change, AccountControlChange, incoming)

    async def _at_home(
        self,
        slot: int,
        method: Method,
        request: Message,
        response_type: type[M],
        incoming: Incoming,
    ) -> M:
        """Asks the home of a slot on the operator's behalf."""
        who = {OPERATOR: incoming.operator}
        return await ask_home(
            self._mesh,
            self._placement,
            slot,
            method,
            request,
            response_type,
            ROLE_TIMEOUT_S,
            who,
        )

    async def _find(self, user: str) -> tuple[int, str]:
        """The slot of a user's account, and its id. Its home alone moves and controls its money; whether
        there is such an account, the home of the identifier knows for certain. Raises RpcError."""
        found = await ask(
            self._mesh.at(self._placement.home(_place(user))),
            peer_method("account", "LookupAccount"),
            LookupAccountRequest(user=user),
            LookupAccountResponse,
            ROLE_TIMEOUT_S,
        )
        slot = account_slot(found.account_id)
        if slot is None:
            raise RpcError(StatusCode.NOT_FOUND, "ACCOUNT_NOT_FOUND", "there is no such account")
        return slot, found.account_id

    async def GetRoute(self, request: GetRouteRequest, _incoming: Incoming) -> Route:
        place = _place(request.user)
        found = await ask(
            self._mesh.local,
            peer_method("account", "LookupAccount"),
            LookupAccountRequest(user=request.user),
            LookupAccountResponse,
            ROLE_TIMEOUT_S,
        )
        slot = account_slot(found.account_id)
        slot = place if slot is None else slot
        return Route(
            slot=slot,
            account_id=found.account_id,
            placement_epoch=self._placement.epoch_of(slot),
            centers=self._placement.order[slot],
        )

    async def GetStatus(self, _request: GetStatusRequest, _incoming: Incoming) -> CenterStatus:
        here = self._mesh.here
        await self._health.check(DRAINING_ROLE)
        status = CenterStatus(
            center=here,
            placement_epoch=self._placement.epoch,
            slots=self._placement.slots_of(here),
            peers=[
                PeerStatus(
                    center=peer,
                    reachable=self._mesh.reachable(peer),
                    since_time=timestamp(self._mesh.since_ms(peer)),
                )
                for peer in self._mesh.peers
            ],
            paths=self._health.shown(),
            draining=self._health.draining(here),
        )
        answers = await self._ask_roles(
            "Inspect", InspectRequest(), InspectResponse, ROLE_TIMEOUT_S
        )
        for role, answer in zip(SERVICE_ROLES, answers, strict=True):
            if answer is None:
                status.silent_roles.append(role)
            else:
                status.roads.extend(answer.roads)
                status.logs.extend(answer.logs)
                status.overdue.extend(answer.overdue)
                if answer.recovering:
                    status.recoveries.add(role=role, doing=answer.recovering)
                for name, count in answer.counts.items():
                    status.counts[name] = count
                status.clock_wrong |= answer.clock_wrong
                for peer in status.peers:
                    if peer.center in answer.clock_drift_ms:
                        peer.clock_drift_ms = answer.clock_drift_ms[peer.center]
                        peer.clock_alarm = abs(peer.clock_drift_ms) > ALARM_MS
        return status

    async def GetFacts(self, request: GetFactsRequest, _incoming: Incoming) -> CenterFacts:
        facts = CenterFacts(center=self._mesh.here)
        answers = await self._ask_roles(
            "CollectFacts",
            CollectFactsRequest(compare=request.compare),
            CollectFactsResponse,
            FACTS_TIMEOUT_S,
        )
        for role, answer in zip(SERVICE_ROLES, answers, strict=True):
            if answer is None:
                facts.silent_roles.append(role)
            else:
                facts.ledger_sums.extend(answer.ledger_sums)
                facts.digests.extend(answer.digests)
                facts.violations.extend(answer.violations)
                facts.transits.extend(answer.transits)
                facts.compared.extend(answer.compared)
        return facts

    async def ListParked(
        self, request: ListParkedRequest, _incoming: Incoming
    ) -> ListParkedResponse:
        listed = ListParkedResponse()
        answers = await self._ask_roles("ListParked", request, ListParkedResponse, ROLE_TIMEOUT_S)
        for role, answer in zip(SERVICE_ROLES, answers, strict=True):
            if answer is None:
                listed.silent_roles.append(role)
            else:
                listed.entries.extend(answer.entries)
                listed.actions.extend(answer.actions)
        listed.actions.sort(key=lambda action: action.time.ToMilliseconds(), reverse=True)
        return listed

    async def RetryParked(
        self, request: RetryParkedRequest, incoming: Incoming
    ) -> RetryParkedResponse:
        answers = await self._ask_roles(
            "RetryParked", request, RetryParkedResponse, RETRY_TIMEOUT_S, incoming.operator
        )
        silent = _silent(answers)
        actions = [action for answer in answers if answer for action in answer.actions]
        if request.HasField("name"):
            _require_found(actions, silent)
        return RetryParkedResponse(actions=actions, silent_roles=silent)

    async def DropParked(
        self, request: DropParkedRequest, incoming: Incoming
    ) -> DropParkedResponse:
        if not request.HasField("name"):
            raise invalid("name", "must name one entry")
        answers = await self._ask_roles(
            "DropParked", request, DropParkedResponse, ROLE_TIMEOUT_S, incoming.operator
        )
        actions = [action for answer in answers if answer for action in answer.actions]
        _require_found(actions, _silent(answers))
        return DropParkedResponse(actions=actions)

    async def ListAudit(self, request: ListAuditRequest, _incoming: Incoming) -> ListAuditResponse:
        answers = await self._ask_roles("ListAudit", request, ListAuditResponse, ROLE_TIMEOUT_S)
        actions = [action for answer in answers if answer for action in answer.actions]
        actions.sort(key=lambda action: action.time.ToNanoseconds(), reverse=True)
        return ListAuditResponse(
            actions=actions[: request.limit or None], silent_roles=_silent(answers)
        )

    async def ListVersions(
        self, request: ListVersionsRequest, _incoming: Incoming
    ) -> ListVersionsResponse:
        asked = peer_method("account", "ListVersions")
        return await ask(self._mesh.local, asked, request, ListVersionsResponse, ROLE_TIMEOUT_S)

    async def ListNotifications(
        self, request: ListNotificationsRequest, _incoming: Incoming
    ) -> ListNotificationsResponse:
        asked = peer_method("transfer", "ListNotifications")
        answered = ListNotificationsResponse
        return await ask(self._mesh.local, asked, request, answered, ROLE_TIMEOUT_S)

    async def RetryNotifications(
        self, request: RetryNotificationsRequest, incoming: Incoming
    ) -> RetryNotificationsResponse:
        asked = peer_method("transfer", "RetryNotifications")
        answered = RetryNotificationsResponse
        who = {OPERATOR: incoming.operator}
        return await ask(self._mesh.local, asked, request, answered, ROLE_TIMEOUT_S, who)

    async def DropNotification(
        self, request: DropNotificationRequest, incoming: Incoming
    ) -> DropNotificationResponse:
        asked = peer_method("transfer", "DropNotification")
        answered = DropNotificationResponse
        who = {OPERATOR: incoming.operator}
        return await ask(self._mesh.local, asked, request, answered, ROLE_TIMEOUT_S, who)

    async def FindTransfers(
        self, request: FindTransfersRequest, _incoming: Incoming
    ) -> FindTransfersResponse:
        asked = peer_method("transfer", "FindTransfers")
        return await ask(self._mesh.local, asked, request, FindTransfersResponse, ROLE_TIMEOUT_S)

    async def FindSpans(self, request: FindSpansRequest, _incoming: Incoming) -> FindSpansResponse:
        return FindSpansResponse(spans=self._spans.find(request.id))

    async def _ask_roles(
        self,
        name: str,
        request: Message,
        response_type: type[M],
        timeout_s: float,
        operator: str = "",
    ) -> Sequence[M | None]:
        async def one(role: str) -> M | None:
            try:
                return await ask(
                    self._mesh.local,
                    peer_method(role, name),
                    request,
                    response_type,
                    timeout_s,
                    {OPERATOR: operator},
                )
            except RpcError:
                return None

        return await asyncio.gather(*(one(role) for role in SERVICE_ROLES))


def _place(user: str) -> int:
    """The slot of an account id or identifier. Raises RpcError if it is neither."""
    place = place_of(user)
    if place is None or place.slot is None or place.origin is not None:
        raise invalid("user", "must be an account id or an identifier")
    return place.slot


def _silent(answers: Sequence[Message | None]) -> list[str]:
    return [role for role, answer in zip(SERVICE_ROLES, answers, strict=True) if answer is None]


def _require_found(actions: Sequence[ParkedAction], silent: Sequence[str]) -> None:
    """An entry belongs to one role: if none had it, it is not parked, or its role is silent."""
    if actions:
        return
    if silent:
        raise RpcError(
            StatusCode.UNAVAILABLE,
            "ROLE_SILENT",
            f"not all services of this center answer: {', '.join(silent)}",
            ran=True,
            retry_after_ms=5000,
            advice="See `duohuo status`; ask again once they answer.",
        )
    raise RpcError(
        StatusCode.NOT_FOUND,
        "NOT_PARKED",
        "this center has no such parked entry",
        advice="See `duohuo parked list`.",
    )
