"""Cancelling is honest: cancelled, decided before, or not known yet; and then exactly one of the two."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import pytest
from google.protobuf.message import Message

from duohuo.internal.v1.peer_services_pb2 import DecideRequest, DecideResponse
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_CANCELLING,
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_QUEUED,
    APPLICATION_STATE_SUCCEEDED,
    Application,
    ApplyTransferRequest,
    CancelApplicationRequest,
    GetApplicationRequest,
    ListApplicationsRequest,
    ListApplicationsResponse,
    TransferRequest,
    TransferResult,
    WatchApplicationsRequest,
)
from runtime.endpoint import ACCOUNT, Call, ask
from runtime.errors import RpcError
from runtime.methods import method, peer_method
from tests.fakes import account
from tests.unit.centers import Centers, Service, centers, until
from transfer_svc.dispatch import QueueWorker, transfer_of

ALICE, ALAN = account(0), account(3)
"""Both are at home at a, in a mesh of three."""
M = TypeVar("M", bound=Message)


@pytest.fixture
async def three() -> AsyncIterator[Centers]:
    async with centers("a", "b", "c") as made:
        for user in (ALICE, ALAN):
            await made.deposit(user, 100, f"deposit {user}")
        await made.settle()
        yield made


async def call(service: Service, name: str, request: Message, answer: type[M]) -> M:
    """Alice calls a center's transfer service."""
    wanted = method(f"/duohuo.v1.TransferService/{name}")
    return await ask(service.dispatcher, wanted, request, answer, 1.0, {ACCOUNT: ALICE})


async def apply(service: Service, amount: int = 30) -> Application:
    request = ApplyTransferRequest(
        transfer_id="transfer-1",
        payer_account_id=ALICE,
        payee_account_id=ALAN,
        amount=Money(currency_code="CNY", minor_units=amount),
    )
    return await call(service, "ApplyTransfer", request, Application)


async def cancel(service: Service, application: Application) -> Application:
    request = CancelApplicationRequest(application_id=application.application_id)
    return await call(service, "CancelApplication", request, Application)


async def get(service: Service, application: Application) -> Application:
    request = GetApplicationRequest(application_id=application.application_id)
    return await call(service, "GetApplication", request, Application)


async def execute(home: Service, application: Application) -> None:
    """Home decides; its answer is lost."""
    request = DecideRequest(
        transfer=transfer_of(application), application_id=application.application_id
    )
    decide = peer_method("transfer", "Decide")
    await ask(home.dispatcher, decide, request, DecideResponse, 1.0)


async def drain(service: Service, application: Application) -> Application:
    """The queue's worker works until the application has ended."""
    found = application
    running = asyncio.ensure_future(QueueWorker(service.site, service.store).run())
    while not found.HasField("decide_time"):
        await asyncio.sleep(0)
        found = await get(service, application)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    return found


async def balances(three: Centers) -> tuple[int, int]:
    home = three.centers["a"]
    return await home.balance(ALICE), await home.balance(ALAN)


async def refused(service: Service, application: Application) -> str:
    with pytest.raises(RpcError) as error:
        await cancel(service, application)
    return error.value.reason


async def test_cancelled_at_once_where_home_answers(three: Centers) -> None:
    b = three.service("b")
    application = await apply(b)
    for _ in range(2):
        assert (await cancel(b, application)).state == APPLICATION_STATE_CANCELLED
    assert (await drain(b, application)).state == APPLICATION_STATE_CANCELLED
    assert await balances(three) == (100, 100)


async def test_cancelling_while_home_is_silent_then_cancelled(three: Centers) -> None:
    b = three.service("b")
    application = await apply(b)
    three.hush("a")
    for _ in range(2):
        answer = await cancel(b, application)
        assert answer.state == APPLICATION_STATE_CANCELLING
        assert answer.last_attempt_error == "CENTER_UNREACHABLE"
    three.answer("a")
    assert (await drain(b, application)).state == APPLICATION_STATE_CANCELLED
    assert (await cancel(b, application)).state == APPLICATION_STATE_CANCELLED
    assert await balances(three) == (100, 100)


@pytest.mark.parametrize(
    ("amount", "end", "left"),
    [(30, APPLICATION_STATE_SUCCEEDED, (70, 130)), (101, APPLICATION_STATE_FAILED, (100, 100))],
)
async def test_cancelling_while_home_is_silent_then_what_it_had_decided(
    three: Centers, amount: int, end: int, left: tuple[int, int]
) -> None:
    a, b = three.service("a"), three.service("b")
    application = await apply(b, amount)
    await execute(a, application)
    three.hush("a")
    assert (await cancel(b, application)).state == APPLICATION_STATE_CANCELLING
    three.answer("a")
    assert (await drain(b, application)).state == end
    assert await refused(b, application) == "APPLICATION_DECIDED"
    await three.settle()
    await three.check_same()
    assert await balances(three) == left


