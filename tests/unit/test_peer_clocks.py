"""Clocks that disagree are noticed, told once, and the one that is wrong is not written by."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from structlog.testing import capture_logs

from account_svc import app
from account_svc import store as accounts
from account_svc.revoker import Revoker
from account_svc.service import AccountService
from duohuo.v1.account_service_pb2 import (
    ChangePasswordRequest,
    Profile,
    RegisterRequest,
    UpdateProfileRequest,
)
from duohuo.v1.session_service_pb2 import RevokeSessionsRequest
from ops.simulation.world import SimulatedPasswords
from runtime.dispatcher import Incoming
from runtime.errors import RpcError
from runtime.peer_clocks import ALARM_MS, PeerClocks
from runtime.placement import slot_of
from runtime.store import query
from session_svc import store as sessions
from session_svc.guard import Allowances, Guard
from session_svc.service import SessionService
from session_svc.sessions import Lifetimes, Sessions
from sync_bus.followers import Followers
from tests.fakes import NOON_MS, SEAL, FakeClock, account, resolves, site, temporary_store

HOUR_MS = 3_600_000
INCOMING = Incoming("", 5.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def clocks(clock: FakeClock) -> PeerClocks:
    return PeerClocks("a", clock)


def hear(clocks: PeerClocks, clock: FakeClock, **ahead_ms: int) -> None:
    """Each peer tells its clock, at once."""
    for peer, ahead in ahead_ms.items():
        clocks.heard(peer, clock.wall_ms() + ahead, clock.monotonic_ms())


def test_an_answer_is_compared_with_the_middle_of_its_round_trip(
    clocks: PeerClocks, clock: FakeClock
) -> None:
    asked_ms = clock.monotonic_ms()
    clock.advance(400)
    clocks.heard("b", NOON_MS + 200 + 600_000, asked_ms)
    assert clocks.drifts_ms() == {"b": 600_000}


def test_a_jump_of_the_local_clock_shows_before_the_next_answer(
    clocks: PeerClocks, clock: FakeClock
) -> None:
    hear(clocks, clock, b=0, c=-30)
    clock.advance(5000)
    assert clocks.drifts_ms() == {"b": 0, "c": -30}
    clock.jump(-600_000)
    assert clocks.drifts_ms() == {"b": 600_000, "c": 599_970}


def test_the_alarm_is_told_once_until_it_heals(clocks: PeerClocks, clock: FakeClock) -> None:
    with capture_logs() as logged:
        for ahead_ms in (ALARM_MS, ALARM_MS + 1, 600_000, -600_000, 700, 499, 0, -ALARM_MS - 1):
            hear(clocks, clock, b=ahead_ms)
    assert [(line["event"], line["peer"], line["drift_ms"]) for line in logged] == [
        ("clocks disagree", "b", ALARM_MS + 1),
        ("clocks agree again", "b", 499),
        ("clocks disagree", "b", -ALARM_MS - 1),
    ]


@pytest.mark.parametrize(
    ("drifts", "wrong"),
    [
        ({}, False),
        ({"b": HOUR_MS}, False),
        ({"b": HOUR_MS + 1}, True),
        ({"b": -2 * HOUR_MS}, True),
        ({"b": 0, "c": 3 * HOUR_MS}, False),
        ({"b": 2 * HOUR_MS, "c": 3 * HOUR_MS}, True),
        ({"b": 2 * HOUR_MS, "c": -2 * HOUR_MS}, False),
        ({"b": 2 * HOUR_MS, "c": 2 * HOUR_MS, "d": 0}, True),
        ({"b": 2 * HOUR_MS, "c": 0, "d": 0}, False),
    ],
)
def test_the_local_clock_is_wrong_if_most_are_far_on_the_same_side(
    clocks: PeerClocks, clock: FakeClock, drifts: dict[str, int], *, wrong: bool
) -> None:
    hear(clocks, clock, **drifts)
    assert clocks.local_is_wrong() is wrong


async def test_a_center_with_a_wrong_clock_refuses_profiles_and_passwords_until_it_is_right(
    clock: FakeClock,
) -> None:
    here = site("a", "a", "b", "c", clock=clock)
    async with temporary_store(accounts.SCHEMA, accounts.TOPICS, ["b", "c"]) as store:
        service = AccountService(
            here,
            store,
            SimulatedPasswords(here.random),
            lambda _source: 0,
            resolves(),
            Revoker(here, store),
            Followers(["b", "c"], store),
            app.slots_of(here, store),
            email_offered=True,
        )
        registering = RegisterRequest(
            identifier=next(
                f"user-{n}@example.com"
                for n in range(100)
                if here.placement.home(slot_of(f"user-{n}@example.com")) == "a"
            ),
            password="the-old-password",
            request_id="request-1",
        )
        user = (await service.Register(registering, INCOMING)).account_id
        edit = UpdateProfileRequest(
            account_id=user,
            profile=Profile(display_name="Alicia"),
            update_mask=FieldMask(paths=["display_name"]),
            request_id="request-2",
        )
        change = ChangePasswordRequest(
            account_id=user,
            old_password="the-old-password",
            new_password="the-new-password",
            request_id="request-3",
        )
        hear(here.mesh.clocks, clock, b=0, c=0)
        clock.jump(2 * HOUR_MS)
        for attempt in (
            service.UpdateProfile(edit, INCOMING),
            service.ChangePassword(change, INCOMING),
        ):
            with pytest.raises(RpcError) as refused:
                await attempt
            error = refused.value
            assert (error.code, error.reason) == (StatusCode.UNAVAILABLE, "CLOCK_WRONG")
            assert not error.ran
            assert error.advice
        assert await store.read(accounts.profile_fields(user)) == [("display_name", "")]
        clock.jump(-2 * HOUR_MS)
        assert (await service.UpdateProfile(edit, INCOMING)).profile.display_name == "Alicia"
        await service.ChangePassword(change, INCOMING)


async def test_a_center_with_a_wrong_clock_refuses_revocations_until_it_is_right(
    clock: FakeClock,
) -> None:
    """Stamped two hours too early, one would be acknowledged and end nothing at the other centers."""
    here = site("a", "a", "b", "c", clock=clock)
    async with temporary_store(sessions.SCHEMA, sessions.TOPICS, ["b", "c"]) as store:
        service = SessionService(
            here,
            Sessions("a", store, here.stamps, Lifetimes()),
            SEAL,
            Guard(here, SEAL, Allowances()),
        )
        revoke = RevokeSessionsRequest(account_id=account(1))
        hear(here.mesh.clocks, clock, b=0, c=0)
        clock.jump(-2 * HOUR_MS)
        with pytest.raises(RpcError) as refused:
            await service.RevokeSessions(revoke, INCOMING)
        error = refused.value
        assert (error.code, error.reason) == (StatusCode.UNAVAILABLE, "CLOCK_WRONG")
        assert not error.ran
        assert await store.read(query("SELECT * FROM revocation")) == []
        clock.jump(2 * HOUR_MS)
        await service.RevokeSessions(revoke, INCOMING)
        assert len(await store.read(query("SELECT * FROM revocation"))) == 1
