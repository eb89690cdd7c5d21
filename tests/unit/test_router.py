"""The gateway asks the right centers, once unless it may ask again, and says what it could not do."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from grpc import StatusCode

from duohuo.v1.account_service_pb2 import Account, GetAccountRequest, RegisterRequest
from duohuo.v1.routing_pb2 import (
    ACCESS_PUBLIC,
    POLICY_HOME,
    POLICY_HOME_FIRST,
    POLICY_LOCAL,
    POLICY_LOCAL_THEN_HOME,
    POLICY_ORIGIN_THEN_HOME,
)
from duohuo.v1.session_service_pb2 import GetSessionRequest, Session
from duohuo.v1.transfer_service_pb2 import GetApplicationRequest, TransferRequest
from gateway.announcements import Announcements
from gateway.authenticator import Authenticator
from gateway.health import Health
from gateway.limits import Limiter, Limits
from gateway.router import ANSWER_MARGIN_S, FAILOVER_TIMEOUT_S, RETRY_AFTER_MS, Router
from runtime import ids
from runtime.endpoint import (
    ACCOUNT,
    AUTHORIZATION,
    CAUSAL,
    CLIENT,
    EPOCH,
    GATEWAY,
    HOP,
    SESSION,
    Call,
    Reply,
)
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.methods import Method, method
from runtime.placement import slot_of
from tests.fakes import (
    SEAL,
    Answer,
    FakeClock,
    RecordingEndpoint,
    account,
    fails,
    in_turn,
    placement,
    says,
    see,
)

REGISTER = method("/duohuo.v1.AccountService/Register")
GET_ACCOUNT = method("/duohuo.v1.AccountService/GetAccount")
GET_SESSION = method("/duohuo.v1.SessionService/GetSession")
LOGIN = method("/duohuo.v1.SessionService/Login")
TRANSFER = method("/duohuo.v1.TransferService/Transfer")
GET_APPLICATION = method("/duohuo.v1.TransferService/GetApplication")
# Made up, so that each rule is tried by itself.
HOME_FIRST = replace(
    GET_ACCOUNT, policy=POLICY_HOME_FIRST, access=ACCESS_PUBLIC, safe_to_repeat=True
)
HOME_FIRST_ONCE = replace(HOME_FIRST, safe_to_repeat=False)
SECOND_READ = replace(HOME_FIRST, policy=POLICY_LOCAL_THEN_HOME)
HOME_ONLY = replace(HOME_FIRST, policy=POLICY_HOME)

BEARER = {AUTHORIZATION: f"Bearer {SEAL.token('a', 'x' * 43)}"}
AT_B = account(1)
"""At home at b, then c, then a."""

not_sent = fails(unreachable("?", ran=False))
lost_answer = fails(unreachable("?", ran=True))
too_late = fails(RpcError(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "late", ran=True))
not_copied = fails(RpcError(StatusCode.UNAVAILABLE, "NOT_COPIED_YET", "wait", retry_after_ms=1000))
wrong_clock = fails(RpcError(StatusCode.UNAVAILABLE, "CLOCK_WRONG", "the clock is off"))
TAKEN = RpcError(StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN", "taken")


class World:
    """A gateway at a, and what centers a, b and c answer."""

    def __init__(self, **answers: Answer) -> None:
        self.clock = FakeClock()
        told = says(Account(account_id="told"))
        self.centers = {name: RecordingEndpoint(answers.get(name, told)) for name in "abc"}
        self.mesh = Mesh("a", self.centers, self.clock)
        authenticator = Authenticator("a", self.clock, SEAL)
        self.health = Health(self.mesh, self.clock)
        self.router = Router(
            self.mesh,
            placement("a", "b", "c", epoch=7),
            authenticator,
            self.clock,
            Limiter(Limits(user_calls_per_s=10, address_calls_per_s=20), self.clock),
            Announcements(self.mesh, self.clock, self.health),
            self.health,
        )

    @property
    def asked(self) -> str:
        """The centers that were asked."""
        return "".join(name for name, endpoint in self.centers.items() for _ in endpoint.calls)

    def metadata(self, center: str) -> dict[str, str]:
        """What came with the last call to a center."""
        return dict(self.centers[center].calls[-1].metadata)

    async def refusal(self, call: Call) -> RpcError:
        with pytest.raises(RpcError) as refused:
            await self.router.unary(call)
        return refused.value


def about(
    called: Method,
    account_id: str = AT_B,
    timeout_s: float = 5.0,
    metadata: Mapping[str, str] | None = None,
) -> Call:
    request = GetAccountRequest(account_id=account_id).SerializeToString()
    return Call(called, request, timeout_s, metadata or {})


@pytest.mark.parametrize(
    ("called", "home", "asked", "answered"),
    [
        (HOME_FIRST, not_sent, "bc", True),
        (HOME_FIRST_ONCE, not_sent, "bc", True),
        (HOME_FIRST, lost_answer, "bc", True),
        (HOME_FIRST_ONCE, lost_answer, "b", False),
        (HOME_FIRST, too_late, "bc", True),
        (HOME_FIRST_ONCE, too_late, "b", False),
        (HOME_FIRST, not_copied, "bc", True),
        (HOME_FIRST_ONCE, not_copied, "bc", True),
        (HOME_FIRST_ONCE, wrong_clock, "bc", True),
        (HOME_FIRST, fails(TAKEN), "b", False),
        (HOME_FIRST_ONCE, fails(TAKEN), "b", False),
    ],
    ids=[
        *("not sent", "not sent, once", "lost answer", "lost answer, once", "late", "late, once"),
        *("not copied", "not copied, once", "wrong clock, once", "refused", "refused, once"),
    ],
)
async def test_a_call_is_sent_on_only_if_it_did_not_run_or_may_run_twice(
    called: Method, home: Answer, asked: str, answered: bool
) -> None:
    world = World(b=home)
    if answered:
        await world.router.unary(about(called))
    else:
        await world.refusal(about(called))
    assert world.asked == asked


async def test_a_definite_refusal_reaches_the_caller_as_it_is() -> None:
    assert await World(b=fails(TAKEN)).refusal(about(HOME_FIRST)) == TAKEN


async def test_a_refusal_does_not_hide_that_a_center_asked_before_may_have_run_it() -> None:
    refused = await World(b=lost_answer, c=fails(TAKEN)).refusal(about(HOME_FIRST))
    assert (refused.reason, refused.ran) == (TAKEN.reason, True)


async def test_the_answer_of_the_first_center_that_has_one_is_the_answer() -> None:
    world = World(b=not_sent, c=says(Account(account_id="from c")))
    reply = await world.router.unary(about(HOME_FIRST))
    assert Account.FromString(reply.payload).account_id == "from c"


async def test_a_lost_center_is_not_asked() -> None:
    world = World()
    see(world.mesh, "b", answering=False)
    await world.router.unary(about(HOME_FIRST_ONCE))
    assert world.asked == "c"


async def test_the_bytes_of_a_request_are_forwarded_as_they_came() -> None:
    world = World()
    unknown_field = b"\x92\x3f\x03new"
    call = about(HOME_FIRST)
    await world.router.unary(call._replace(request=call.request + unknown_field))
    assert world.centers["b"].calls[0].request == call.request + unknown_field


@pytest.mark.parametrize("ran", [False, True], ids=["certainly not run", "may have run"])
async def test_a_dead_home_is_named_with_what_to_do(ran: bool) -> None:
    world = World(b=lost_answer if ran else not_sent)
    refused = await world.refusal(
        Call(TRANSFER, TransferRequest(payer_account_id=AT_B).SerializeToString(), 5.0, BEARER)
    )
    assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "HOME_CENTER_UNAVAILABLE")
    assert refused.retry_after_ms == RETRY_AFTER_MS
    assert refused.details == {"center": "b"}
    assert "ApplyTransfer" in refused.advice
    assert refused.ran is ran
    assert ("may have run" in refused.message) is ran


async def test_only_the_dead_centers_users_are_refused() -> None:
    world = World(b=not_sent)
    homes = placement("a", "b", "c")
    refused_at = set()
    for identifier in (f"user{number}@example.com" for number in range(30)):
        request = RegisterRequest(identifier=identifier).SerializeToString()
        if homes.home(slot_of(identifier)) != "b":
            await world.router.unary(Call(REGISTER, request, 5.0))
            continue
        refused = await world.refusal(Call(REGISTER, request, 5.0))
        refused_at.add((refused.reason, refused.advice))
    ((reason, advice),) = refused_at
    assert reason == "HOME_CENTER_UNAVAILABLE"
    assert "Registration" in advice


async def test_a_session_whose_origin_is_dead_asks_for_a_new_login() -> None:
    request = GetSessionRequest(token=SEAL.token("b", "x" * 43)).SerializeToString()
    refused = await World(b=not_sent).refusal(Call(GET_SESSION, request, 5.0))
    assert (refused.code, refused.reason) == (StatusCode.UNAUTHENTICATED, "RELOGIN_REQUIRED")
    assert refused.retry_after_ms is None
    assert "log in again" in refused.advice


async def test_a_call_with_such_a_session_asks_for_a_new_login_too() -> None:
    world = World(b=not_sent)
    bearer = f"Bearer {SEAL.token('b', 'x' * 43)}"
    refused = await world.refusal(about(GET_ACCOUNT, account(0), metadata={AUTHORIZATION: bearer}))
    assert refused.reason == "RELOGIN_REQUIRED"


async def test_what_is_not_copied_yet_is_read_at_home() -> None:
    world = World(a=not_copied, b=says(Account(account_id="at home")))
    reply = await world.router.unary(about(SECOND_READ))
    assert Account.FromString(reply.payload).account_id == "at home"
    assert (world.metadata("a")[HOP], world.metadata("b")[HOP]) == ("local", "second-read")


async def test_what_is_copied_is_not_read_at_home() -> None:
    world = World()
    await world.router.unary(about(SECOND_READ))
    assert world.asked == "a"


async def test_what_is_not_copied_yet_and_has_no_other_place_to_be_read_is_said_to_be_so() -> None:
    world = World(a=not_copied)
    refused = await world.refusal(about(replace(HOME_FIRST, policy=POLICY_LOCAL)))
    assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "NOT_COPIED_YET")
    assert refused.retry_after_ms == 1000


async def test_late_is_late_and_says_whom_it_waited_for() -> None:
    refused = await World(b=too_late).refusal(about(HOME_FIRST_ONCE))
    assert (refused.code, refused.reason) == (StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert refused.ran
    assert "center b" in refused.message
    assert "same id" in refused.advice


@pytest.mark.parametrize(("timeout_s", "took_ms"), [(5.0, 2000), (5.0, 100), (1.5, 500), (60.0, 1)])
async def test_all_attempts_together_stay_within_the_callers_deadline(
    timeout_s: float, took_ms: int
) -> None:
    """Each but the last is cut short, so that there is time for the next; the last, to answer."""
    world = World()

    def slow(_call: Call) -> Reply:
        world.clock.advance(took_ms)
        raise unreachable("?", ran=True)

    for center in world.centers.values():
        center.answer = slow
    await world.refusal(about(HOME_FIRST, timeout_s=timeout_s))
    given_ms = [round(world.centers[center].calls[0].timeout_s * 1000) for center in "bca"]
    left_ms = [
        round((timeout_s - ANSWER_MARGIN_S) * 1000) - number * took_ms for number in range(3)
    ]
    assert given_ms[2] == left_ms[2]
    for given, left in zip(given_ms[:2], left_ms, strict=False):
        assert 0 < given <= min(left, FAILOVER_TIMEOUT_S * 1000)


async def test_only_the_session_says_who_calls() -> None:
    """Whatever a caller claims in the mesh's own metadata stays outside; the token does too."""
    world = World(a=says(Session(account_id=AT_B, session_id="a-1")))
    claims = {
        ACCOUNT: account(9),
        SESSION: "a-9",
        HOP: "trusted",
        EPOCH: "99",
        GATEWAY: "z",
        CAUSAL: "12",
    }
    await world.router.unary(about(GET_ACCOUNT, metadata={**BEARER, **claims}))
    assert world.metadata("a") == {
        ACCOUNT: AT_B,
        SESSION: "a-1",
        HOP: "local",
        EPOCH: "7",
        GATEWAY: "a",
        CAUSAL: "12",
    }


