"""Whom a password lets in: the local copy says, or home, or both."""

from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count

import pytest
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_MISMATCH,
    PASSWORD_OUTCOME_UNKNOWN,
    PASSWORD_OUTCOME_VERIFIED,
    PasswordOutcome,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.session_service_pb2 import LoginRequest
from runtime.dispatcher import Incoming
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.placement import slot_of
from runtime.store import SqliteStore
from session_svc import store as units
from session_svc.guard import Allowances, Guard
from session_svc.service import SessionService
from session_svc.sessions import Lifetimes, Sessions
from tests.fakes import (
    NOON_MS,
    SEAL,
    FakeClock,
    RecordingEndpoint,
    account,
    fails,
    says,
    site,
    temporary_store,
)

CONFIRM_MS = 600_000
ALICE = next(one for n in count() if slot_of(one := f"alice{n}@example.com") % 2 == 0)
"""At home at a; logs in at b."""
V, M, U = PASSWORD_OUTCOME_VERIFIED, PASSWORD_OUTCOME_MISMATCH, PASSWORD_OUTCOME_UNKNOWN


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(units.SCHEMA, units.TOPICS, ["a"]) as opened:
        yield opened


def verified(
    outcome: PasswordOutcome.ValueType, age_ms: int, account_id: str = account(0)
) -> VerifyPasswordResponse:
    if outcome == U:
        return VerifyPasswordResponse(outcome=outcome)
    return VerifyPasswordResponse(
        outcome=outcome,
        account_id=account_id,
        set_time_ms=NOON_MS - age_ms if outcome == V else 0,
    )


async def login(
    store: SqliteStore,
    local: PasswordOutcome.ValueType,
    home: PasswordOutcome.ValueType | RpcError | None,
    age_ms: int,
    confirm_ms: int,
) -> tuple[str, int]:
    """What comes of it, and how often home was asked. Home is away if it says nothing."""
    clock = FakeClock()
    if isinstance(home, RpcError):
        answer = fails(home)
    else:
        away = fails(unreachable("a", ran=False))
        answer = away if home is None else says(verified(home, age_ms))
    at_home, here = RecordingEndpoint(answer), RecordingEndpoint(says(verified(local, age_ms)))
    place = replace(
        site("b", "a", "b", clock=clock), mesh=Mesh("b", {"a": at_home, "b": here}, clock)
    )
    lifetimes = Lifetimes(password_confirm_ms=confirm_ms)
    service = SessionService(
        place,
        Sessions("b", store, place.stamps, lifetimes),
        SEAL,
        Guard(place, SEAL, Allowances()),
    )
    request = LoginRequest(identifier=ALICE, password="correct horse", device="phone")
    try:
        session = await service.Login(request, Incoming("", 5.0))
    except RpcError as error:
        return error.reason, len(at_home.calls)
    assert session.account_id == account(0)
    return "OK", len(at_home.calls)


@pytest.mark.parametrize(
    ("local", "home", "outcome"),
    [
        (V, None, ("OK", 0)),
        (M, V, ("OK", 1)),
        (U, V, ("OK", 1)),
        (M, M, ("BAD_CREDENTIALS", 1)),
        (U, U, ("BAD_CREDENTIALS", 1)),
        (M, None, ("HOME_CENTER_UNAVAILABLE", 1)),
        (U, None, ("HOME_CENTER_UNAVAILABLE", 1)),
    ],
)
async def test_the_copy_lets_in_and_only_home_keeps_out(
    store: SqliteStore,
    local: PasswordOutcome.ValueType,
    home: PasswordOutcome.ValueType | None,
    outcome: tuple[str, int],
) -> None:
    assert await login(store, local, home, age_ms=0, confirm_ms=0) == outcome


@pytest.mark.parametrize(
    ("home", "age_ms", "outcome"),
    [
        (V, CONFIRM_MS - 1, ("OK", 1)),
        (M, CONFIRM_MS - 1, ("HOME_CONFIRMATION_REQUIRED", 1)),
        (None, CONFIRM_MS - 1, ("HOME_CENTER_UNAVAILABLE", 1)),
        (None, CONFIRM_MS, ("OK", 0)),
    ],
)
async def test_home_must_confirm_a_password_that_was_set_lately_if_operators_want_that(
    store: SqliteStore,
    home: PasswordOutcome.ValueType | None,
    age_ms: int,
    outcome: tuple[str, int],
) -> None:
    assert await login(store, V, home, age_ms, CONFIRM_MS) == outcome


