"""Disks that are lost, backups restored, centers away for long, copies changed by hand: real processes."""

import asyncio
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from duohuo.v1.account_service_pb2 import Account, RegisterRequest
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    CenterStatus,
    DepositRequest,
    DepositResponse,
    GetStatusRequest,
)
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_SUCCEEDED,
    TRANSFER_STATE_CREDITED,
    Application,
    ApplyTransferRequest,
    Balance,
    Entry,
    GetApplicationRequest,
    GetBalanceRequest,
    ListEntriesRequest,
    ListEntriesResponse,
    TransferRequest,
    TransferResult,
)
from ops import control, mesh_file, status, verify
from ops.client import Client, Login, Sessions, ask_operator
from ops.drill import identifier_of
from runtime.errors import RpcError
from tests.integration.conftest import PASSWORD, RunningMesh, start_mesh

CENTERS = ("a", "b")
COPIED_WITHIN_S = 20.0
BACK_WITHIN_S = 30.0
ASK_AGAIN_AFTER_S = 0.05
UNAVAILABLE = ("CENTER_RECOVERING", "HOME_CENTER_UNAVAILABLE")


@dataclass
class User:
    """A user of a test, whose home is `home`."""

    home: str
    identifier: str
    account_id: str
    login: Login


@dataclass
class People:
    """Users and operators of a running mesh."""

    state: Path
    at: dict[str, Client] = field(default_factory=dict)

    async def user(self, home: str, money: int = 1000) -> User:
        request = RegisterRequest(
            identifier=identifier_of(home, CENTERS), password=PASSWORD, request_id=str(uuid4())
        )
        accounts: list[Account] = []

        async def registered() -> bool:  # connections of the test before may just be ending
            path = "AccountService/Register"
            accounts.append(await self.at[home].call(path, request, Account))
            return True

        await eventually(registered, COPIED_WITHIN_S)
        (account,) = accounts
        identifier = account.identifiers[0]
        await self.fund(account.account_id, home, money)
        login = await self.log_in(home, identifier)
        return User(home, identifier, account.account_id, login)

    async def fund(self, account_id: str, center: str, money: int) -> None:
        deposit = DepositRequest(deposit_id=str(uuid4()), user=account_id, amount=cny(money))
        await ask_operator(self.state, center, "Deposit", deposit, DepositResponse)

    async def log_in(self, center: str, identifier: str) -> Login:
        request = LoginRequest(identifier=identifier, password=PASSWORD, device="test")
        session = await self.at[center].call("SessionService/Login", request, Session)
        return Login(session.account_id, session.token)

    async def transfer(
        self, payer: User, payee: User, amount: int, transfer_id: str = "", *, center: str = ""
    ) -> TransferResult:
        request = TransferRequest(
            transfer_id=transfer_id or str(uuid4()),
            payer_account_id=payer.account_id,
            payee_account_id=payee.account_id,
            amount=cny(amount),
        )
        called = self.at[center or payer.home]
        return await called.call("TransferService/Transfer", request, TransferResult, payer.login)

    async def apply(self, payer: User, payee: User, amount: int, center: str) -> Application:
        request = ApplyTransferRequest(
            transfer_id=str(uuid4()),
            payer_account_id=payer.account_id,
            payee_account_id=payee.account_id,
            amount=cny(amount),
        )
        path = "TransferService/ApplyTransfer"
        return await self.at[center].call(path, request, Application, payer.login)

    async def application(self, payer: User, application_id: str, center: str) -> Application:
        request = GetApplicationRequest(application_id=application_id)
        path = "TransferService/GetApplication"
        return await self.at[center].call(path, request, Application, payer.login)

    async def balance(self, user: User, center: str = "") -> int:
        request = GetBalanceRequest(account_id=user.account_id)
        called = self.at[center or user.home]
        found = await called.call("TransferService/GetBalance", request, Balance, user.login)
        return found.balance.minor_units

    async def statement(self, user: User) -> list[Entry]:
        request = ListEntriesRequest(account_id=user.account_id)
        path = "TransferService/ListEntries"
        listed = await self.at[user.home].call(path, request, ListEntriesResponse, user.login)
        return list(listed.entries)

    async def status_of(self, center: str) -> CenterStatus:
        return await ask_operator(self.state, center, "GetStatus", GetStatusRequest(), CenterStatus)

    async def alarms(self) -> str:
        """What `duohuo status` says."""
        return (await status.collect(self.state))[0]

    async def verify(self) -> None:
        report = await verify.verify(self.state, COPIED_WITHIN_S)
        assert report.passed, report.text()

    async def center(self, verb: str, name: str) -> None:
        mesh = mesh_file.read(self.state)
        await asyncio.to_thread(control.request, mesh, f"center {verb}", center=name)

    @asynccontextmanager
    async def down(self, name: str) -> AsyncIterator[Path]:
        """The center is killed for this long; gives its directory."""
        await self.center("kill", name)
        yield self.state / name
        await self.center("start", name)

    async def back(self, *names: str) -> None:
        """All services of these centers serve, and all see all."""

        async def well() -> bool:
            found = [await self.status_of(name) for name in names]
            return all(
                not one.recoveries
                and not one.silent_roles
                and all(peer.reachable for peer in one.peers)
                for one in found
            )

        await eventually(well, BACK_WITHIN_S)