async def test_a_public_call_has_no_caller_whatever_it_claims() -> None:
    world = World()
    await world.router.unary(about(HOME_FIRST, metadata={**BEARER, ACCOUNT: account(9)}))
    assert world.metadata("b") == {HOP: "forwarded", EPOCH: "7", GATEWAY: "a"}


async def test_a_users_call_without_a_session_goes_nowhere() -> None:
    world = World()
    assert (await world.refusal(about(GET_ACCOUNT))).reason == "SESSION_REQUIRED"
    assert world.asked == ""


@pytest.mark.parametrize("key", ["", "nobody", SEAL.token("b", "x" * 43)])
async def test_a_key_that_names_no_home_is_the_callers_mistake(key: str) -> None:
    world = World()
    refused = await world.refusal(about(HOME_FIRST, key))
    assert (refused.code, refused.field_name) == (StatusCode.INVALID_ARGUMENT, "account_id")
    assert world.asked == ""


FORGED = f"s-b-{'x' * 43}.{'x' * 22}"


@pytest.mark.parametrize("key", ["", "nobody", AT_B, SEAL.token("z", "x" * 43), FORGED])
async def test_a_token_of_no_center_of_this_mesh_is_no_session(key: str) -> None:
    world = World()
    call = Call(GET_SESSION, GetSessionRequest(token=key).SerializeToString(), 5.0)
    refused = await world.refusal(call)
    assert (refused.code, refused.reason) == (StatusCode.UNAUTHENTICATED, "SESSION_INVALID")
    assert world.asked == ""


