"""A session is believed for two seconds at most, and this center's own not a moment."""

import pytest
from grpc import StatusCode

import gateway.authenticator
from duohuo.v1.session_service_pb2 import GetSessionRequest, Session
from gateway.authenticator import CACHE_MS, Authenticator
from runtime import ids
from runtime.endpoint import AUTHORIZATION, Call
from runtime.errors import RpcError, session_invalid
from runtime.methods import method
from runtime.token_seal import TokenSeal
from tests.fakes import SEAL, FakeClock, RecordingEndpoint, account, fails, says

GET_ACCOUNT = method("/duohuo.v1.AccountService/GetAccount")
ALICE = account(1)
HERE, ELSEWHERE = SEAL.token("a", "x" * 43), SEAL.token("b", "x" * 43)


class Door:
    """An authenticator at a, and the sessions' origin."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.origin = RecordingEndpoint(says(Session(account_id=ALICE)))
        self.authenticator = Authenticator("a", self.clock, SEAL)

    async def enter(self, token: str, scheme: str = "Bearer") -> str:
        call = Call(GET_ACCOUNT, b"", 1.5, {AUTHORIZATION: f"{scheme} {token}"})
        return (await self.authenticator.caller_of(call, self.origin)).account_id

    def revoke(self) -> None:
        self.origin.answer = fails(session_invalid())


async def test_a_token_is_shown_to_the_router_which_finds_its_origin() -> None:
    door = Door()
    assert await door.enter(ELSEWHERE) == ALICE
    (call,) = door.origin.calls
    assert call.method.name == "GetSession"
    assert GetSessionRequest.FromString(call.request).token == ELSEWHERE
    assert call.timeout_s == 1.5
    assert call.metadata == {}


@pytest.mark.parametrize(("after_ms", "good"), [(CACHE_MS - 1, True), (CACHE_MS, False)])
async def test_a_revoked_session_of_another_center_is_good_for_two_seconds_at_most(
    after_ms: int, good: bool
) -> None:
    assert CACHE_MS <= 2000
    door = Door()
    await door.enter(ELSEWHERE)
    door.revoke()
    door.clock.advance(after_ms)
    if good:
        assert await door.enter(ELSEWHERE) == ALICE
    else:
        with pytest.raises(RpcError, match="SESSION_INVALID"):
            await door.enter(ELSEWHERE)


async def test_a_wall_clock_set_back_does_not_prolong_a_session() -> None:
    door = Door()
    await door.enter(ELSEWHERE)
    door.revoke()
    door.clock.advance(CACHE_MS)
    door.clock.jump(-CACHE_MS * 10)
    with pytest.raises(RpcError, match="SESSION_INVALID"):
        await door.enter(ELSEWHERE)


async def test_being_believed_does_not_prolong_belief() -> None:
    door = Door()
    for _ in range(4):
        await door.enter(ELSEWHERE)
        door.clock.advance(CACHE_MS // 2)
    assert len(door.origin.calls) == 2


async def test_a_session_of_this_center_is_read_every_time() -> None:
    door = Door()
    await door.enter(HERE)
    door.revoke()
    with pytest.raises(RpcError, match="SESSION_INVALID"):
        await door.enter(HERE)


async def test_a_refusal_is_not_remembered() -> None:
    door = Door()
    door.revoke()
    with pytest.raises(RpcError, match="SESSION_INVALID"):
        await door.enter(ELSEWHERE)
    door.origin.answer = says(Session(account_id=ALICE))
    assert await door.enter(ELSEWHERE) == ALICE


async def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.authenticator, "CACHE_SESSIONS_MAX", 3)
    door = Door()
    tokens = [SEAL.token("b", f"{number:043}") for number in range(5)]
    for token in tokens:
        await door.enter(token)
    assert len(door.authenticator._cache) == 3
    await door.enter(tokens[-1])
    assert len(door.origin.calls) == 5
    await door.enter(tokens[0])
    assert len(door.origin.calls) == 6


async def test_the_token_is_not_kept_in_memory() -> None:
    door = Door()
    await door.enter(ELSEWHERE)
    assert ELSEWHERE not in repr(door.authenticator._cache)


@pytest.mark.parametrize(
    "header",
    [{}, {AUTHORIZATION: ""}, {AUTHORIZATION: "Bearer"}, {AUTHORIZATION: "Bearer "}],
    ids=str,
)
async def test_a_call_without_a_token_needs_a_session(header: dict[str, str]) -> None:
    door = Door()
    with pytest.raises(RpcError) as refused:
        await door.authenticator.caller_of(Call(GET_ACCOUNT, b"", 1.0, header), door.origin)
    assert (refused.value.code, refused.value.reason) == (
        StatusCode.UNAUTHENTICATED,
        "SESSION_REQUIRED",
    )
    assert "Log in" in refused.value.advice


@pytest.mark.parametrize(
    ("scheme", "token"),
    [
        ("Basic", ELSEWHERE),
        ("Bearer", "rubbish"),
        ("Bearer", ELSEWHERE + " "),
        ("Bearer", ALICE),
        ("Bearer", f"s-b-{'x' * 43}"),
        ("Bearer", f"s-b-{'x' * 43}.{'x' * 22}"),
        ("Bearer", ELSEWHERE.replace("s-b-", "s-c-")),
        ("Bearer", ELSEWHERE.replace("x", "y", 1)),
        ("Bearer", ELSEWHERE[:-1]),
        ("Bearer", TokenSeal([b"the key of another mesh"]).token("b", "x" * 43)),
        ("Bearer", ids.application_id("b", 1, "0" * 32)),
        ("Bearer", "alice@example.com"),
    ],
)
async def test_what_is_no_token_is_shown_to_nobody(scheme: str, token: str) -> None:
    door = Door()
    with pytest.raises(RpcError) as refused:
        await door.enter(token, scheme)
    assert (refused.value.code, refused.value.reason) == (
        StatusCode.UNAUTHENTICATED,
        "SESSION_INVALID",
    )
    assert door.origin.calls == []


async def test_the_scheme_is_written_as_people_write_it() -> None:
    assert await Door().enter(ELSEWHERE, "bearer") == ALICE
