"""A full disk keeps nobody out: sessions wait in memory, count like stored ones, and stay ended."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import replace
from errno import ENOSPC
from io import StringIO
from typing import TextIO, cast

import pytest
from grpc import StatusCode
from structlog import WriteLogger
from structlog.testing import capture_logs

import session_svc.sessions
from duohuo.internal.v1.log_pb2 import LogRecord, SessionsRevoked
from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_VERIFIED,
    ListOwnSessionsRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.session_service_pb2 import (
    GetSessionRequest,
    LoginRequest,
    LogoutRequest,
    RevokeSessionsRequest,
)
from ops.simulation.clocks import SimulatedClock
from ops.simulation.loop import SimulatedLoop
from runtime.dispatcher import Incoming
from runtime.errors import RpcError
from runtime.hlc import HybridClock
from runtime.logging import Unfailing
from runtime.mesh import Mesh
from runtime.store import SqliteStore, StoreFault, query
from session_svc import store as units
from session_svc.guard import Allowances, Guard
from session_svc.service import SessionService
from session_svc.sessions import RETRY_INTERVAL_S, STORED_AT_ONCE_MAX, Lifetimes, Sessions
from session_svc.store import NewSession, SessionRow, token_hash
from sync_bus.log import Stamps
from tests.fakes import (
    NOON_MS,
    SEAL,
    FakeClock,
    FakeDisk,
    RecordingEndpoint,
    SeededIds,
    account,
    says,
    site,
    stamp,
    temporary_store,
)
from tests.unit.test_applications import accept, made
from transfer_svc import app as transfer_app
from transfer_svc.dispatch import QueueWorker

ALICE, BOB = account(1), account(2)
LIFETIME_MS = 1000
Task = asyncio.Future[object]


class Place:
    """The sessions of center a, on a disk that may be full."""

    def __init__(self, store: SqliteStore, disk: FakeDisk) -> None:
        self.store = store
        self.disk = disk
        self.clock = FakeClock()
        self.sessions = self.started()
        self._ids = SeededIds()

    def started(self) -> Sessions:
        """What a process that has just started knows of them."""
        stamps = Stamps(self.clock, HybridClock(self.clock))
        return Sessions("a", self.store, stamps, Lifetimes())

    async def login(self, user: str = ALICE, at_ms: int = 0) -> bytes:
        """What is stored of a new session's token."""
        made_at = stamp(at_ms)
        expire_ms = made_at.time_ms + LIFETIME_MS
        row = SessionRow(self._ids.unique(), user, "phone", made_at.time_ms, expire_ms, NOON_MS)
        hashed = token_hash(SEAL.token("a", self._ids.secret()))
        await self.sessions.add(NewSession(hashed, row, made_at))
        return hashed

    async def login_in_memory(self, user: str = ALICE, at_ms: int = 0) -> bytes:
        """A session that is made while the disk is full."""
        was_full, self.disk.full = self.disk.full, True
        hashed = await self.login(user, at_ms)
        self.disk.full = was_full
        assert hashed not in await self.stored()
        return hashed

    async def is_good(self, hashed: bytes) -> bool:
        """For every question that can be asked of a session."""
        found = await self.sessions.find(hashed)
        listed = [row for user in (ALICE, BOB) for row in await self.sessions.of_account(user)]
        assert found is None or found in listed
        assert len(listed) == len(set(listed))
        return found is not None

    async def stored(self) -> set[bytes]:
        return {row[0] for row in await self.store.read(query("SELECT token_hash FROM session"))}

    async def revoked_by(self, center: str, at_ms: int, user: str = ALICE) -> None:
        """Another center's revocation arrives."""
        record = LogRecord(hlc=stamp(at_ms).hlc, sessions_revoked=SessionsRevoked(account_id=user))
        await self.store.write("apply", units.apply(center, record, stamp(99)))


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    disk = FakeDisk()
    async with temporary_store(units.SCHEMA, units.TOPICS, ["b"], disk) as store:
        yield Place(store, disk)


async def reaches_the_disk(disk: FakeDisk, work: Coroutine[None, None, object]) -> Task:
    """Starts work whose batch then waits, because the disk takes its time."""
    disk.answers.clear()
    disk.came.clear()
    task = asyncio.ensure_future(work)
    await disk.came.wait()
    return task


async def begins(work: Coroutine[None, None, object]) -> Task:
    """Lets work go on until it has to wait."""
    task = asyncio.ensure_future(work)
    for _ in range(10):
        await asyncio.sleep(0)
    return task