async def test_bytes_that_are_no_message_are_the_callers_mistake() -> None:
    world = World()
    refused = await world.refusal(Call(REGISTER, b"\x0a\xff", 5.0))
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "MALFORMED")
    assert world.asked == ""


async def test_a_login_is_local_even_if_its_key_is_rubbish() -> None:
    """The session service says what is wrong with it."""
    world = World()
    await world.router.unary(Call(LOGIN, b"", 5.0))
    assert world.asked == "a"


@pytest.mark.parametrize(
    ("dead", "asked"), [("", "c"), ("c", "b"), ("cb", "a")], ids=["origin", "home", "here"]
)
async def test_an_application_is_answered_by_whichever_center_is_alive(
    dead: str, asked: str
) -> None:
    world = World(**dict.fromkeys(dead, not_sent))
    called = replace(GET_APPLICATION, policy=POLICY_ORIGIN_THEN_HOME, access=ACCESS_PUBLIC)
    wanted = ids.application_id("c", 1, "0" * 32)
    request = GetApplicationRequest(application_id=wanted).SerializeToString()
    await world.router.unary(Call(called, request, 5.0))
    assert [call.method.name for call in world.centers[asked].calls] == ["GetApplication"]


@pytest.mark.parametrize(("lost", "followed"), [("", "b"), ("b", "c"), ("bc", "a")])
async def test_a_stream_follows_the_first_center_that_is_there(lost: str, followed: str) -> None:
    world = World()
    for center in lost:
        see(world.mesh, center, answering=False)
    received = [message async for message in world.router.stream(about(HOME_FIRST))]
    assert len(received) == 1
    assert world.asked == followed


