"""Faults that a review found in code its authors believed correct; each stays mended."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import DecideResponse
from duohuo.v1.money_pb2 import Money
from duohuo.v1.routing_pb2 import ACCESS_PUBLIC
from duohuo.v1.session_service_pb2 import GetSessionRequest, Session
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_QUEUED,
    APPLICATION_STATE_SUCCEEDED,
    TRANSFER_STATE_FAILED,
    ApplyTransferRequest,
    GetApplicationRequest,
    TransferResult,
    WatchApplicationsRequest,
)
from gateway.ring import compute
from runtime import ids
from runtime.clock import timestamp
from runtime.config import UnknownSettingError, load
from runtime.dispatcher import Incoming
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, session_invalid
from runtime.hlc import AHEAD_MS_MAX, CLIENT_AHEAD_MS_MAX, COUNTER_BITS, HybridClock
from runtime.identifiers import InvalidIdentifier, normalise
from runtime.mesh import Mesh
from runtime.placement import SLOTS
from runtime.store import SqliteStore
from sync_bus.log import Road, Topic
from tests.fakes import (
    NOON_MS,
    SEAL,
    FakeClock,
    account,
    fails,
    mesh,
    says,
    site,
    stamp,
    temporary_store,
)
from tests.unit.bank import bank
from tests.unit.test_applications import accept, decide, found, made
from tests.unit.test_authenticator import ELSEWHERE, Door
from tests.unit.test_config import GOOD
from tests.unit.test_router import (
    GET_APPLICATION,
    GET_SESSION,
    HOME_FIRST,
    SECOND_READ,
    World,
    about,
    not_copied,
    not_sent,
    too_late,
)
from transfer_svc import app, applications
from transfer_svc.dispatch import QueueWorker
from transfer_svc.payees import Payees
from transfer_svc.service import TransferService
from transfer_svc.states import Decision

ALICE, BOB = account(0), account(1)
INCOMING = Incoming("", 1.0)
TOPIC = Topic("topic", Road.FEED)


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(app.SCHEMA, (*app.TOPICS, TOPIC), ["b"]) as opened:
        yield opened


async def test_an_application_of_another_body_is_not_moved_by_a_transfer_of_the_same_id() -> None:
    async with bank("a", "b") as two:
        await two.deposit(ALICE, 100, "deposit-1")
        await two.pay(ALICE, BOB, 10, "transfer-1", body=b"first")
        other = made(payer=ALICE, origin="b")
        at_b = two.centers["b"].store
        await at_b.write("accept", applications.accept(other, b"other", "a", stamp(0)))
        await two.settle()
        assert (await found(at_b, other)).message.state == APPLICATION_STATE_QUEUED


class DecidesTwice:
    """A home whose log has already ended the application when its answer, a conflict, arrives."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.asked = asyncio.Event()

    async def unary(self, _call: Call) -> Reply:
        await decide(self.store, made(), Decision.SUCCEEDED)
        self.asked.set()
        result = TransferResult(state=TRANSFER_STATE_FAILED, reason="IDEMPOTENCY_CONFLICT")
        return Reply(DecideResponse(result=result).SerializeToString(), {})

    async def stream(self, _call: Call) -> AsyncIterator[bytes]:
        yield b""


async def test_a_contradicting_decision_does_not_end_the_queues_worker(store: SqliteStore) -> None:
    application = made()
    application.expire_time.CopyFrom(timestamp(NOON_MS + 10**6))
    await accept(store, application)
    home = DecidesTwice(store)
    here = site("a", "a", "b")
    here = replace(here, mesh=Mesh("a", {"a": home, "b": home}, here.clock))
    run = asyncio.ensure_future(QueueWorker(here, store).run())
    await home.asked.wait()
    await asyncio.wait([run], timeout=0.2)
    assert not run.done()
    run.cancel()


async def test_a_decision_while_the_watcher_is_busy_is_not_missed(store: SqliteStore) -> None:
    here = site("a", "a", "b")
    service = TransferService(
        here,
        store,
        Payees(here, store),
        lambda _source: 0,
        lambda _payer: None,
        app.slots_of(here, store),
    )
    await accept(store, made())
    request = WatchApplicationsRequest(payer_account_id=made().payer_account_id)
    watch = service.WatchApplications(request, INCOMING)
    await anext(watch)
    await decide(store, made(), Decision.SUCCEEDED)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.wait([waiting], timeout=0.2)
    assert waiting.done()
    assert (await waiting).state == APPLICATION_STATE_SUCCEEDED


def test_what_a_center_absorbs_from_a_client_the_other_centers_believe() -> None:
    """b's clock is 50 ms behind: within any NTP's bounds."""
    at_a = HybridClock(FakeClock())
    at_b = HybridClock(FakeClock(NOON_MS - 50))
    tokens_limit = (NOON_MS + CLIENT_AHEAD_MS_MAX) << COUNTER_BITS  # any user's `duohuo-causal`
    at_a.observe_client((NOON_MS + AHEAD_MS_MAX) << COUNTER_BITS)
    assert at_a.latest == tokens_limit
    at_b.observe(at_a.tick())


