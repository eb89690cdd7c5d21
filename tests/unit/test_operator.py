"""The operators' port is for operators, and says which of its services are silent."""

from typing import Any

import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    BookDepositRequest,
    BookDepositResponse,
    ChangeControlRequest,
    CollectFactsResponse,
    HandOverResponse,
    InspectResponse,
    LimitsChange,
    LookupAccountResponse,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountControl,
    AccountControlChange,
    CloseAccountRequest,
    DepositRequest,
    DepositResponse,
    DropParkedRequest,
    DropParkedResponse,
    EntryName,
    FindTransfersRequest,
    FindTransfersResponse,
    FreezeAccountRequest,
    GetAccountControlRequest,
    GetFactsRequest,
    GetStatusRequest,
    ListParkedRequest,
    ListParkedResponse,
    MoveSlotRequest,
    ParkedAction,
    ParkedEntry,
    RetryParkedRequest,
    RetryParkedResponse,
    SetLimitsRequest,
    SpanRecord,
    TransferFacts,
    UnfreezeAccountRequest,
    Violation,
)
from gateway.health import Health
from gateway.mesh_operator import MeshOperator
from gateway.operator import OperatorServicer
from runtime.dispatcher import Incoming
from runtime.endpoint import OPERATOR, Call, Reply
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from tests.fakes import FakeClock, RecordingEndpoint, account, fails, placement, says

INCOMING = Incoming("", 5.0, operator="ann")
BOB = account(1)
"""At home at b."""


class NoSpans:
    def find(self, wanted: str) -> list[SpanRecord]:
        return [SpanRecord(trace_id=wanted)]


def operator(here: RecordingEndpoint, home: RecordingEndpoint) -> OperatorServicer:
    """At a, in a mesh of a and b."""
    mesh, clock = Mesh("a", {"a": here, "b": home}, FakeClock()), FakeClock()
    return OperatorServicer(mesh, placement("a", "b"), NoSpans(), Health(mesh, clock))


def of_the_mesh(here: RecordingEndpoint, home: RecordingEndpoint) -> MeshOperator:
    """At a, in a mesh of a and b."""
    mesh, clock = Mesh("a", {"a": here, "b": home}, FakeClock()), FakeClock()
    return MeshOperator(mesh, placement("a", "b"), Health(mesh, clock))


def silent() -> RecordingEndpoint:
    return RecordingEndpoint(fails(unreachable("?", ran=False)))


async def test_money_from_outside_is_booked_at_the_accounts_home() -> None:
    def answer(call: Call) -> Reply:
        if call.method.name == "LookupAccount":
            return says(LookupAccountResponse(account_id=BOB))(call)
        return says(BookDepositResponse(balance=Money(currency_code="CNY", minor_units=7)))(call)

    here, home = silent(), RecordingEndpoint(answer)
    amount = Money(currency_code="CNY", minor_units=5)
    request = DepositRequest(deposit_id="deposit-1", user=BOB, amount=amount)
    response = await operator(here, home).Deposit(request, INCOMING)
    assert response == DepositResponse(
        account_id=BOB, balance=Money(currency_code="CNY", minor_units=7)
    )
    booked = BookDepositRequest.FromString(home.calls[-1].request)
    assert booked == BookDepositRequest(deposit_id="deposit-1", account_id=BOB, amount=amount)
    assert here.calls == []


@pytest.mark.parametrize("user", ["", "nobody", "s-a-" + "x" * 43, "q-a-001-" + "0" * 32])
async def test_who_is_no_user_gets_no_money(user: str) -> None:
    with pytest.raises(RpcError) as refused:
        await operator(silent(), silent()).Deposit(DepositRequest(user=user), INCOMING)
    assert (refused.value.code, refused.value.field_name) == (StatusCode.INVALID_ARGUMENT, "user")


async def test_an_account_that_its_home_does_not_know_gets_no_money() -> None:
    home = RecordingEndpoint(says(LookupAccountResponse()))
    with pytest.raises(RpcError, match="ACCOUNT_NOT_FOUND"):
        await operator(silent(), home).Deposit(DepositRequest(user=BOB), INCOMING)
    assert len(home.calls) == 1