async def test_a_stream_needs_a_session_like_any_call() -> None:
    world = World()
    with pytest.raises(RpcError, match="SESSION_REQUIRED"):
        await anext(world.router.stream(about(GET_ACCOUNT)))
    assert world.asked == ""


@pytest.mark.parametrize(
    ("b", "c", "a", "ran"),
    [
        (wrong_clock, wrong_clock, wrong_clock, False),
        (wrong_clock, not_sent, not_sent, False),
        (lost_answer, wrong_clock, wrong_clock, True),
    ],
)
async def test_a_wrong_clock_is_named_when_nobody_else_can(
    b: Answer, c: Answer, a: Answer, *, ran: bool
) -> None:
    refused = await World(a=a, b=b, c=c).refusal(about(HOME_FIRST))
    assert (refused.reason, refused.ran) == ("CLOCK_WRONG", ran)


async def test_a_user_who_calls_too_often_is_told_when_to_come_back() -> None:
    world = World(a=says(Session(account_id=AT_B)))
    call = about(GET_ACCOUNT, metadata=BEARER)
    for _ in range(20):
        await world.router.unary(call)
    asked = len(world.centers["b"].calls)
    refused = await world.refusal(call)
    assert (refused.reason, refused.retry_after_ms) == ("RATE_LIMITED", 100)
    assert len(world.centers["b"].calls) == asked
    seen = len(world.centers["a"].calls)
    assert (await world.refusal(call)).reason == "RATE_LIMITED"
    assert len(world.centers["a"].calls) == seen, "a refusal must not look at the session again"
    world.clock.advance(100)
    await world.router.unary(call)