async def test_asking_again_once_home_answers_ends_it_without_the_queue(three: Centers) -> None:
    b = three.service("b")
    application = await apply(b)
    three.hush("a")
    await cancel(b, application)
    three.answer("a")
    assert (await cancel(b, application)).state == APPLICATION_STATE_CANCELLED


async def test_what_home_decided_before_is_not_cancelled(three: Centers) -> None:
    a, b = three.service("a"), three.service("b")
    application = await apply(b)
    await execute(a, application)
    assert await refused(b, application) == "APPLICATION_DECIDED"
    assert (await get(b, application)).state == APPLICATION_STATE_SUCCEEDED


async def test_all_centers_see_cancelling_and_its_end(three: Centers) -> None:
    b, c = three.service("b"), three.service("c")
    application = await apply(b)
    three.hush("a")
    await cancel(b, application)
    await c.follow("b")
    assert (await get(c, application)).state == APPLICATION_STATE_CANCELLING
    three.answer("a")
    await drain(b, application)
    await three.settle()
    await three.check_same()
    for name in "abc":
        state = (await get(three.service(name), application)).state
        assert state == APPLICATION_STATE_CANCELLED


async def test_cancelling_survives_the_loss_of_the_origins_disk(three: Centers) -> None:
    b = three.service("b")
    application = await apply(b)
    three.hush("a")
    await cancel(b, application)
    await three.service("c").follow("b")
    three.answer("a")
    b = await three.recover("b")
    assert (await drain(b, application)).state == APPLICATION_STATE_CANCELLED
    assert await balances(three) == (100, 100)


async def test_home_cancels_for_an_origin_that_is_away_and_says_so_from_then_on(
    three: Centers,
) -> None:
    a, b, c = (three.service(name) for name in "abc")
    application = await apply(b)
    await three.settle()
    three.hush("b")
    assert (await cancel(a, application)).state == APPLICATION_STATE_CANCELLED
    await c.follow("a")
    for center in (a, c):
        assert (await get(center, application)).state == APPLICATION_STATE_CANCELLED
    assert (await get(b, application)).state == APPLICATION_STATE_QUEUED  # it has not heard of it
    three.answer("b")
    assert (await drain(b, application)).state == APPLICATION_STATE_CANCELLED
    await three.settle()
    await three.check_same()
    assert await balances(three) == (100, 100)


@asynccontextmanager
async def watching(service: Service) -> AsyncIterator[list[Application]]:
    """What a watch has shown so far."""
    seen: list[Application] = []
    request = WatchApplicationsRequest(payer_account_id=ALICE)
    wanted = method("/duohuo.v1.TransferService/WatchApplications")
    watched = Call(wanted, request.SerializeToString(), 1.0, {ACCOUNT: ALICE})

    async def watch() -> None:
        async for message in service.dispatcher.stream(watched):
            seen.append(Application.FromString(message))  # noqa: PERF401 - others look meanwhile

    running = asyncio.ensure_future(watch())
    yield seen
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("center", ["a", "c"])
@pytest.mark.parametrize("real_time", [False, True], ids=["applied", "paid at once"])
async def test_a_watch_shows_the_decision_although_the_origin_is_lost(
    three: Centers, center: str, real_time: bool
) -> None:
    a, b = three.service("a"), three.service("b")
    application = await apply(b)
    await three.settle()
    three.hush("b")
    watcher = three.service(center)
    async with watching(watcher) as seen:
        await until(lambda: len(seen) == 1)
        assert seen[0].state == APPLICATION_STATE_QUEUED
        if real_time:
            request = TransferRequest(
                transfer_id=application.transfer_id,
                payer_account_id=ALICE,
                payee_account_id=ALAN,
                amount=application.amount,
            )
            await call(a, "Transfer", request, TransferResult)
        else:
            await execute(a, application)
        if center != "a":
            await watcher.follow("a")
        await until(lambda: len(seen) > 1)
        assert seen[1].state == APPLICATION_STATE_SUCCEEDED
        assert seen[1].HasField("decide_time")
    listed = await call(
        watcher,
        "ListApplications",
        ListApplicationsRequest(payer_account_id=ALICE),
        ListApplicationsResponse,
    )
    assert [one.state for one in listed.applications] == [APPLICATION_STATE_SUCCEEDED]


async def test_who_asks_is_told_that_home_is_away_without_an_attempt(three: Centers) -> None:
    b = three.service("b")
    three.hush("a")
    for _ in range(2):
        with suppress(RpcError):
            await b.site.mesh.at("a").unary(Call(peer_method("transfer", "Decide"), b"", 1.0))
    application = await apply(b)
    assert (application.attempts, application.last_attempt_error) == (0, "CENTER_UNREACHABLE")
    three.answer("a")
    assert (await get(b, application)).last_attempt_error == ""