async def test_a_failed_second_read_names_the_center_that_did_not_answer() -> None:
    refused = await World(a=not_copied, b=not_sent).refusal(about(SECOND_READ))
    assert refused.details == {"center": "b"}
    assert "center b" in refused.message


@pytest.mark.parametrize(
    ("one", "other"),
    [("x@faß.de", "x@fass.de"), ("x@βόλος.com", "x@βόλοσ.com")],
)
def test_two_domains_are_two_identifiers(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize("number", ["+310000000", "+4900171 1234567"])
def test_a_normal_form_is_its_own_normal_form(number: str) -> None:
    try:
        normal = normalise(number)
    except InvalidIdentifier:
        return
    assert normalise(normal) == normal


@pytest.mark.parametrize("text", ["rubbish +86 139 1234 5678 $$$", "+8613912345678\x00"])
def test_a_number_amid_rubbish_is_no_identifier(text: str) -> None:
    with pytest.raises(InvalidIdentifier):
        normalise(text)


@pytest.mark.parametrize("names", [("a", "c"), ("b", "west"), ("shanghai", "beijing")])
def test_a_second_center_moves_half_the_slots_and_two_percent(names: tuple[str, str]) -> None:
    before, after = compute({names[0]: 1}, 1), compute(dict.fromkeys(names, 1), 1)
    moved = sum(before.home(slot) != after.home(slot) for slot in range(SLOTS))
    assert moved / SLOTS <= 1 / 2 + 0.02


@pytest.mark.parametrize("timeout_s", [1.0, 2.0])
async def test_a_hung_home_leaves_time_for_the_next_center(timeout_s: float) -> None:
    world = World()

    def hung(call: Call) -> Reply:
        world.clock.advance(int(call.timeout_s * 1000))
        raise RpcError(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "late", ran=True)

    world.centers["b"].answer = hung
    await world.router.unary(about(HOME_FIRST, timeout_s=timeout_s))
    assert world.centers["c"].calls[0].timeout_s > 0.1


async def test_a_session_is_believed_for_two_seconds_after_its_origin_was_asked() -> None:
    door = Door()

    def slow(call: Call) -> Reply:
        door.clock.advance(1500)
        return says(Session(account_id=ALICE))(call)

    door.origin.answer = slow
    await door.enter(ELSEWHERE)
    door.origin.answer = fails(session_invalid())
    door.clock.advance(1000)
    with pytest.raises(RpcError, match="SESSION_INVALID"):
        await door.enter(ELSEWHERE)


async def test_a_session_whose_origin_hangs_asks_for_a_new_login() -> None:
    request = GetSessionRequest(token=SEAL.token("b", "x" * 43)).SerializeToString()
    refused = await World(b=too_late).refusal(Call(GET_SESSION, request, 5.0))
    assert refused.reason == "RELOGIN_REQUIRED"


async def test_a_copy_that_lacks_an_application_does_not_deny_it_while_its_origin_is_away() -> None:
    unheard = fails(RpcError(StatusCode.NOT_FOUND, "APPLICATION_NOT_FOUND", "no such application"))
    world = World(c=not_sent, b=unheard)  # and a has a copy
    wanted = ids.application_id("c", 1, "0" * 32)
    request = GetApplicationRequest(application_id=wanted).SerializeToString()
    await world.router.unary(Call(replace(GET_APPLICATION, access=ACCESS_PUBLIC), request, 5.0))


async def test_a_deposit_id_counts_once_whatever_the_currency() -> None:
    async with bank("a", "b") as two:
        await two.deposit(ALICE, 100, "deposit-1", "CNY")
        again = await two.deposit(account(2), 100, "deposit-1", "USD")
        assert again.currency == "CNY"


async def test_applying_again_returns_the_first_answer_even_after_it_expired(
    store: SqliteStore,
) -> None:
    clock = FakeClock()
    here = site("a", "a", "b", clock=clock)
    service = TransferService(
        here,
        store,
        Payees(here, store),
        lambda _source: 0,
        lambda _payer: None,
        app.slots_of(here, store),
    )
    request = ApplyTransferRequest(
        transfer_id="transfer-1",
        payer_account_id=account(1),
        payee_account_id=account(2),
        amount=Money(currency_code="CNY", minor_units=5),
        expire_time=timestamp(NOON_MS + 1000),
    )
    first = await service.ApplyTransfer(request, INCOMING)
    clock.advance(2000)
    assert await service.ApplyTransfer(request, INCOMING) == first


def test_an_unknown_name_in_the_environment_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DUOHUO_LOG_LEVLE", "debug")
    with pytest.raises(UnknownSettingError, match="LOG_LEVLE"):
        load(None, **GOOD)


async def test_silent_streams_count_as_failures_too() -> None:
    seen = mesh("a", "a", "b")
    for _ in range(2):
        with pytest.raises(RpcError):
            await anext(seen.stream("b", about(HOME_FIRST)))
    assert not seen.reachable("b")