async def test_an_address_that_calls_too_often_is_refused_before_anything_is_looked_at() -> None:
    world = World()
    nonsense = Call(HOME_FIRST, b"\xff", 5.0, {CLIENT: "192.0.2.1"})
    reasons = [(await world.refusal(nonsense)).reason for _ in range(41)]
    assert set(reasons[:40]) == {"MALFORMED"}
    assert reasons[40] == "RATE_LIMITED"
    assert world.asked == ""


def wrong_home(home: str, epoch: int) -> RpcError:
    return RpcError(
        StatusCode.FAILED_PRECONDITION,
        "WRONG_HOME",
        "it is not home",
        details={"home": home, "epoch": str(epoch)},
    )


async def test_a_gateway_that_does_not_know_of_a_move_is_corrected_in_one_extra_trip() -> None:
    world = World(b=fails(wrong_home("c", 8)))
    await world.router.unary(about(HOME_FIRST_ONCE))
    assert world.asked == "bc"
    await world.router.unary(about(HOME_FIRST_ONCE))
    assert world.asked == "bcc"
    assert world.metadata("c")["duohuo-epoch"] == "8"
    # Other slots are where they were.
    await world.router.unary(about(HOME_FIRST_ONCE, account(4)))
    assert world.asked == "bbccc"


async def test_a_new_home_that_does_not_act_yet_is_asked_again() -> None:
    answers = in_turn(fails(wrong_home("b", 7)), fails(wrong_home("b", 8)), says(Account()))
    world = World(b=fails(wrong_home("c", 8)), c=answers)
    await world.router.unary(about(HOME_FIRST_ONCE))
    assert world.asked.count("c") == 3


async def test_old_news_and_nonsense_teach_a_gateway_nothing() -> None:
    for lie in (wrong_home("c", 6), wrong_home("nobody", 9)):
        world = World(b=in_turn(fails(lie), says(Account()), says(Account())))
        await world.router.unary(about(HOME_FIRST_ONCE))
        await world.router.unary(about(HOME_FIRST_ONCE))
        assert world.asked in ("bbb", "bbc")


async def test_whoever_cannot_wait_for_the_new_home_hears_that_nothing_was_done() -> None:
    world = World(b=fails(wrong_home("c", 8)), c=fails(wrong_home("b", 7)))
    refused = await world.refusal(about(HOME_FIRST_ONCE, timeout_s=0.2))
    assert (refused.code, refused.reason, refused.ran) == (
        StatusCode.UNAVAILABLE,
        "SLOT_MOVING",
        False,
    )
    assert refused.retry_after_ms == 1000


async def test_an_error_that_comes_from_an_outage_says_what_affected_users_are_told_of_it() -> None:
    world = World(b=not_sent)
    see(world.mesh, "b", answering=False)
    see(world.mesh, "c", answering=False)
    refused = await world.refusal(about(HOME_ONLY))
    assert [one.center for one in refused.announcements] == ["b"]
    assert RpcError.from_status(refused.to_status()).announcements == refused.announcements


async def test_a_refusal_that_comes_from_no_outage_says_nothing_of_one() -> None:
    world = World(a=fails(TAKEN))
    see(world.mesh, "b", answering=False)
    assert (await world.refusal(about(SECOND_READ))).announcements == ()