async def test_a_home_that_is_too_busy_says_so_itself(store: SqliteStore) -> None:
    busy = RpcError(
        StatusCode.RESOURCE_EXHAUSTED, "PASSWORD_CHECKS_BUSY", "too many", retry_after_ms=1000
    )
    assert await login(store, M, busy, age_ms=0, confirm_ms=0) == ("PASSWORD_CHECKS_BUSY", 1)


@pytest.mark.parametrize("local", [M, U])
async def test_an_unknown_user_and_a_wrong_password_are_answered_alike(
    store: SqliteStore, local: PasswordOutcome.ValueType
) -> None:
    assert await login(store, local, local, age_ms=0, confirm_ms=0) == ("BAD_CREDENTIALS", 1)


OLD = CONFIRM_MS
ELSEWHERE = account(1)
"""At home at c, with an identifier that is at home at a."""


@pytest.mark.parametrize(
    ("local", "at_a", "at_c", "outcome"),
    [
        # Nobody here knows whose it is: its own home does, and that may have to leave it to the account's.
        (verified(U, 0), verified(V, OLD, ELSEWHERE), None, ("OK", "a")),
        (verified(U, 0), verified(V, 0, ELSEWHERE), verified(V, 0, ELSEWHERE), ("OK", "ac")),
        (verified(U, 0), verified(M, 0, ELSEWHERE), verified(V, 0, ELSEWHERE), ("OK", "ac")),
        (
            verified(U, 0),
            verified(M, 0, ELSEWHERE),
            verified(M, 0, ELSEWHERE),
            ("BAD_CREDENTIALS", "ac"),
        ),
        (verified(U, 0), verified(M, 0, ELSEWHERE), None, ("HOME_CENTER_UNAVAILABLE", "ac")),
        # The account is known here: its home alone has the last word.
        (verified(V, OLD, ELSEWHERE), None, None, ("OK", "")),
        (verified(M, 0, ELSEWHERE), None, verified(V, 0, ELSEWHERE), ("OK", "c")),
        (verified(M, 0, ELSEWHERE), None, verified(M, 0, ELSEWHERE), ("BAD_CREDENTIALS", "c")),
        (
            verified(V, 0, ELSEWHERE),
            None,
            verified(M, 0, ELSEWHERE),
            ("HOME_CONFIRMATION_REQUIRED", "c"),
        ),
        # Its home has lost it, and asks for nobody else's word.
        (verified(M, 0, ELSEWHERE), verified(U, 0), verified(U, 0), ("BAD_CREDENTIALS", "ca")),
    ],
)
async def test_an_identifier_may_be_at_home_elsewhere_than_its_account(
    store: SqliteStore,
    local: VerifyPasswordResponse,
    at_a: VerifyPasswordResponse | None,
    at_c: VerifyPasswordResponse | None,
    outcome: tuple[str, str],
) -> None:
    clock = FakeClock()
    asked: list[str] = []
    answers = {"a": at_a, "b": local, "c": at_c}

    def endpoint(center: str, answer: VerifyPasswordResponse | None) -> RecordingEndpoint:
        def reply(call: Call) -> Reply:
            request = VerifyPasswordRequest.FromString(call.request)
            asked.append(center)
            if center == "c":
                assert request.account_id == ELSEWHERE
            say = says(answer) if answer else fails(unreachable(center, ran=False))
            return say(call)

        return RecordingEndpoint(reply)

    endpoints = {center: endpoint(center, answer) for center, answer in answers.items()}
    place = replace(site("b", "a", "c", "b", clock=clock), mesh=Mesh("b", endpoints, clock))
    assert place.placement.home(slot_of(IDENTIFIER_OF_A)) == "a"
    assert place.home_of(ELSEWHERE) == "c"
    service = SessionService(
        place,
        Sessions("b", store, place.stamps, Lifetimes(password_confirm_ms=CONFIRM_MS)),
        SEAL,
        Guard(place, SEAL, Allowances()),
    )
    request = LoginRequest(identifier=IDENTIFIER_OF_A, password="correct horse", device="phone")
    try:
        session = await service.Login(request, Incoming("", 5.0))
    except RpcError as error:
        found = error.reason
    else:
        found = "OK"
        assert session.account_id == ELSEWHERE
    assert (found, "".join(asked)) == (outcome[0], "b" + outcome[1])


IDENTIFIER_OF_A = next(one for n in count() if slot_of(one := f"alice{n}@example.com") % 3 == 0)
