"""Holds and controls as callers meet them: answers, refusals, repetition, and expiry by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    ChangeControlRequest,
    GetControlRequest,
    LimitsChange,
    LookupAccountResponse,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountControlChange,
)
from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_CAPTURED,
    HOLD_STATE_HELD,
    HOLD_STATE_RELEASED,
    TRANSFER_STATE_CREDITED,
    Balance,
    CaptureHoldRequest,
    GetBalanceRequest,
    ReleaseHoldRequest,
    ReserveFundsRequest,
    TransferRequest,
)
from ops.simulation.clocks import SimulatedClock
from ops.simulation.loop import SimulatedLoop
from runtime.clock import milliseconds, timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import ACCOUNT, OPERATOR, STALENESS_MS, Call
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.methods import method, peer_method
from sync_bus.log import Stamp, Stamps
from tests.fakes import (
    FakeDisk,
    RecordingEndpoint,
    account,
    fails,
    says,
    site,
    temporary_store,
)
from tests.unit.centers import TURNS_MAX, Centers, centers
from transfer_svc import app, holds, ledger, reservations, transfers
from transfer_svc.hold_service import RETRY_DELAY_S, WAIT_S_MAX, HoldExpiry, HoldService
from transfer_svc.payees import Payees
from transfer_svc.rules import HOLD_LIFETIME_MS_DEFAULT, HOLD_LIFETIME_MS_MAX, Order
from transfer_svc.transfers import TransferRow

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""


@pytest.fixture
async def two() -> AsyncIterator[Centers]:
    async with centers("a", "b") as opened:
        for user in (ALICE, ALAN, BOB):
            await opened.deposit(user, 100, f"deposit-of-{user}")
        await opened.settle()
        yield opened


def cny(minor_units: int) -> Money:
    return Money(currency_code="CNY", minor_units=minor_units)


async def call(two: Centers, name: str, request: Message, at: str = "a", who: str = ALICE) -> Any:
    """What a user's RPC answers at a center."""
    called = method(f"/duohuo.v1.TransferService/{name}")
    reply = await two.service(at).dispatcher.unary(
        Call(called, request.SerializeToString(), 5.0, {ACCOUNT: who})
    )
    return called.response_type.FromString(reply.payload)


async def refused(two: Centers, name: str, request: Message, at: str = "a") -> RpcError:
    with pytest.raises(RpcError) as error:
        await call(two, name, request, at)
    assert not error.value.ran
    return error.value


def reserve(**changes: Any) -> ReserveFundsRequest:
    usual = {"hold_id": "hold-0001", "payee_account_id": ALAN, "amount": cny(60)}
    return ReserveFundsRequest(payer_account_id=ALICE, **{**usual, **changes})


def capture(amount: int | None = None, transfer_id: str = "transfer-1") -> CaptureHoldRequest:
    return CaptureHoldRequest(
        payer_account_id=ALICE,
        hold_id="hold-0001",
        transfer_id=transfer_id,
        amount=None if amount is None else cny(amount),
    )


RELEASE = ReleaseHoldRequest(payer_account_id=ALICE, hold_id="hold-0001")


async def balance(two: Centers, at: str = "a") -> tuple[int, int]:
    """(booked, available)."""
    found = await call(two, "GetBalance", GetBalanceRequest(account_id=ALICE), at)
    return found.balance.minor_units, found.available.minor_units


async def test_a_hold_from_its_reservation_to_its_capture(two: Centers) -> None:
    first = await call(two, "ReserveFunds", reserve())
    assert await call(two, "ReserveFunds", reserve()) == first
    assert first.state == HOLD_STATE_HELD
    assert await balance(two) == (100, 40)
    await two.settle()
    assert await balance(two, "b") == (100, 40)
    done = await call(two, "CaptureHold", capture(25))
    assert await call(two, "CaptureHold", capture(25)) == done
    assert done.hold.state == HOLD_STATE_CAPTURED
    assert done.hold.captured == cny(25)
    assert done.hold.transfer_id == "transfer-1"
    assert done.transfer.state == TRANSFER_STATE_CREDITED
    assert await balance(two) == (75, 75)
    assert (await refused(two, "CaptureHold", capture(25, "transfer-2"))).reason == "HOLD_CAPTURED"
    assert (await refused(two, "ReleaseHold", RELEASE)).reason == "HOLD_CAPTURED"


