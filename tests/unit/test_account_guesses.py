"""The old password of a password change is no way around the limits on guessing."""

from duohuo.v1.account_service_pb2 import (
    Account,
    ChangePasswordRequest,
    ChangePasswordResponse,
    RegisterRequest,
)
from runtime.errors import RpcError
from runtime.methods import method
from tests.unit.centers import centers
from tests.unit.test_idempotency import IDENTIFIER, Plain, call

RIGHT, NEW = "first-password", "second-password"
FREE = 5


async def test_an_old_password_can_be_guessed_at_a_few_times() -> None:
    async with centers("a", "b", role="account", passwords=Plain()) as two:
        register = RegisterRequest(identifier=IDENTIFIER, password=RIGHT, request_id="register-1")
        path = "/duohuo.v1.AccountService"
        user = await call(two, "a", method(f"{path}/Register"), register, Account)

        async def change(old: str) -> str:
            """The reason, if it is refused."""
            request = ChangePasswordRequest(
                account_id=user.account_id,
                old_password=old,
                new_password=NEW,
                request_id="change-1",
            )
            changed = method(f"{path}/ChangePassword")
            try:
                await call(two, "a", changed, request, ChangePasswordResponse, user.account_id)
            except RpcError as error:
                return error.reason
            return ""

        for number in range(FREE):
            assert await change(f"guess-{number}") == "BAD_CREDENTIALS"
        assert await change(RIGHT) == "BAD_CREDENTIALS"
        two.clock.advance(30_000)
        assert await change(RIGHT) == ""