async def test_a_login_on_a_full_disk_counts_and_is_stored_once_there_is_room(
    place: Place,
) -> None:
    before = await place.login()
    place.disk.full = True
    users = [ALICE, BOB] * (STORED_AT_ONCE_MAX // 2 + 1)
    waiting = [await place.login(user) for user in users]
    await place.sessions.store_waiting()
    assert await place.stored() == {before}
    assert all([await place.is_good(one) for one in (before, *waiting)])
    counted = await place.sessions.counts()

    place.disk.full = False
    await place.sessions.store_waiting()
    assert await place.stored() == {before, *waiting}
    assert all([await place.is_good(one) for one in (before, *waiting)])
    assert await place.sessions.counts() == counted == {"sessions": len(waiting) + 1}


async def test_so_many_wait_and_no_more(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_svc.sessions, "UNSTORED_MAX", 2)
    place.disk.full = True
    first = await place.login()
    await place.login()
    with pytest.raises(StoreFault) as fault:
        await place.login()
    assert (fault.value.code, fault.value.reason) == (StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert not fault.value.ran
    await place.sessions.remove(first)
    await place.login()


async def test_only_a_full_disk_makes_a_session_wait(place: Place) -> None:
    await place.store.write("break", query("DROP TABLE session"))
    with pytest.raises(StoreFault) as fault:
        await place.login()
    assert fault.value.reason == "STORE_UNAVAILABLE"


async def test_a_session_in_memory_expires(place: Place) -> None:
    session = await place.login_in_memory()
    place.clock.advance(LIFETIME_MS - 1)
    assert await place.is_good(session)
    place.clock.advance(1)
    assert not await place.is_good(session)


async def test_a_session_in_memory_is_ended_at_once_and_never_stored(place: Place) -> None:
    place.disk.full = True
    ended, other = await place.login(), await place.login()
    await place.sessions.remove(ended)
    assert not await place.is_good(ended)
    place.disk.full = False
    await place.sessions.store_waiting()
    assert await place.stored() == {other}


async def test_what_a_full_disk_does_not_take_is_refused_and_nothing_has_changed(
    place: Place,
) -> None:
    stored = await place.login()
    place.disk.full = True
    unstored = await place.login(at_ms=1)
    with pytest.raises(StoreFault):
        await place.sessions.remove(stored)
    with pytest.raises(StoreFault):
        await place.sessions.revoke_all(ALICE, stamp(5))
    assert await place.is_good(stored)
    assert await place.is_good(unstored)


async def test_revoking_ends_sessions_in_memory_too(place: Place) -> None:
    await place.login()
    old, other = await place.login_in_memory(), await place.login_in_memory(BOB)
    new = await place.login_in_memory(at_ms=6)
    assert await place.sessions.revoke_all(ALICE, stamp(5)) == 2
    assert [await place.is_good(one) for one in (old, other, new)] == [False, True, True]
    await place.sessions.store_waiting()
    assert await place.stored() == {other, new}


@pytest.mark.parametrize("at_ms", [4, 6])
async def test_another_centers_revocation_ends_sessions_in_memory_too(
    place: Place, at_ms: int
) -> None:
    session = await place.login_in_memory(at_ms=5)
    await place.revoked_by("b", at_ms)
    good = at_ms < 5
    assert await place.is_good(session) is good
    await place.sessions.store_waiting()
    assert await place.is_good(session) is good
    assert (session in await place.stored()) is good


async def test_a_login_that_a_revocation_overtakes_is_over(place: Place) -> None:
    """The disk is full for the login and has room for the revocation right behind it."""
    place.disk.full_in_turn = [True, False]
    logging_in = await reaches_the_disk(place.disk, place.login(at_ms=4))
    revoking = await begins(place.sessions.revoke_all(ALICE, stamp(5)))
    place.disk.answers.set()
    session = await logging_in
    await revoking
    assert isinstance(session, bytes)
    assert not await place.is_good(session)
    await place.sessions.store_waiting()
    assert await place.stored() == set()


@pytest.mark.parametrize("still_full", [False, True])
async def test_a_session_ended_while_it_is_being_stored_stays_ended(
    place: Place, *, still_full: bool
) -> None:
    session = await place.login_in_memory()
    place.disk.full = still_full
    storing = await reaches_the_disk(place.disk, place.sessions.store_waiting())
    assert await place.is_good(session)
    ending = await begins(place.sessions.remove(session))
    place.disk.answers.set()
    await asyncio.gather(storing, ending)
    assert not await place.is_good(session)
    place.disk.full = False
    await place.sessions.store_waiting()
    assert await place.stored() == set()


async def test_a_logout_that_finds_its_session_just_stored_on_a_disk_full_again_is_refused(
    place: Place,
) -> None:
    session = await place.login_in_memory()
    place.disk.full_in_turn = [False, True]
    storing = await reaches_the_disk(place.disk, place.sessions.store_waiting())
    ending = await begins(place.sessions.remove(session))
    place.disk.answers.set()
    await storing
    with pytest.raises(StoreFault):
        await ending
    assert await place.is_good(session)


@pytest.mark.parametrize("revoked_first", [False, True])
@pytest.mark.parametrize("by", ["a", "b"])
async def test_a_session_revoked_while_it_is_being_stored_stays_revoked(
    place: Place, by: str, *, revoked_first: bool
) -> None:
    """Both commits wait for the disk; either may be the first."""
    session = await place.login_in_memory()
    revoke = place.sessions.revoke_all(ALICE, stamp(5)) if by == "a" else place.revoked_by("b", 5)
    works: list[Coroutine[None, None, object]] = [place.sessions.store_waiting(), revoke]
    if revoked_first:
        works.reverse()
    first = await reaches_the_disk(place.disk, works[0])
    second = await begins(works[1])
    place.disk.answers.set()
    await asyncio.gather(first, second)
    assert not await place.is_good(session)
    await place.sessions.store_waiting()
    assert await place.stored() == set()


async def test_a_session_is_good_at_every_moment_of_being_stored(place: Place) -> None:
    session = await place.login_in_memory()
    storing = asyncio.ensure_future(place.sessions.store_waiting())
    seen = set()
    while not storing.done():
        assert await place.is_good(session)
        seen.add(session in await place.stored())
        await asyncio.sleep(0)
    assert seen == {False, True}


async def test_a_center_that_stops_on_a_full_disk_forgets_what_waits(place: Place) -> None:
    session = await place.login_in_memory()
    place.sessions = place.started()
    assert not await place.is_good(session)
    assert await place.is_good(await place.login())


async def test_users_log_in_look_and_log_out_while_the_disk_is_full(place: Place) -> None:
    proved = VerifyPasswordResponse(outcome=PASSWORD_OUTCOME_VERIFIED, account_id=ALICE)
    here = site("a", "a")
    here = replace(here, mesh=Mesh("a", {"a": RecordingEndpoint(says(proved))}, here.clock))
    guard, incoming = Guard(here, SEAL, Allowances()), Incoming(ALICE, 1.0)
    service = SessionService(here, place.sessions, SEAL, guard)
    place.disk.full = True
    made = await service.Login(
        LoginRequest(identifier="alice@example.com", password="secret", device="phone"), incoming
    )
    asked = GetSessionRequest(token=made.token)
    found = await service.GetSession(asked, incoming)
    assert (found.account_id, found.session_id) == (ALICE, made.session_id)
    listed = await service.ListOwnSessions(ListOwnSessionsRequest(account_id=ALICE), incoming)
    assert [one.session_id for one in listed.sessions] == [made.session_id]
    await service.Logout(LogoutRequest(token=made.token), incoming)
    with pytest.raises(RpcError) as refused:
        await service.GetSession(asked, incoming)
    assert refused.value.reason == "SESSION_INVALID"
    with pytest.raises(RpcError) as refused:
        await service.RevokeSessions(RevokeSessionsRequest(account_id=ALICE), incoming)
    assert refused.value.code is StatusCode.RESOURCE_EXHAUSTED
    assert (refused.value.reason, refused.value.ran) == ("DISK_FULL", False)


def test_sessions_are_stored_by_themselves_without_asking_all_the_time() -> None:
    async def scenario() -> None:
        disk = FakeDisk()
        async with temporary_store(units.SCHEMA, units.TOPICS, ["b"], disk) as store:
            place = Place(store, disk)
            running = asyncio.ensure_future(place.sessions.run())
            for _ in range(2):
                before = disk.batches
                await asyncio.sleep(100)
                assert disk.batches == before, "there was nothing to store"
                session = await place.login_in_memory()
                disk.full = True
                await asyncio.sleep(10 * RETRY_INTERVAL_S)
                assert disk.batches - before <= 1 + 10
                disk.full = False
                await asyncio.sleep(RETRY_INTERVAL_S + 0.1)
                assert session in await place.stored()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    with capture_logs() as logged:
        SimulatedLoop("full disk").run(scenario())
    assert [line["event"] for line in logged] == [
        "disk full, sessions are kept in memory",
        "no session waits for room any more",
    ] * 2


def test_the_queues_worker_takes_its_time_on_a_full_disk() -> None:
    """Home is away, and not even that can be noted."""

    async def scenario() -> None:
        disk = FakeDisk()
        async with temporary_store(transfer_app.SCHEMA, transfer_app.TOPICS, ["b"], disk) as store:
            here = site("a", "a", "b")
            here = replace(here, stamps=Stamps(SimulatedClock(loop), here.stamps.hybrid))
            await accept(store, made())
            disk.full = True
            before = disk.batches
            running = asyncio.ensure_future(QueueWorker(here, store).run())
            await asyncio.sleep(10)
            assert 2 <= disk.batches - before <= 25
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    loop = SimulatedLoop("full disk")
    loop.run(scenario())


class FullFile(StringIO):
    """A file on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(ENOSPC, "no space left on device")

    def flush(self) -> None:
        raise OSError(ENOSPC, "no space left on device")


def test_a_log_on_a_full_disk_loses_lines_and_stops_nobody() -> None:
    for file in (FullFile(), StringIO()):
        logger = WriteLogger(cast(TextIO, Unfailing(file)))
        logger.info("a line")
    assert file.getvalue() == "a line\n"