async def test_a_capture_for_a_payee_of_another_home_waits_until_it_is_credited(
    two: Centers,
) -> None:
    request = reserve()
    request.payee_account_id = BOB
    await call(two, "ReserveFunds", request)
    capturing = asyncio.ensure_future(call(two, "CaptureHold", capture()))
    for _ in range(TURNS_MAX):
        await asyncio.sleep(0)
        if await two.centers["a"].transfer(ALICE, "transfer-1") is not None:
            break
    await two.settle()
    done = await capturing
    assert done.transfer.state == TRANSFER_STATE_CREDITED
    assert await two.centers["b"].balance(BOB) == 160


async def test_releasing_gives_everything_back_at_once_and_again(two: Centers) -> None:
    await call(two, "ReserveFunds", reserve())
    for _ in range(2):
        released = await call(two, "ReleaseHold", RELEASE)
        assert released.state == HOLD_STATE_RELEASED
    assert await balance(two) == (100, 100)
    assert (await refused(two, "CaptureHold", capture())).reason == "HOLD_RELEASED"


async def test_an_expired_hold_is_over_for_everybody(two: Centers) -> None:
    expire_time = timestamp(two.clock.wall_ms() + 1000)
    await call(two, "ReserveFunds", reserve(expire_time=expire_time))
    two.clock.advance(1000)
    assert await balance(two) == (100, 100)
    assert (await refused(two, "CaptureHold", capture())).reason == "HOLD_EXPIRED"
    assert (await refused(two, "ReleaseHold", RELEASE)).reason == "HOLD_EXPIRED"
    again = await call(two, "ReserveFunds", reserve(expire_time=expire_time))
    assert milliseconds(again.expire_time) == two.clock.wall_ms()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"amount": cny(40)}, "IDEMPOTENCY_CONFLICT"),
        ({"memo": "another"}, "IDEMPOTENCY_CONFLICT"),
        ({"payee_account_id": BOB}, "IDEMPOTENCY_CONFLICT"),
        ({"expire_time": timestamp(1)}, "IDEMPOTENCY_CONFLICT"),
        ({"hold_id": "hold-0002"}, "INSUFFICIENT_FUNDS"),
        (
            {"hold_id": "hold-0003", "amount": Money(currency_code="EUR", minor_units=1)},
            "CURRENCY_MISMATCH",
        ),
        ({"hold_id": "short"}, "KEY"),
        ({"payee_account_id": ALICE}, "SELF_TRANSFER"),
        ({"memo": "x" * 141}, "INVALID_FIELD"),
    ],
)
async def test_what_is_not_the_same_or_not_possible_holds_nothing(
    two: Centers, changes: dict[str, Any], reason: str
) -> None:
    await call(two, "ReserveFunds", reserve())
    assert (await refused(two, "ReserveFunds", reserve(**changes))).reason == reason
    assert await balance(two) == (100, 40)


@pytest.mark.parametrize(
    ("after_ms", "good"),
    [
        (-1, False),
        (0, False),
        (1, True),
        (HOLD_LIFETIME_MS_MAX, True),
        (HOLD_LIFETIME_MS_MAX + 1, False),
        (None, True),
    ],
)
async def test_a_hold_lasts_at_most_a_month_and_a_week_if_nothing_is_said(
    two: Centers, after_ms: int | None, good: bool
) -> None:
    now_ms = two.clock.wall_ms()
    request = reserve()
    if after_ms is not None:
        request.expire_time.CopyFrom(timestamp(now_ms + after_ms))
    if not good:
        error = await refused(two, "ReserveFunds", request)
        assert (error.code, error.field_name) == (StatusCode.INVALID_ARGUMENT, "expire_time")
        return
    held = await call(two, "ReserveFunds", request)
    lasts_ms = HOLD_LIFETIME_MS_DEFAULT if after_ms is None else after_ms
    assert milliseconds(held.expire_time) == now_ms + lasts_ms


@pytest.mark.parametrize(
    ("request_made", "reason"),
    [
        (capture(61), "CAPTURE_TOO_LARGE"),
        (capture(0), "AMOUNT"),
        (capture(-1), "AMOUNT"),
        (capture(10, "short"), "KEY"),
        (capture(20, "transfer-0"), "IDEMPOTENCY_CONFLICT"),
    ],
)
async def test_what_cannot_be_captured_stays_held(
    two: Centers, request_made: CaptureHoldRequest, reason: str
) -> None:
    transfer = TransferRequest(
        transfer_id="transfer-0", payer_account_id=ALICE, payee_account_id=ALAN, amount=cny(20)
    )
    await call(two, "Transfer", transfer)
    await call(two, "ReserveFunds", reserve())
    assert (await refused(two, "CaptureHold", request_made)).reason == reason
    assert await balance(two) == (80, 20)


