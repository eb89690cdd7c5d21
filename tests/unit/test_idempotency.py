"""The same id again is the same answer, whatever happened meanwhile, and with another body a conflict."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import count
from typing import TypeVar
from unittest.mock import patch

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from account_svc import memory, rules, store
from account_svc.memory import Memory
from account_svc.passwords import Passwords
from duohuo.internal.v1.peer_services_pb2 import BookDepositRequest, BookDepositResponse
from duohuo.v1.account_service_pb2 import (
    Account,
    ChangePasswordRequest,
    ChangePasswordResponse,
    Profile,
    RegisterRequest,
    UpdateProfileRequest,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_SUCCEEDED,
    Application,
    ApplyTransferRequest,
    CancelApplicationRequest,
    TransferRequest,
    TransferResult,
)
from runtime.endpoint import ACCOUNT, ask
from runtime.errors import RpcError
from runtime.methods import Method, method, peer_method
from runtime.placement import slot_of
from runtime.store import query
from tests.fakes import account
from tests.unit.centers import Centers, centers
from transfer_svc.dispatch import QueueWorker

ALICE, ALAN = account(0), account(2)
"""Both are at home at a."""
DAY_MS = 24 * 3600 * 1000
M = TypeVar("M", bound=Message)
Meanwhile = Callable[[Centers, str], Awaitable[None]]


async def nothing(_two: Centers, _center: str) -> None:
    """It is asked again at once."""


async def restarted(two: Centers, center: str) -> None:
    two.start(center, two.service(center).store)
    await two.service(center).recovery.run()


async def lost_its_disk(two: Centers, center: str) -> None:
    await two.settle()
    await two.recover(center)
    await two.settle()


async def a_month_passed(two: Centers, _center: str) -> None:
    two.clock.advance(31 * DAY_MS)


meanwhile = pytest.mark.parametrize(
    "meanwhile", [nothing, restarted, lost_its_disk, a_month_passed]
)


async def call(
    two: Centers, center: str, called: Method, request: Message, answer: type[M], user: str = ALICE
) -> M:
    return await ask(two.service(center).dispatcher, called, request, answer, 1.0, {ACCOUNT: user})


async def conflicts(asked: Awaitable[Message]) -> bool:
    with pytest.raises(RpcError) as error:
        await asked
    return error.value.reason == "IDEMPOTENCY_CONFLICT"


class TestMoney:
    @pytest.fixture
    async def two(self) -> AsyncIterator[Centers]:
        async with centers("a", "b") as made:
            for user in (ALICE, ALAN):
                await made.deposit(user, 100, f"deposit {user}")
            await made.settle()
            yield made

    async def transfer(self, two: Centers, amount: int = 30) -> TransferResult:
        request = TransferRequest(
            transfer_id="transfer-1",
            payer_account_id=ALICE,
            payee_account_id=ALAN,
            amount=Money(currency_code="CNY", minor_units=amount),
        )
        called = method("/duohuo.v1.TransferService/Transfer")
        return await call(two, "a", called, request, TransferResult)

    async def deposit(self, two: Centers, amount: int = 30) -> BookDepositResponse:
        request = BookDepositRequest(
            deposit_id="deposit-1",
            account_id=ALICE,
            amount=Money(currency_code="CNY", minor_units=amount),
        )
        called = peer_method("transfer", "BookDeposit")
        return await call(two, "a", called, request, BookDepositResponse)

    async def apply(self, two: Centers, amount: int = 30) -> Application:
        request = ApplyTransferRequest(
            transfer_id="transfer-1",
            payer_account_id=ALICE,
            payee_account_id=ALAN,
            amount=Money(currency_code="CNY", minor_units=amount),
        )
        called = method("/duohuo.v1.TransferService/ApplyTransfer")
        return await call(two, "b", called, request, Application)

    async def cancel(self, two: Centers, application: Application) -> Application:
        request = CancelApplicationRequest(application_id=application.application_id)
        called = method("/duohuo.v1.TransferService/CancelApplication")
        return await call(two, "b", called, request, Application)

    async def test_a_transfer_that_is_asked_for_many_times_at_once(self, two: Centers) -> None:
        answers = await asyncio.gather(*(self.transfer(two) for _ in range(50)))
        assert answers == [answers[0]] * 50
        assert await two.centers["a"].balance(ALICE) == 70

    async def test_of_transfers_at_once_only_what_there_is_is_paid(self, two: Centers) -> None:
        async def pay_all(number: int) -> TransferResult | RpcError:
            request = TransferRequest(
                transfer_id=f"transfer-{number}",
                payer_account_id=ALICE,
                payee_account_id=ALAN,
                amount=Money(currency_code="CNY", minor_units=100),
            )
            called = method("/duohuo.v1.TransferService/Transfer")
            try:
                return await call(two, "a", called, request, TransferResult)
            except RpcError as error:
                return error

        answers = await asyncio.gather(*map(pay_all, range(20)))
        refused = [answer.reason for answer in answers if isinstance(answer, RpcError)]
        assert refused == ["INSUFFICIENT_FUNDS"] * 19
        assert await two.centers["a"].balance(ALICE) == 0
        assert await two.centers["a"].balance(ALAN) == 200

    @meanwhile
    async def test_a_transfer(self, two: Centers, meanwhile: Meanwhile) -> None:
        first = await self.transfer(two)
        await meanwhile(two, "a")
        assert await self.transfer(two) == first
        assert await conflicts(self.transfer(two, 31))
        assert await self.transfer(two) == first
        assert await two.centers["a"].balance(ALICE) == 70

    @meanwhile
    async def test_a_refused_transfer(self, two: Centers, meanwhile: Meanwhile) -> None:
        """A refusal is an answer: it stands although there is enough money now."""
        for _ in range(2):
            with pytest.raises(RpcError) as refused:
                await self.transfer(two, 101)
            assert refused.value.reason == "INSUFFICIENT_FUNDS"
            await two.deposit(ALICE, 100, "more")
            await meanwhile(two, "a")
        assert await conflicts(self.transfer(two, 30))

    @meanwhile
    async def test_a_deposit(self, two: Centers, meanwhile: Meanwhile) -> None:
        first = await self.deposit(two)
        await meanwhile(two, "a")
        assert await self.deposit(two) == first
        assert await conflicts(self.deposit(two, 31))
        assert await two.centers["a"].balance(ALICE) == 130

    @meanwhile
    async def test_an_application(self, two: Centers, meanwhile: Meanwhile) -> None:
        first = await self.apply(two)
        b = two.service("b")
        running = asyncio.ensure_future(QueueWorker(b.site, b.store).run())
        while (await self.apply(two)).state != APPLICATION_STATE_SUCCEEDED:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        for center in ("a", "b"):
            await meanwhile(two, center)
        again = await self.apply(two)
        assert (again.application_id, again.state) == (
            first.application_id,
            APPLICATION_STATE_SUCCEEDED,
        )
        assert await conflicts(self.apply(two, 31))
        # The transfer id is one, whether it is applied for or paid at once.
        await self.transfer(two)
        assert await conflicts(self.transfer(two, 31))
        assert await two.centers["a"].balance(ALICE) == 70

    @meanwhile
    async def test_a_cancel(self, two: Centers, meanwhile: Meanwhile) -> None:
        application = await self.apply(two)
        assert (await self.cancel(two, application)).state == APPLICATION_STATE_CANCELLED
        for center in ("a", "b"):
            await meanwhile(two, center)
        assert (await self.cancel(two, application)).state == APPLICATION_STATE_CANCELLED
        with pytest.raises(RpcError) as refused:
            await self.transfer(two)
        assert refused.value.reason == "CANCELLED"
        assert await two.centers["a"].balance(ALICE) == 100


class Plain(Passwords):
    """What is stored differs from what is typed, and every time."""

    def __init__(self) -> None:
        self._salts = count()

    async def hash(self, password: str) -> str:
        return f"{next(self._salts)} {password[::-1]}"

    async def verify(self, password_hash: str | None, password: str) -> bool:
        return password_hash is not None and password_hash.split(" ", 1)[1] == password[::-1]

    def is_outdated(self, _password_hash: str) -> bool:
        return False


IDENTIFIER = next(found for n in count() if slot_of(found := f"alice{n}@example.com") % 2 == 0)


class TestAccounts:
    @pytest.fixture
    async def two(self) -> AsyncIterator[Centers]:
        async with centers("a", "b", role="account", passwords=Plain()) as made:
            yield made

    async def register(
        self,
        two: Centers,
        password: str = "first-password",  # noqa: S107 - nobody's
        name: str = "Alice",
    ) -> Account:
        request = RegisterRequest(
            identifier=IDENTIFIER, password=password, display_name=name, request_id="register-1"
        )
        called = method("/duohuo.v1.AccountService/Register")
        return await call(two, "a", called, request, Account)

    async def edit(
        self,
        two: Centers,
        user: Account,
        name: str,
        center: str = "a",
        request_id: str = "edit-001",
    ) -> Account:
        request = UpdateProfileRequest(
            account_id=user.account_id,
            profile=Profile(display_name=name),
            update_mask=FieldMask(paths=["display_name"]),
            request_id=request_id,
        )
        called = method("/duohuo.v1.AccountService/UpdateProfile")
        return await call(two, center, called, request, Account, user.account_id)

    async def change_password(
        self, two: Centers, user: Account, new: str, center: str = "a", request_id: str = "passwd-1"
    ) -> ChangePasswordResponse:
        request = ChangePasswordRequest(
            account_id=user.account_id,
            old_password="first-password",
            new_password=new,
            request_id=request_id,
        )
        called = method("/duohuo.v1.AccountService/ChangePassword")
        return await call(two, center, called, request, ChangePasswordResponse, user.account_id)

    @meanwhile
    async def test_a_registration(self, two: Centers, meanwhile: Meanwhile) -> None:
        first = await self.register(two)
        await meanwhile(two, "a")
        assert await self.register(two) == first
        assert await conflicts(self.register(two, name="Mallory"))
        assert await conflicts(self.register(two, password="other-password"))
        assert await self.register(two) == first

    @meanwhile
    async def test_a_profile(self, two: Centers, meanwhile: Meanwhile) -> None:
        user = await self.register(two)
        await self.edit(two, user, "first edit")
        await self.edit(two, user, "second edit", request_id="edit-002")
        await meanwhile(two, "a")
        again = await self.edit(two, user, "first edit")
        assert again.profile.display_name == "second edit"  # it was done, and is not done again
        assert await conflicts(self.edit(two, user, "third edit"))
        await two.settle()
        assert (await self.edit(two, user, "first edit", "b")).profile == again.profile
        assert await conflicts(self.edit(two, user, "third edit", "b"))

    @meanwhile
    async def test_a_password(self, two: Centers, meanwhile: Meanwhile) -> None:
        user = await self.register(two)
        await self.change_password(two, user, "second-password")
        await meanwhile(two, "a")
        await two.settle()
        for center in ("a", "b"):
            await self.change_password(two, user, "second-password", center)
            assert await conflicts(self.change_password(two, user, "third-password", center))
        await self.register(two)  # its password has been replaced, and cannot be compared any more

    async def test_nothing_is_kept_from_which_a_password_could_be_guessed(
        self, two: Centers
    ) -> None:
        user = await self.register(two)
        await self.change_password(two, user, "second-password")
        bodies = []
        for password in ("second-password", "third-password"):
            async with centers("a", "b", role="account", passwords=Plain()) as others:
                user = await self.register(others)
                await self.change_password(others, user, password)
                found = store.seen(user.account_id, "passwd-1")
                bodies.append(await others.service("a").store.read(found))
        assert bodies[0] is not None
        assert bodies[0] == bodies[1]

    async def requests(self, two: Centers, center: str) -> list[str]:
        rows = await two.service(center).store.read(
            query("SELECT request_id FROM request ORDER BY time_ms, request_id")
        )
        return [row[0] for row in rows]

    async def test_requests_are_forgotten_everywhere_in_steps_and_late(self, two: Centers) -> None:
        user = await self.register(two)
        for number in range(5):
            two.clock.advance(1)
            await self.edit(two, user, f"name {number}", request_id=f"edit-{number:03}")
        two.clock.advance(30 * DAY_MS)
        await two.settle()
        await self.edit(two, user, "at b", "b", request_id="edit-at-b")
        memories = {name: Memory(two.service(name).site, two.service(name).store) for name in "ab"}
        with patch.object(memory, "FORGOTTEN_AT_ONCE_MAX", 3):
            assert await memories["a"].forget_some() == 0  # 30 days are promised
            two.clock.advance(rules.REQUESTS_KEPT_MS - 30 * DAY_MS)
            steps = [await memories["a"].forget_some() for _ in range(4)]
            assert steps == [3, 3, 0, 0]
            assert await memories["b"].forget_some() == 0
        await two.settle()
        # The last of them was made exactly as long ago as is kept.
        kept = ["edit-004", "edit-at-b"]
        assert [await self.requests(two, name) for name in "ab"] == [kept, kept]
        await two.check_same()
        assert (await self.register(two)).account_id == user.account_id  # kept for ever
        await lost_its_disk(two, "a")
        assert await self.requests(two, "a") == kept

    async def test_a_center_with_a_wrong_clock_forgets_nothing(self, two: Centers) -> None:
        await self.register(two)
        two.clock.advance(2 * rules.REQUESTS_KEPT_MS)
        a = two.service("a")
        with patch.object(type(a.site.mesh.clocks), "local_is_wrong", lambda _self: True):
            assert await Memory(a.site, a.store).forget_some() == 0
        assert await Memory(a.site, a.store).forget_some() == 2
