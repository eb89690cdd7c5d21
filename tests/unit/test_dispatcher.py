"""Calls reach a servicer only if they are whole and allowed, and its faults never reach the caller."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog.testing
from grpc import StatusCode

from duohuo.v1.account_service_pb2 import (
    Account,
    ChangePasswordResponse,
    GetAccountRequest,
    Notification,
    RegisterRequest,
)
from duohuo.v1.announcement_service_pb2 import (
    ListAnnouncementsResponse,
    WatchAnnouncementsRequest,
)
from runtime.dispatcher import Dispatcher, Incoming
from runtime.endpoint import ACCOUNT, CAUSAL, SERVED_BY, Call
from runtime.errors import RpcError
from runtime.hlc import AHEAD_MS_MAX, CLIENT_AHEAD_MS_MAX, COUNTER_BITS, HybridClock
from runtime.methods import PUBLIC_FILES, method, methods_in, service_methods
from tests.fakes import NOON_MS, FakeClock, account

ALICE, BOB = account(1), account(2)
GET_ACCOUNT = method("/duohuo.v1.AccountService/GetAccount")
REGISTER = method("/duohuo.v1.AccountService/Register")
WATCH = method("/duohuo.v1.AnnouncementService/WatchAnnouncements")
SECRET = "hunter2-hunter2"


class Accounts:
    """Answers, or breaks as told, and remembers for whom it was called."""

    def __init__(self, breaks: Exception | None = None) -> None:
        self.breaks = breaks
        self.callers: list[str] = []

    async def Register(self, request: RegisterRequest, incoming: Incoming) -> Account:
        self.callers.append(incoming.caller_account_id)
        if self.breaks is not None:
            raise self.breaks
        incoming.reply_metadata["duohuo-home"] = "b"
        return Account(identifiers=[request.identifier])

    async def GetAccount(self, request: GetAccountRequest, incoming: Incoming) -> Account:
        self.callers.append(incoming.caller_account_id)
        return Account(account_id=request.account_id)

    async def UpdateProfile(self, _request: object, _incoming: Incoming) -> Account:
        raise NotImplementedError

    AddIdentifier = RemoveIdentifier = ExportAccount = UpdateProfile

    async def ChangePassword(self, _request: object, _incoming: Incoming) -> ChangePasswordResponse:
        raise NotImplementedError

    async def GetNotification(self, _request: object, _incoming: Incoming) -> Notification:
        raise NotImplementedError

    SetNotification = GetNotification


class Announcements:
    """Says something, then breaks as told."""

    def __init__(self, breaks: Exception | None = None) -> None:
        self.breaks = breaks

    async def ListAnnouncements(self, _request: object, _incoming: Incoming) -> Any:
        raise NotImplementedError

    async def WatchAnnouncements(
        self, _request: WatchAnnouncementsRequest, _incoming: Incoming
    ) -> AsyncIterator[ListAnnouncementsResponse]:
        yield ListAnnouncementsResponse()
        if self.breaks is not None:
            raise self.breaks


def dispatcher(accounts: Accounts, clock: HybridClock | None = None) -> Dispatcher:
    made = Dispatcher("a", clock or HybridClock(FakeClock()))
    made.add("duohuo.v1.AccountService", accounts)
    return made


def get(account_id: str, caller: str) -> Call:
    request = GetAccountRequest(account_id=account_id).SerializeToString()
    return Call(GET_ACCOUNT, request, 1.0, {ACCOUNT: caller})


async def refusal(call: Call, accounts: Accounts | None = None) -> RpcError:
    with pytest.raises(RpcError) as refused:
        await dispatcher(accounts or Accounts()).unary(call)
    return refused.value


async def test_an_answer_says_who_served_it_and_what_the_servicer_adds() -> None:
    clock = HybridClock(FakeClock())
    latest = clock.tick()
    request = RegisterRequest(identifier="alice").SerializeToString()
    reply = await dispatcher(Accounts(), clock).unary(Call(REGISTER, request, 1.0))
    assert Account.FromString(reply.payload).identifiers == ["alice"]
    assert reply.metadata == {SERVED_BY: "a", CAUSAL: str(latest), "duohuo-home": "b"}


@pytest.mark.parametrize("payload", [b"\x0a", b"\xff" * 5, b"\x0a\x02\xff\xff"])
async def test_malformed_bytes_are_the_callers_mistake(payload: bytes) -> None:
    accounts = Accounts()
    refused = await refusal(Call(REGISTER, payload, 1.0), accounts)
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "MALFORMED")
    assert accounts.callers == []


async def test_what_is_not_served_here_is_unimplemented() -> None:
    refused = await refusal(Call(method("/duohuo.v1.SessionService/Login"), b"", 1.0))
    assert (refused.code, refused.reason) == (StatusCode.UNIMPLEMENTED, "NOT_SERVED_HERE")


@pytest.mark.parametrize(
    ("caller", "reason"),
    [("", "SESSION_REQUIRED"), (BOB, "NOT_YOURS"), (ALICE + " ", "NOT_YOURS"), (ALICE, "")],
)
async def test_a_users_data_is_for_its_owner(caller: str, reason: str) -> None:
    accounts = Accounts()
    call = get(ALICE, caller)
    if reason:
        assert (await refusal(call, accounts)).reason == reason
        assert accounts.callers == []
    else:
        await dispatcher(accounts).unary(call)
        assert accounts.callers == [ALICE]


async def test_a_request_without_an_owner_is_not_the_callers() -> None:
    assert (await refusal(get("", ALICE))).reason == "NOT_YOURS"


async def test_a_public_call_needs_no_session() -> None:
    accounts = Accounts()
    await dispatcher(accounts).unary(Call(REGISTER, b"", 1.0))
    assert accounts.callers == [""]


@pytest.mark.parametrize(
    "token",
    [
        "garbage",
        "1.5",
        "0x10",
        "9" * 5000,
    ],
    ids=["word", "fraction", "hex", "endless"],
)
async def test_a_causal_token_of_nobody_is_refused(token: str) -> None:
    accounts = Accounts()
    own = account(1)
    request = GetAccountRequest(account_id=own).SerializeToString()
    call = Call(GET_ACCOUNT, request, 1.0, {CAUSAL: token, ACCOUNT: own})
    refused = await refusal(call, accounts)
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "CAUSAL_TOKEN_INVALID")
    assert refused.field_name == CAUSAL
    assert accounts.callers == []


@pytest.mark.parametrize("token", [(NOON_MS + AHEAD_MS_MAX) << COUNTER_BITS, 2**64])
async def test_a_causal_token_from_far_ahead_is_believed_up_to_its_limit(token: int) -> None:
    """A center with a wrong clock must still let its users in."""
    clock = HybridClock(FakeClock())
    await dispatcher(Accounts(), clock).unary(Call(REGISTER, b"", 1.0, {CAUSAL: str(token)}))
    assert clock.latest == (NOON_MS + CLIENT_AHEAD_MS_MAX) << COUNTER_BITS


async def test_a_causal_token_moves_the_clock() -> None:
    clock = HybridClock(FakeClock())
    seen = (NOON_MS + 1000) << COUNTER_BITS
    await dispatcher(Accounts(), clock).unary(Call(REGISTER, b"", 1.0, {CAUSAL: str(seen)}))
    assert clock.tick() > seen


async def test_a_refusal_reaches_the_caller_as_it_is() -> None:
    wanted = RpcError(StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN", "taken")
    assert await refusal(Call(REGISTER, b"", 1.0), Accounts(breaks=wanted)) is wanted


@pytest.mark.parametrize(
    "bug", [ValueError(SECRET), KeyError(SECRET), RecursionError(SECRET), TimeoutError(SECRET)]
)
async def test_the_text_of_a_fault_reaches_neither_caller_nor_log(bug: Exception) -> None:
    with structlog.testing.capture_logs() as logged:
        refused = await refusal(Call(REGISTER, b"", 1.0), Accounts(breaks=bug))
    assert (refused.code, refused.reason, refused.ran) == (StatusCode.INTERNAL, "INTERNAL", True)
    assert SECRET.encode() not in refused.to_status().SerializeToString()
    assert [entry["kind"] for entry in logged] == [type(bug).__name__]
    assert SECRET not in str(logged)


async def test_the_text_of_a_fault_in_a_stream_reaches_neither_caller_nor_log() -> None:
    made = Dispatcher("a", HybridClock(FakeClock()))
    made.add("duohuo.v1.AnnouncementService", Announcements(breaks=ValueError(SECRET)))
    answers = made.stream(Call(WATCH, b"", 1.0))
    assert await anext(answers) == b""
    with structlog.testing.capture_logs() as logged, pytest.raises(RpcError) as refused:
        await anext(answers)
    assert refused.value.reason == "INTERNAL"
    assert SECRET not in str(refused.value) + str(logged)


async def test_streams_are_guarded_like_single_answers() -> None:
    made = Dispatcher("a", HybridClock(FakeClock()))
    made.add("duohuo.v1.AnnouncementService", Announcements())
    with pytest.raises(RpcError, match="MALFORMED"):
        await anext(made.stream(Call(WATCH, b"\xff", 1.0)))
    assert [message async for message in made.stream(Call(WATCH, b"", 1.0))] == [b""]


RECOVERS = RpcError(StatusCode.UNAVAILABLE, "CENTER_RECOVERING", "gets its data back")


async def test_a_service_that_recovers_refuses_until_it_is_well() -> None:
    accounts, recovers = Accounts(), True
    made = Dispatcher("a", HybridClock(FakeClock()))
    made.add("duohuo.v1.AccountService", accounts, refusal=lambda: RECOVERS if recovers else None)
    for call in (get(ALICE, ALICE), get(ALICE, BOB), Call(REGISTER, b"\xff", 1.0)):
        with pytest.raises(RpcError) as refused:
            await made.unary(call)
        assert refused.value is RECOVERS
    assert accounts.callers == []
    recovers = False
    await made.unary(get(ALICE, ALICE))
    assert accounts.callers == [ALICE]


async def test_streams_are_refused_before_their_first_message() -> None:
    made = Dispatcher("a", HybridClock(FakeClock()))
    made.add("duohuo.v1.AnnouncementService", Announcements(), refusal=lambda: RECOVERS)
    with pytest.raises(RpcError, match="CENTER_RECOVERING"):
        await anext(made.stream(Call(WATCH, b"", 1.0)))


@pytest.mark.parametrize("role", ["Account", "Session", "Transfer"])
def test_what_recovering_needs_is_answered_all_the_same(role: str) -> None:
    """A snapshot is not: whoever has not all of its own may have nothing of others'."""
    service = service_methods(f"duohuo.internal.v1.{role}PeerService")
    answered = {one.name for one in service if one.while_recovering}
    assert answered == {"Exchange", "Pull", "Seal", "Inspect", "ListParked", "ListAudit"}


def test_users_methods_are_never_answered_by_a_service_that_recovers() -> None:
    assert not [one.path for one in methods_in(PUBLIC_FILES).values() if one.while_recovering]