@pytest.mark.parametrize(
    ("path", "request_made", "asked"),
    [
        ("FreezeAccount", FreezeAccountRequest(user=BOB), {"status": ACCOUNT_STATUS_FROZEN}),
        (
            "FreezeAccount",
            FreezeAccountRequest(user=BOB, version=0),
            {"status": ACCOUNT_STATUS_FROZEN, "version": 0},
        ),
        ("UnfreezeAccount", UnfreezeAccountRequest(user=BOB), {"status": ACCOUNT_STATUS_OPEN}),
        ("CloseAccount", CloseAccountRequest(user=BOB), {"status": ACCOUNT_STATUS_CLOSED}),
        (
            "SetLimits",
            SetLimitsRequest(user=BOB, per_day_minor_units_max=0),
            {"limits": LimitsChange(per_day_minor_units_max=0)},
        ),
        (
            "SetLimits",
            SetLimitsRequest(user=BOB, per_transfer_minor_units_max=7),
            {"limits": LimitsChange(per_transfer_minor_units_max=7)},
        ),
    ],
)
async def test_what_operators_do_to_an_account_is_done_at_its_home(
    path: str, request_made: Message, asked: dict[str, Any]
) -> None:
    changed = AccountControlChange(after=AccountControl(account_id=BOB))

    def answer(call: Call) -> Reply:
        if call.method.name == "LookupAccount":
            return says(LookupAccountResponse(account_id=BOB))(call)
        return says(changed)(call)

    here, home = silent(), RecordingEndpoint(answer)
    assert await getattr(operator(here, home), path)(request_made, INCOMING) == changed
    assert home.calls[-1].method.name == "ChangeControl"
    done = ChangeControlRequest.FromString(home.calls[-1].request)
    assert done == ChangeControlRequest(account_id=BOB, **asked)
    assert home.calls[-1].metadata[OPERATOR] == INCOMING.operator
    assert here.calls == []


async def test_what_an_account_may_do_is_asked_at_its_home() -> None:
    found = AccountControl(account_id=BOB, per_day_minor_units_max=9)

    def answer(call: Call) -> Reply:
        if call.method.name == "LookupAccount":
            return says(LookupAccountResponse(account_id=BOB))(call)
        return says(found)(call)

    home = RecordingEndpoint(answer)
    request = GetAccountControlRequest(user="bob@example.com")
    # The identifier's slot decides whom to ask; both centers are this one here.
    assert await operator(home, home).GetAccountControl(request, INCOMING) == found
    nobody = RecordingEndpoint(says(LookupAccountResponse()))
    with pytest.raises(RpcError, match="ACCOUNT_NOT_FOUND"):
        await operator(nobody, nobody).GetAccountControl(request, INCOMING)


async def test_status_and_facts_name_the_roles_that_do_not_answer() -> None:
    def answer(call: Call) -> Reply:
        if call.method.role == "session":
            raise unreachable("session", ran=False)
        if call.method.name == "Inspect":
            return says(
                InspectResponse(counts={f"{call.method.role}s": 3}, clock_drift_ms={"b": -1001})
            )(call)
        return says(CollectFactsResponse(violations=[Violation(what=call.method.role)]))(call)

    servicer = operator(RecordingEndpoint(answer), silent())
    status = await servicer.GetStatus(GetStatusRequest(), INCOMING)
    assert list(status.silent_roles) == ["session"]
    assert dict(status.counts) == {"accounts": 3, "transfers": 3}
    assert (status.center, status.slots, status.placement_epoch) == ("a", 2048, 1)
    assert [(peer.center, peer.reachable) for peer in status.peers] == [("b", True)]
    assert [(peer.clock_drift_ms, peer.clock_alarm) for peer in status.peers] == [(-1001, True)]
    assert not status.clock_wrong
    facts = await servicer.GetFacts(GetFactsRequest(), INCOMING)
    assert list(facts.silent_roles) == ["session"]
    assert [one.what for one in facts.violations] == ["account", "transfer"]


NAME = EntryName(source_center="b", topic="ledger", seq=7)


def parked_at(role: str, silent: str = "") -> RecordingEndpoint:
    """One role has one parked entry; another may be silent."""

    def answer(call: Call) -> Reply:
        if call.method.role == silent:
            raise unreachable(silent, ran=False)
        found = [ParkedAction(name=NAME)] if call.method.role == role else []
        if call.method.name == "RetryParked":
            return says(RetryParkedResponse(actions=found))(call)
        if call.method.name == "DropParked":
            return says(DropParkedResponse(actions=found))(call)
        entries = [ParkedEntry(name=one.name) for one in found]
        return says(ListParkedResponse(entries=entries, actions=found))(call)

    return RecordingEndpoint(answer)