async def test_a_transfer_id_of_one_capture_is_not_that_of_another(two: Centers) -> None:
    await call(two, "ReserveFunds", reserve(amount=cny(30)))
    await call(two, "ReserveFunds", reserve(amount=cny(30), hold_id="hold-0002"))
    await call(two, "CaptureHold", capture())
    other = capture()
    other.hold_id = "hold-0002"
    assert (await refused(two, "CaptureHold", other)).reason == "IDEMPOTENCY_CONFLICT"
    assert await balance(two) == (70, 40)


async def test_what_is_not_there_is_not_found(two: Centers) -> None:
    for name, request in (("CaptureHold", capture()), ("ReleaseHold", RELEASE)):
        error = await refused(two, name, request)
        assert (error.code, error.reason) == (StatusCode.NOT_FOUND, "HOLD_NOT_FOUND")


async def test_who_is_not_home_does_nothing(two: Centers) -> None:
    for name, request in (
        ("ReserveFunds", reserve()),
        ("CaptureHold", capture()),
        ("ReleaseHold", RELEASE),
    ):
        assert (await refused(two, name, request, "b")).reason == "WRONG_HOME"


async def test_a_payee_that_only_a_silent_center_knows_is_asked_for_again(two: Centers) -> None:
    plain = site("a", "a", "b")
    nobody = RecordingEndpoint(says(LookupAccountResponse()))
    away = RecordingEndpoint(fails(unreachable("b", ran=False)))
    here = replace(plain, mesh=Mesh("a", {"a": nobody, "b": away}, plain.clock))
    store = two.centers["a"].store
    service = HoldService(here, store, Payees(here, store), never_settled, two.centers["a"].slots)
    with pytest.raises(RpcError) as error:
        await service.ReserveFunds(reserve(payee_account_id=account(3)), Incoming(ALICE, 5.0))
    assert (error.value.reason, error.value.ran) == ("PAYEE_HOME_UNAVAILABLE", False)
    assert "same hold_id" in error.value.advice
    away.answer = says(LookupAccountResponse())  # which is not home of it any more
    with pytest.raises(RpcError, match="PAYEE_HOME_UNAVAILABLE"):
        await service.ReserveFunds(reserve(payee_account_id=account(3)), Incoming(ALICE, 5.0))
    away.answer = says(LookupAccountResponse(certain=True))
    with pytest.raises(RpcError, match="PAYEE_NOT_FOUND"):
        await service.ReserveFunds(reserve(payee_account_id=account(3)), Incoming(ALICE, 5.0))


async def never_settled(_row: TransferRow, _timeout_s: float) -> TransferRow:
    raise NotImplementedError


async def change(two: Centers, at: str = "a", **what: Any) -> tuple[Any, Any]:
    request = ChangeControlRequest(account_id=ALICE, **what)
    called = peer_method("transfer", "ChangeControl")
    call = Call(called, request.SerializeToString(), 5.0, {OPERATOR: "operator"})
    reply = await two.service(at).dispatcher.unary(call)
    changed = AccountControlChange.FromString(reply.payload)
    return changed.before, changed.after


async def test_operators_see_what_an_account_was_and_is(two: Centers) -> None:
    before, after = await change(two, status=ACCOUNT_STATUS_FROZEN)
    assert (before.status, after.status) == (ACCOUNT_STATUS_OPEN, ACCOUNT_STATUS_FROZEN)
    assert (await refused(two, "ReserveFunds", reserve())).reason == "ACCOUNT_FROZEN"
    await change(two, status=ACCOUNT_STATUS_OPEN)
    await call(two, "ReserveFunds", reserve(amount=cny(30), hold_id="hold-0002"))
    captured = capture()
    captured.hold_id = "hold-0002"
    await call(two, "CaptureHold", captured)
    limits = LimitsChange(per_transfer_minor_units_max=50, per_day_minor_units_max=70)
    _, after = await change(two, limits=limits)
    called = peer_method("transfer", "GetControl")
    request = GetControlRequest(account_id=ALICE).SerializeToString()
    reply = await two.service("a").dispatcher.unary(Call(called, request, 5.0))
    assert called.response_type.FromString(reply.payload) == after
    assert after.paid_today_minor_units == 30
    assert after.home_center == "a"


