"""A center that was away catches up by its cursors, however often it is killed meanwhile."""

import asyncio
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from duohuo.v1.account_service_pb2 import Account, Profile, UpdateProfileRequest
from duohuo.v1.money_pb2 import Money
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_FAILED,
    Balance,
    GetBalanceRequest,
    TransferRequest,
    TransferResult,
)
from ops import control
from ops.control import ControlError
from runtime.endpoint import AUTHORIZATION, ask
from runtime.ids import RandomIds
from runtime.methods import method
from tests.integration.conftest import PASSWORD, RunningMesh
from tests.integration.load import Load

M = TypeVar("M", bound=Message)
EDITS, TRANSFERS, PAID_ABROAD = 1500, 800, 60
AT_A_TIME = 40
KILLS_IN_THE_MIDDLE = 3
ROUNDS_MAX = 20
CALL_TIMEOUT_S = 20.0


class Changes:
    """A user of a who edits and pays, through a alone; the payees' homes are a and b."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self._ids = RandomIds()
        self._turns = asyncio.Semaphore(AT_A_TIME)

    async def prepare(self) -> None:
        self.payer, self.near = [await self.load.register("a") for _ in range(2)]
        self.far = await self.load.register("b")
        # Whom a does not know, it cannot pay while b is away.
        await self.load.until(self._far_is_copied)
        self.token = await self._log_in("a", self.payer)
        await self.load.stage.deposit("a", self._ids.unique(), self.payer.account_id, 1_000_000)

    def _far_is_copied(self) -> bool:
        known = "SELECT 1 FROM account WHERE account_id = ?"
        return bool(self.load.stage.disk("a").rows("account", known, self.far.account_id))

    async def edit(self, value: str) -> None:
        request = UpdateProfileRequest(
            account_id=self.payer.account_id,
            profile=Profile(display_name=value),
            update_mask=FieldMask(paths=["display_name"]),
            request_id=self._ids.unique(),
        )
        await self._call("AccountService/UpdateProfile", request, Account)

    async def pay(self, payee: Account) -> None:
        request = TransferRequest(
            transfer_id=self._ids.unique(),
            payer_account_id=self.payer.account_id,
            payee_account_id=payee.account_id,
            amount=Money(currency_code="CNY", minor_units=1),
        )
        done = await self._call("TransferService/Transfer", request, TransferResult)
        assert done.state != TRANSFER_STATE_FAILED

    async def balance_of(self, center: str, account: Account) -> int:
        token = await self._log_in(center, account)
        found = await ask(
            self.load.stage.gateway(center),
            method("/duohuo.v1.TransferService/GetBalance"),
            GetBalanceRequest(account_id=account.account_id),
            Balance,
            CALL_TIMEOUT_S,
            {AUTHORIZATION: f"Bearer {token}"},
        )
        assert not found.stale
        return found.balance.minor_units

    async def _log_in(self, center: str, account: Account) -> str:
        request = LoginRequest(identifier=account.identifiers[0], password=PASSWORD, device="test")
        called = method("/duohuo.v1.SessionService/Login")
        session = await ask(
            self.load.stage.gateway(center), called, request, Session, CALL_TIMEOUT_S
        )
        return session.token

    async def _call(self, path: str, request: Message, answer: type[M]) -> M:
        async with self._turns:
            return await ask(
                self.load.stage.gateway("a"),
                method(f"/duohuo.v1.{path}"),
                request,
                answer,
                CALL_TIMEOUT_S,
                {AUTHORIZATION: f"Bearer {self.token}"},
            )


async def test_thousands_of_changes_arrive_once_at_a_center_killed_in_the_middle(
    mesh: RunningMesh,
) -> None:
    load = Load(mesh)
    try:
        changes = Changes(load)
        await changes.prepare()
        await _control(load, "stop")
        async with asyncio.TaskGroup() as tasks:
            for number in range(EDITS):
                tasks.create_task(changes.edit(str(number)))
            for _ in range(TRANSFERS):
                tasks.create_task(changes.pay(changes.near))
            for _ in range(PAID_ABROAD):
                tasks.create_task(changes.pay(changes.far))

        in_the_middle = 0
        for _ in range(ROUNDS_MAX):
            before = _applied(load)
            starting = asyncio.create_task(_control(load, "start"))
            await load.until(partial(_has_moved_on, load, before))
            _kill_serve(load.stage.state / "b" / "center.toml")
            with suppress(ControlError):
                await starting
            await _until_dead(load)
            in_the_middle += _behind(load) > 0
            if in_the_middle == KILLS_IN_THE_MIDDLE or _behind(load) == 0:
                break
        assert in_the_middle > 0, "it was never killed in the middle"
        # The last time; a goes on serving meanwhile, and it needs no more than a start.
        starting = asyncio.create_task(_control(load, "start"))
        await changes.edit("last")
        await changes.pay(changes.far)
        await starting
        await load.settled()

        assert await changes.balance_of("b", changes.far) == PAID_ABROAD + 1
        assert await changes.balance_of("a", changes.near) == TRANSFERS
        for key, road in (await load.roads()).items():
            # Each number was counted in the transaction of its effect.
            assert road.from_jetstream + road.from_feed == road.cursor, key
    finally:
        await load.stop()
        await load.stage.close()


async def _control(load: Load, verb: str) -> None:
    await asyncio.to_thread(control.request, load.stage.view(), f"center {verb}", center="b")


def _applied(load: Load) -> list[tuple[str, int]]:
    """How far b has come with the logs of a."""
    rows = "SELECT topic, seq FROM cursor WHERE source = 'a' ORDER BY topic"
    return [
        *load.stage.disk("b").rows("account", rows),
        *load.stage.disk("b").rows("transfer", rows),
    ]


def _has_moved_on(load: Load, before: list[tuple[str, int]]) -> bool:
    return _applied(load) != before or _behind(load) == 0


def _behind(load: Load) -> int:
    """How many entries of a are missing at b."""
    heads = "SELECT topic, seq FROM log_head"
    disk = load.stage.disk("a")
    found = dict([*disk.rows("account", heads), *disk.rows("transfer", heads)])
    return sum(found[topic] - seq for topic, seq in _applied(load))


def _kill_serve(config: Path) -> None:
    """Ends the process with these settings, whether or not it has said that it is ready."""
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if str(config).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


async def _until_dead(load: Load) -> None:
    await load.until(lambda: load.stage.view().centers["b"].state == "failed")