async def test_parked_entries_of_all_roles_are_listed_and_the_silent_ones_named() -> None:
    servicer = operator(parked_at("transfer", silent="session"), silent())
    listed = await servicer.ListParked(ListParkedRequest(), INCOMING)
    assert [entry.name for entry in listed.entries] == [NAME]
    assert list(listed.silent_roles) == ["session"]
    done = await servicer.RetryParked(RetryParkedRequest(), INCOMING)
    assert [action.name for action in done.actions] == [NAME]
    assert list(done.silent_roles) == ["session"]


@pytest.mark.parametrize(
    ("role", "silent_role", "reason"),
    [
        ("transfer", "", ""),
        ("transfer", "session", ""),
        ("nobody", "", "NOT_PARKED"),
        ("nobody", "transfer", "ROLE_SILENT"),
    ],
)
async def test_a_named_entry_is_found_at_its_role_or_refused(
    role: str, silent_role: str, reason: str
) -> None:
    servicer = operator(parked_at(role, silent_role), silent())
    if not reason:
        dropped = await servicer.DropParked(DropParkedRequest(name=NAME), INCOMING)
        retried = await servicer.RetryParked(RetryParkedRequest(name=NAME), INCOMING)
        assert list(dropped.actions) == list(retried.actions) == [ParkedAction(name=NAME)]
        return
    with pytest.raises(RpcError, match=reason):
        await servicer.DropParked(DropParkedRequest(name=NAME), INCOMING)
    with pytest.raises(RpcError, match=reason):
        await servicer.RetryParked(RetryParkedRequest(name=NAME), INCOMING)


async def test_nothing_is_dropped_without_being_named() -> None:
    here = parked_at("transfer")
    with pytest.raises(RpcError) as refused:
        await operator(here, silent()).DropParked(DropParkedRequest(), INCOMING)
    assert refused.value.field_name == "name"
    assert here.calls == []


async def test_a_transfers_facts_are_the_transfer_services() -> None:
    facts = FindTransfersResponse(transfers=[TransferFacts(transfer_id="transfer-1")])
    here = RecordingEndpoint(says(facts))
    request = FindTransfersRequest(id="transfer-1")
    assert await operator(here, silent()).FindTransfers(request, INCOMING) == facts
    (call,) = here.calls
    assert call.method.path == "/duohuo.internal.v1.TransferPeerService/FindTransfers"
    assert FindTransfersRequest.FromString(call.request) == request
    # A silent service is not one that knows nothing.
    with pytest.raises(RpcError, match="CENTER_UNREACHABLE"):
        await operator(silent(), silent()).FindTransfers(request, INCOMING)


async def test_a_move_must_say_what_to_move_and_where_to() -> None:
    """Nothing is not slot 0."""
    here, home = silent(), silent()
    with pytest.raises(RpcError) as refused:
        await of_the_mesh(here, home).MoveSlot(MoveSlotRequest(home="b"), INCOMING)
    assert (refused.value.reason, refused.value.field_name) == ("INVALID_FIELD", "what")
    with pytest.raises(RpcError, match="UNKNOWN_CENTER"):
        await of_the_mesh(here, home).MoveSlot(MoveSlotRequest(slot=0, home="c"), INCOMING)
    assert here.calls == home.calls == []


async def test_money_moves_before_the_account_at_whoever_is_home_by_now() -> None:
    wrong = RpcError(
        StatusCode.FAILED_PRECONDITION, "WRONG_HOME", "", details={"home": "b", "epoch": "5"}
    )
    here = RecordingEndpoint(fails(wrong))
    home = RecordingEndpoint(says(HandOverResponse(epoch=6, taken_over=True, accounts_moved=2)))
    done = await of_the_mesh(here, home).MoveSlot(MoveSlotRequest(slot=0, home="a"), INCOMING)
    assert (done.epoch, done.taken_over, done.accounts_moved) == (6, True, 4)
    assert [call.method.role for call in here.calls] == ["transfer"]
    assert [call.method.role for call in home.calls] == ["transfer", "account"]