@pytest.mark.parametrize(
    ("what", "at", "reason"),
    [
        ({"status": ACCOUNT_STATUS_CLOSED}, "a", "ACCOUNT_NOT_EMPTY"),
        ({"status": ACCOUNT_STATUS_FROZEN}, "b", "WRONG_HOME"),
        ({"limits": LimitsChange(per_day_minor_units_max=-1)}, "a", "AMOUNT"),
        ({"limits": LimitsChange(per_transfer_minor_units_max=10**17 + 1)}, "a", "AMOUNT"),
        ({}, "a", "INVALID_FIELD"),
    ],
)
async def test_what_an_operator_may_not_do_changes_nothing(
    two: Centers, what: dict[str, Any], at: str, reason: str
) -> None:
    heads = await two.centers["a"].kinds()
    with pytest.raises(RpcError, match=reason):
        await change(two, at, **what)
    assert await two.centers["a"].kinds() == heads


async def test_holds_and_controls_come_back_with_the_money_after_the_loss_of_a_disk(
    two: Centers,
) -> None:
    await call(two, "ReserveFunds", reserve())
    await change(two, limits=LimitsChange(per_transfer_minor_units_max=50))
    await two.settle()
    await two.recover("a")
    assert await balance(two) == (100, 40)
    await call(two, "ReserveFunds", reserve())  # the same answer as before
    assert (await refused(two, "CaptureHold", capture())).reason == "LIMIT_PER_TRANSFER"
    await call(two, "CaptureHold", capture(50, "transfer-2"))
    assert await balance(two) == (50, 50)
    await two.settle()
    await two.check_same()


async def test_a_stale_answer_says_how_old_it_is(two: Centers) -> None:
    called = method("/duohuo.v1.TransferService/GetBalance")
    request = GetBalanceRequest(account_id=ALICE).SerializeToString()
    reply = await two.service("b").dispatcher.unary(Call(called, request, 5.0, {ACCOUNT: ALICE}))
    assert Balance.FromString(reply.payload).stale
    assert STALENESS_MS in reply.metadata


def test_holds_expire_by_themselves_on_time_and_without_asking_all_the_time() -> None:
    async def scenario() -> None:
        disk = FakeDisk()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        clock = SimulatedClock(loop)
        plain = site("a", "a", "b")
        here = replace(plain, stamps=Stamps(clock, plain.stamps.hybrid))
        async with temporary_store(app.SCHEMA, app.TOPICS, ["b"], disk) as store:

            def stamp() -> Stamp:
                return here.stamps.now()

            def order(payer: str, payee: str, minor_units: int) -> Order:
                return Order("deposit-1", payer, payee, "CNY", minor_units, "", b"body")

            async def hold(hold_id: str, lasts_ms: int) -> None:
                unit = reservations.reserve(
                    "a",
                    hold_id,
                    order(ALICE, ALAN, 10),
                    "",
                    clock.wall_ms() + lasts_ms,
                    stamp(),
                )
                await store.write("reserve", unit)

            deposit = order(ledger.outside("a"), ALICE, 100)
            await store.write("deposit", transfers.decide("a", deposit, "a", "", stamp()))
            with patch.object(store, "read", wraps=store.read) as read:
                running = asyncio.ensure_future(HoldExpiry(here, store).run())
                await asyncio.sleep(10 * WAIT_S_MAX + 1)
                assert 1 <= read.call_count <= 12, "there was nothing to do"
            await hold("later", 7000)
            await hold("sooner", 3000)
            before = disk.batches
            for after_s, left in ((2.9, 2), (0.2, 1), (3.8, 1), (0.2, 0)):
                await asyncio.sleep(after_s)
                assert await store.read(holds.open_count(ALICE)) == left
            assert disk.batches - before == 2
            await hold("on a full disk", 1000)
            disk.full = True
            before = disk.batches
            await asyncio.sleep(1 + 10 * RETRY_DELAY_S)
            assert 1 < disk.batches - before <= 12
            disk.full = False
            await asyncio.sleep(RETRY_DELAY_S + 0.1)
            assert await store.read(holds.open_count(ALICE)) == 0
            # The wall clock is set forward: that is noticed, if not at once.
            await hold("long", 3_600_000)
            clock.offset_ms += 3_600_000
            await asyncio.sleep(WAIT_S_MAX + 0.1)
            assert await store.read(holds.open_count(ALICE)) == 0
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    SimulatedLoop("holds expire").run(scenario())
