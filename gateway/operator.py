"""The operators' port: accounts, status, facts for `verify`, what `why` tells, what waits for operators."""

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
    InspectRequest,
    InspectResponse,
    LimitsChange,
)
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountControl,
    AccountControlChange,
    CenterFacts,
    CenterStatus,
    CloseAccountRequest,
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
    GetStatusRequest,
    ListAuditRequest,
    ListAuditResponse,
    ListNotificationsRequest,
    ListNotificationsResponse,
    ListParkedRequest,
    ListParkedResponse,
    ListVersionsRequest,
    ListVersionsResponse,
    ParkedAction,
    PeerStatus,
    RetryNotificationsRequest,
    RetryNotificationsResponse,
    RetryParkedRequest,
    RetryParkedResponse,
    SetLimitsRequest,
    SpanRecord,
    UnfreezeAccountRequest,
)
from gateway.at_home import AtHome
from gateway.health import DRAINING_ROLE, Health
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import OPERATOR, ask
from runtime.errors import RpcError, invalid
from runtime.mesh import Mesh
from runtime.methods import SERVICE_ROLES, peer_method
from runtime.peer_clocks import ALARM_MS
from runtime.placement import Placement

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
    """Serves OperatorService at this center, but for what is in `mesh_operator`."""

    def __init__(self, mesh: Mesh, placement: Placement, spans: Spans, health: Health) -> None:
        self._mesh = mesh
        self._at_home = AtHome(mesh, placement)
        self._health = health
        self._placement = placement
        self._spans = spans

    async def Deposit(self, request: DepositRequest, incoming: Incoming) -> DepositResponse:
        slot, account = await self._at_home.find(request.user)
        deposit = BookDepositRequest(
            deposit_id=request.deposit_id, account_id=account, amount=request.amount
        )
        method = peer_method("transfer", "BookDeposit")
        booked = await self._at_home.ask(slot, method, deposit, BookDepositResponse, incoming)
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
        slot, account = await self._at_home.find(request.user)
        closing = ChangeControlRequest(account_id=account, status=ACCOUNT_STATUS_CLOSED)
        close = peer_method("transfer", "ChangeControl")
        await self._at_home.ask(slot, close, closing, AccountControlChange, incoming)
        erase = peer_method("account", "EraseAtHome")
        erasing = EraseAtHomeRequest(account_id=account)
        return await self._at_home.ask(slot, erase, erasing, EraseAccountResponse, incoming)

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
        slot, account = await self._at_home.find(request.user)
        asked = GetControlRequest(account_id=account)
        method = peer_method("transfer", "GetControl")
        return await self._at_home.ask(slot, method, asked, AccountControl, incoming)

    async def _change(
        self, request: _Change, change: ChangeControlRequest, incoming: Incoming
    ) -> AccountControlChange:
        slot, change.account_id = await self._at_home.find(request.user)
        if request.HasField("version"):
            change.version = request.version
        method = peer_method("transfer", "ChangeControl")
        return await self._at_home.ask(slot, method, change, AccountControlChange, incoming)

    async def GetStatus(self, _request: GetStatusRequest, _incoming: Incoming) -> CenterStatus:
        here = self._mesh.here
        await self._health.check(
            DRAINING_ROLE
        )  # so that a center that has just started says it too
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