def cny(minor_units: int) -> Money:
    return Money(currency_code="CNY", minor_units=minor_units)


async def eventually(condition: Callable[[], Awaitable[bool]], within_s: float) -> None:
    """Asks again and again; a center that is just starting may not answer yet."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            if await condition():
                return
        except RpcError as error:
            if error.reason not in ("CENTER_UNREACHABLE", *UNAVAILABLE):
                raise
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(ASK_AGAIN_AFTER_S)


async def refused(call: Awaitable[Any]) -> RpcError:
    with pytest.raises(RpcError) as error:
        await call
    return error.value


@asynccontextmanager
async def people(mesh: RunningMesh) -> AsyncIterator[People]:
    gateways = mesh_file.read(mesh.cli.state).centers
    made = People(mesh.cli.state)
    made.at = {name: Client({name: gateways[name].gateway}, Sessions()) for name in CENTERS}
    try:
        yield made
    finally:
        for client in made.at.values():
            await client.close()


@contextmanager
def running(directory: Path) -> Iterator[RunningMesh]:
    """A mesh of its own for a test after which a mesh is good for nothing else."""
    mesh = start_mesh(directory / "mesh")
    try:
        yield mesh
    finally:
        assert mesh.stop() == 0


def delete_stores(directory: Path, names: str = "*.db*") -> None:
    found = list((directory / "stores").glob(names))
    assert found
    for file in found:
        file.unlink()


def delete_stores_and_jetstream(directory: Path) -> None:
    delete_stores(directory)
    shutil.rmtree(directory / "nats")


def delete_transfers(directory: Path) -> None:
    delete_stores(directory, "transfer.db*")


def delete_accounts(directory: Path) -> None:
    delete_stores(directory, "account.db*")


@pytest.mark.parametrize(
    ("name", "lose"),
    [
        ("a", delete_stores),
        ("b", delete_stores_and_jetstream),
        ("a", delete_transfers),
        ("b", delete_accounts),
        ("a", shutil.rmtree),
    ],
    ids=["a's stores", "b's stores and JetStream", "a's money", "b's accounts", "all of a"],
)
async def test_a_center_whose_disk_is_lost_comes_back_by_itself(
    mesh: RunningMesh, name: str, lose: Callable[[Path], None]
) -> None:
    other = "b" if name == "a" else "a"
    async with people(mesh) as all_:
        local, remote = await all_.user(name), await all_.user(other)
        idle = await all_.user(name, 77)
        transfer_id = str(uuid4())
        sent = await all_.transfer(local, remote, 10, transfer_id)
        assert sent.state == TRANSFER_STATE_CREDITED
        await all_.transfer(remote, local, 3)
        await all_.verify()
        statement = await all_.statement(local)
        assert len(statement) == 3
        async with all_.down(name) as directory:
            lose(directory)

            async def noticed() -> bool:
                return not (await all_.status_of(other)).peers[0].reachable

            await eventually(noticed, COPIED_WITHIN_S)
            local.login = await all_.log_in(other, local.identifier)
            queued = await all_.apply(local, remote, 100, other)
        await all_.back(*CENTERS)

        for center in CENTERS:
            for user in (local, remote, idle):
                user.login = await all_.log_in(center, user.identifier)

        async def decided() -> bool:
            found = await all_.application(local, queued.application_id, other)
            return found.state == APPLICATION_STATE_SUCCEEDED

        await eventually(decided, COPIED_WITHIN_S)
        assert await all_.balance(local) == 893
        assert await all_.balance(idle) == 77
        assert (await all_.statement(local))[1:] == statement
        assert await all_.transfer(local, remote, 10, transfer_id) == sent
        error = await refused(all_.transfer(local, remote, 11, transfer_id))
        assert error.reason == "IDEMPOTENCY_CONFLICT"
        assert (await all_.transfer(local, remote, 5)).state == TRANSFER_STATE_CREDITED
        assert (await all_.transfer(remote, local, 6)).state == TRANSFER_STATE_CREDITED
        assert await all_.balance(local) == 894
        assert await all_.balance(remote) == 1106
        again = RegisterRequest(
            identifier=local.identifier, password=PASSWORD, request_id=str(uuid4())
        )
        call = all_.at[name].call("AccountService/Register", again, Account)
        assert (await refused(call)).reason == "IDENTIFIER_TAKEN"
        await all_.verify()


async def test_an_empty_center_waits_for_its_peer_and_begins_when_it_is_back(
    mesh: RunningMesh,
) -> None:
    async with people(mesh) as all_:
        at_a, at_b = await all_.user("a"), await all_.user("b")
        await all_.verify()
        async with all_.down("b"):
            async with all_.down("a") as directory:
                delete_stores(directory)
            for user in (at_a, at_b):
                error = await refused(all_.log_in("a", user.identifier))
                assert error.reason in UNAVAILABLE
                assert error.retry_after_ms
                assert not error.ran
            told = await all_.alarms()
            for role in ("account", "session", "transfer"):
                line = (
                    f"! center a does not serve as {role}: it has an empty store, and waits for b"
                )
                assert line in told
            new = RegisterRequest(
                identifier=identifier_of("a", CENTERS), password=PASSWORD, request_id=str(uuid4())
            )
            error = await refused(all_.at["a"].call("AccountService/Register", new, Account))
            assert error.reason in UNAVAILABLE
            assert error.retry_after_ms
        await all_.back(*CENTERS)
        assert "waits for" not in await all_.alarms()
        for user in (at_a, at_b):
            user.login = await all_.log_in("a", user.identifier)
            assert await all_.balance(user, "a") == 1000
        await all_.verify()


async def test_while_a_center_gets_its_money_back_logins_go_on(mesh: RunningMesh) -> None:
    """Its other stores are well, and what it does not have yet says so."""
    async with people(mesh) as all_:
        user = await all_.user("a")
        await all_.verify()
        async with all_.down("b"):
            async with all_.down("a") as directory:
                delete_transfers(directory)
            user.login = await all_.log_in("a", user.identifier)
            error = await refused(all_.transfer(user, user, 1))
            assert error.reason in UNAVAILABLE
            assert error.retry_after_ms
            told = await all_.alarms()
            assert "does not serve as transfer" in told
            assert "does not serve as account" not in told
        await all_.back(*CENTERS)
        assert await all_.balance(user) == 1000
        await all_.verify()


BY_HAND = {
    "account": "UPDATE account SET request_id = 'by hand' WHERE account_id = ?",
    "transfer": "UPDATE ledger_account SET balance = balance + 1 WHERE account_id = ?",
}


@pytest.mark.parametrize("role", BY_HAND)
async def test_a_copy_changed_by_hand_is_repaired_from_its_owner_and_counted(
    mesh: RunningMesh, role: str
) -> None:
    async with people(mesh) as all_:
        user = await all_.user("a", 500)
        await all_.verify()

        async def repaired() -> int:
            return sum(
                road.repaired
                for road in (await all_.status_of("b")).roads
                if road.topic in ("accounts", "ledger")
            )

        before = await repaired()
        path = all_.state / "b" / "stores" / f"{role}.db"
        with closing(sqlite3.connect(path, timeout=10)) as database, database:
            changed = database.execute(BY_HAND[role], (user.account_id,))
            assert changed.rowcount == 1

        async def is_repaired() -> bool:
            return await repaired() > before

        await eventually(is_repaired, 60)
        assert await repaired() == before + 1
        assert "! center b has repaired" in await all_.alarms()
        await all_.verify()
        log = (all_.state / "b" / "serve.log").read_text()
        assert '"difference": "altered"' in log
        assert user.identifier not in log


async def test_a_restored_backup_says_what_it_has_lost_and_refuses(tmp_path: Path) -> None:
    with running(tmp_path) as mesh:
        async with people(mesh) as all_:
            user, other = await all_.user("a"), await all_.user("b")
            await all_.verify()
            backup = tmp_path / "backup"
            async with all_.down("a") as directory:
                shutil.copytree(directory / "stores", backup)
            await all_.back(*CENTERS)
            user.login = await all_.log_in("a", user.identifier)
            await all_.transfer(user, other, 10)
            await all_.user("a")
            await all_.verify()
            async with all_.down("a") as directory:
                shutil.rmtree(directory / "stores")
                shutil.copytree(backup, directory / "stores")

            async def has_stopped() -> bool:
                told = {one.role: one.doing for one in (await all_.status_of("a")).recoveries}
                return all("has lost entries" in told.get(r, "") for r in ("account", "transfer"))

            await eventually(has_stopped, BACK_WITHIN_S)
            assert "empty disk" in await all_.alarms()
            user.login = await all_.log_in("b", user.identifier)
            for center in CENTERS:
                error = await refused(all_.transfer(user, other, 1, center=center))
                assert error.reason in (*UNAVAILABLE, "RELOGIN_REQUIRED")
            async with all_.down("a"):
                pass
            await eventually(has_stopped, BACK_WITHIN_S)  # for good
            async with all_.down("a") as directory:
                delete_stores(directory)
            await all_.back(*CENTERS)
            user.login = await all_.log_in("a", user.identifier)
            assert await all_.balance(user) == 990
            await all_.transfer(user, other, 1)
            await all_.verify()


async def test_a_center_away_for_too_long_comes_back_by_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it missed is in no log any more, and JetStream has lost it too."""
    monkeypatch.setenv("DUOHUO_LOG_ENTRIES_MAX", "1000")
    with running(tmp_path) as mesh:
        async with people(mesh) as all_:
            user, at_b = await all_.user("a", 10), await all_.user("b")
            await all_.verify()
            async with all_.down("b"):
                queued = await all_.apply(user, at_b, 7, "a")

                async def deposit(count: int) -> None:
                    for _ in range(count):
                        await all_.fund(user.account_id, "a", 1)

                await asyncio.gather(*(deposit(70) for _ in range(16)))

                async def declared() -> bool:
                    logs = (await all_.status_of("a")).logs
                    ledger = next(one for one in logs if one.topic == "ledger")
                    return ledger.snapshot_needed and ledger.kept <= 1000 < ledger.head

                await eventually(declared, BACK_WITHIN_S)
                told = await all_.alarms()
                assert "! center b has been away for too long" in told
                async with all_.down("a") as directory:
                    shutil.rmtree(directory / "nats")
            await all_.back(*CENTERS)

            async def caught_up() -> bool:
                return "away for too long" not in await all_.alarms()

            await eventually(caught_up, BACK_WITHIN_S)
            user.login = await all_.log_in("b", user.identifier)

            async def decided() -> bool:
                found = await all_.application(user, queued.application_id, "a")
                return found.state == APPLICATION_STATE_SUCCEEDED

            await eventually(decided, COPIED_WITHIN_S)
            assert await all_.balance(at_b, "b") == 1007
            assert await all_.balance(user, "b") == 10 + 16 * 70 - 7
            assert '"snapshot installed"' in (all_.state / "b" / "serve.log").read_text()
            await all_.verify()
