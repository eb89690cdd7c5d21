"""`duohuo drill center-loss`: lose a center on purpose, step by step, and see that the promises hold.

A drill acts on a running mesh through the same doors as everybody: gateways, operators' ports and the
supervisor. It uses users of its own, so it may run on a mesh with data.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from duohuo.v1.account_service_pb2 import (
    Account,
    GetAccountRequest,
    Profile,
    RegisterRequest,
    UpdateProfileRequest,
)
from duohuo.v1.announcement_service_pb2 import ListAnnouncementsRequest, ListAnnouncementsResponse
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    CenterStatus,
    DepositRequest,
    DepositResponse,
    GetStatusRequest,
)
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_QUEUED,
    APPLICATION_STATE_SUCCEEDED,
    TRANSFER_STATE_CREDITED,
    Application,
    ApplyTransferRequest,
    Balance,
    GetApplicationRequest,
    GetBalanceRequest,
    TransferRequest,
    TransferResult,
)
from gateway import ring
from ops import control, mesh_file, verify
from ops.client import Client, Login, Sessions, ask_operator
from ops.output import Failure
from runtime.errors import RpcError
from runtime.ids import RandomIds
from runtime.placement import slot_of
from runtime.signal import Signal

M = TypeVar("M", bound=Message)
PASSWORD = "drill-Passw0rd"  # noqa: S105 - of users that exist for the drill alone
CURRENCY = "CNY"
LOST_WITHIN_S = 10.0
COPIED_WITHIN_S = 10.0
DECIDED_WITHIN_S = 5.0
POLL_INTERVAL_S = 0.05
WHY_MAX = 3


class Broken(Exception):
    """A promise that did not hold; the message says which and how."""


@dataclass(slots=True)
class User:
    """A user of the drill's own."""

    identifier: str
    account_id: str
    login: Login


@dataclass(slots=True)
class Journal:
    """What was done, how long it took, and whether it was as promised."""

    tell: Callable[[str], None]
    steps: list[dict[str, Any]] = field(default_factory=list)
    recovery_ms: int = 0
    """From the moment when what was broken was whole again until all was decided."""

    @asynccontextmanager
    async def step(self, promise: str) -> AsyncIterator[list[str]]:
        """Times the block and notes it under the promise that it checks."""
        notes: list[str] = []
        started = time.monotonic()
        problem = ""
        try:
            yield notes
        except (Broken, RpcError, Failure, control.ControlError, TimeoutError) as error:
            problem = str(error) or "it took too long"
            raise Broken(promise) from error
        finally:
            took_ms = round((time.monotonic() - started) * 1000)
            verdict = "FAIL" if problem else "ok  "
            detail = problem or ", ".join(notes)
            self.tell(f"{verdict} {took_ms:6d} ms  {promise}" + (f"  [{detail}]" if detail else ""))
            self.steps.append(
                {"promise": promise, "ok": not problem, "took_ms": took_ms, "detail": detail}
            )


@dataclass(slots=True)
class Traffic:
    """Calls of users that go on during the whole drill, one after the other."""

    done: int = 0
    failed: int = 0
    why: list[str] = field(default_factory=list)
    """Of the first that failed."""
    slowest_ms: int = 0
    ended: Signal = field(default_factory=Signal)

    async def run(self, call: Callable[[], Awaitable[Any]]) -> None:
        while True:
            started = time.monotonic()
            try:
                await call()
                self.done += 1
            except RpcError as error:
                self.failed += 1
                self.why = [*self.why, str(error)][:WHY_MAX]
                await asyncio.sleep(POLL_INTERVAL_S)
            self.slowest_ms = max(self.slowest_ms, round((time.monotonic() - started) * 1000))
            self.ended.notify()

    async def more(self, count: int, within_s: float) -> None:
        """Until so many more calls have succeeded. Raises TimeoutError."""
        wanted = self.done + count
        async with asyncio.timeout(within_s):
            while self.done < wanted:
                await self.ended.wait(self.ended.next())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a drill has shown."""

    passed: bool
    steps: list[dict[str, Any]]
    recovery_ms: int
    users: dict[str, int]
    """What they saw: calls, failed, slowest_ms."""

    def text(self, name: str) -> str:
        users = self.users
        return (
            f"drill {name}: {'passed' if self.passed else 'FAILED'}; recovered in {self.recovery_ms} ms;"
            f" users: {users['calls']} calls, {users['failed']} failed, slowest {users['slowest_ms']} ms"
        )


class Drill(Protocol):
    """Breaks something, looks, and mends it."""

    journal: Journal
    traffic: Traffic

    async def run(self) -> None:
        """Raises Broken at the first promise that does not hold."""
        ...

    async def restore(self) -> None:
        """Afterwards, however it ended."""
        ...


async def perform(drill: Drill, clients: Iterable[Client]) -> Outcome:
    """Runs a drill to its end, and closes its clients."""
    passed = False
    try:
        await drill.run()
        passed = True
    except Broken:
        pass  # it has been told
    finally:
        await drill.restore()
        for client in clients:
            await client.close()
    traffic = drill.traffic
    users = {
        "calls": traffic.done + traffic.failed,
        "failed": traffic.failed,
        "slowest_ms": traffic.slowest_ms,
    }
    return Outcome(passed, drill.journal.steps, drill.journal.recovery_ms, users)


async def center_loss(state: Path, how: str, tell: Callable[[str], None]) -> Outcome:
    """Loses the first center (`how` is kill or cut) and brings it back."""
    mesh = mesh_file.read(state)
    names = list(mesh.centers)
    await require_usual(state)
    lost, other = names[0], names[1]
    journal = Journal(tell)
    at = {name: Client({name: center.gateway}, Sessions()) for name, center in mesh.centers.items()}
    anywhere = Client({name: mesh.centers[name].gateway for name in names}, Sessions())
    drill = _CenterLoss(state, how, names, lost, other, at[lost], at[other], anywhere, journal)
    return await perform(drill, (*at.values(), anywhere))


@dataclass(slots=True)
class _CenterLoss:
    state: Path
    how: str
    names: Sequence[str]
    lost: str
    other: str
    at_lost: Client
    at_other: Client
    anywhere: Client
    journal: Journal
    traffic: Traffic = field(default_factory=Traffic)

    async def run(self) -> None:
        step = self.journal.step
        async with step("two users, one at home in each center, with money and sessions"):
            payer = await self._user(self.at_lost, self.lost, 1000)
            payee = await self._user(self.at_other, self.other, 1000)
        async with step("a real-time transfer between the centers"):
            sent = await self._transfer(self.at_lost, payer, payee, 10)
            _expect(sent.state == TRANSFER_STATE_CREDITED, "the transfer was not confirmed")
        async with step(f"{self.lost}'s data is at {self.other}"):
            copied = await verify.verify(self.state, COPIED_WITHIN_S)
            _expect(copied.passed, copied.text())
        stream = asyncio.create_task(
            self.traffic.run(partial(log_in, self.at_other, payer.identifier))
        )
        try:
            await self._without(payer, payee)
        finally:
            stream.cancel()
            await asyncio.wait([stream])
        async with step("not one login failed meanwhile") as notes:
            notes.append(f"{self.traffic.done} logins through {self.other}")
            _expect(not self.traffic.failed, f"{self.traffic.failed}: {self.traffic.why}")
            _expect(self.traffic.done > 0, "no login was tried")
        async with step("verify: no money lost, all copies the same") as notes:
            report = await verify.verify(self.state, 20)
            _expect(report.passed, report.text())

    async def _without(self, payer: User, payee: User) -> None:
        step, how = self.journal.step, self.how
        lost, other = self.lost, self.other
        async with step(f"center {lost} is lost ({how}), and {other} notices"):
            await self._lose(how)
            await self._wait(self._is_lost, LOST_WITHIN_S)
        async with step(f"a session made at {lost} must be renewed at {other}, and can be"):
            await refused(self._account(self.at_other, payer, payer.login), "RELOGIN_REQUIRED")
            payer.login = await log_in(self.at_other, payer.identifier)
            await self._account(self.at_other, payer, payer.login)
        if how == "kill":
            async with step("a client that knows both gateways simply goes on"):
                await self._account(self.anywhere, payer, payer.login)
                _expect(self.anywhere.served_by == other, "somebody else answered")
        async with step(f"registration works for identifiers of {other}"):
            await self._register(self.at_other, other)
        async with step(f"registration for identifiers of {lost} is refused, with a retry time"):
            error = await refused(self._register(self.at_other, lost), "HOME_CENTER_UNAVAILABLE")
            _expect(error.retry_after_ms is not None, "no RetryInfo")
            _expect(not error.ran, "it is said that it may have run")
        async with step(f"a user of {lost} edits the profile"):
            await self._rename(payer, "Edited during the outage")
        async with step(f"a user of {lost} reads the balance from the copy, marked stale"):
            balance = await self.at_other.call(
                "TransferService/GetBalance",
                GetBalanceRequest(account_id=payer.account_id),
                Balance,
                payer.login,
            )
            _expect(balance.stale and balance.balance.minor_units == 990, str(balance))
        async with step("a real-time transfer is refused, and names ApplyTransfer"):
            error = await refused(
                self._transfer(self.at_other, payer, payee, 10), "HOME_CENTER_UNAVAILABLE"
            )
            _expect("ApplyTransfer" in error.advice, error.advice)
        async with step("applications are accepted, stay queued, and say why"):
            covered = await self._apply(payer, payee, 400)
            uncovered = await self._apply(payer, payee, 5000)
            for application in (covered, uncovered):
                await self._wait(partial(self._says_why, payer, application), 10)
        async with step("the outage is announced"):
            listed = await self.at_other.call(
                "AnnouncementService/ListAnnouncements",
                ListAnnouncementsRequest(),
                ListAnnouncementsResponse,
            )
            _expect(any(one.center == lost for one in listed.announcements), "it is not")
            _expect([one.center for one in error.announcements] == [lost], "not in the refusal")
        restored = time.monotonic()
        async with step(f"center {lost} is back"):
            await self.restore()
        async with step("within 5 s: the covered application SUCCEEDED") as notes:
            done = await self._decided(payer, covered)
            _expect(done.state == APPLICATION_STATE_SUCCEEDED, str(done))
            notes.append(f"{done.attempts} attempts")
        async with step("and the other one FAILED with INSUFFICIENT_FUNDS") as notes:
            done = await self._decided(payer, uncovered)
            _expect(done.state == APPLICATION_STATE_FAILED, str(done))
            _expect(done.reason == "INSUFFICIENT_FUNDS", str(done))
            notes.append(f"{done.attempts} attempts")
        self.journal.recovery_ms = round((time.monotonic() - restored) * 1000)
        async with step(f"the edit made at {other} is at {lost}"):
            await self._wait(lambda: self._is_renamed(payer), COPIED_WITHIN_S)

    async def restore(self) -> None:
        """Brings the center and the link back, whatever was done to them."""
        mesh = mesh_file.read(self.state)
        if mesh.centers[self.lost].state != "running":
            await asyncio.to_thread(control.request, mesh, "center start", center=self.lost)
        for name in self.names:
            if (
                name != self.lost
                and mesh.links[mesh_file.link_name(self.lost, name)].state == "cut"
            ):
                await asyncio.to_thread(
                    control.request, mesh, "link heal", first=self.lost, second=name
                )

    async def _lose(self, how: str) -> None:
        mesh = mesh_file.read(self.state)
        if how == "kill":
            await asyncio.to_thread(control.request, mesh, "center kill", center=self.lost)
            return
        for name in self.names:
            if name != self.lost:
                await asyncio.to_thread(
                    control.request, mesh, "link cut", first=self.lost, second=name
                )

    async def _wait(self, condition: Callable[[], Awaitable[bool]], within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not await _holds(condition):  # noqa: ASYNC110 - it asks another process
                await asyncio.sleep(POLL_INTERVAL_S)

    async def _status(self) -> CenterStatus:
        return await ask_operator(
            self.state, self.other, "GetStatus", GetStatusRequest(), CenterStatus
        )

    async def _is_lost(self) -> bool:
        peers = (await self._status()).peers
        return any(peer.center == self.lost and not peer.reachable for peer in peers)

    async def _is_renamed(self, user: User) -> bool:
        account = await self._account(self.at_lost, user, user.login)
        return account.profile.display_name == "Edited during the outage"

    async def _says_why(self, user: User, application: Application) -> bool:
        found = await self._application(user, application)
        _expect(found.state == APPLICATION_STATE_QUEUED, str(found))
        return found.last_attempt_error == "CENTER_UNREACHABLE"

    async def _decided(self, user: User, application: Application) -> Application:
        async with asyncio.timeout(DECIDED_WITHIN_S):
            while True:
                found = await self._application(user, application)
                if found.HasField("decide_time"):
                    return found
                await asyncio.sleep(POLL_INTERVAL_S)

    async def _application(self, user: User, application: Application) -> Application:
        return await self.at_other.call(
            "TransferService/GetApplication",
            GetApplicationRequest(application_id=application.application_id),
            Application,
            user.login,
        )

    async def _user(self, client: Client, home: str, money: int) -> User:
        account = await self._register(client, home)
        identifier = account.identifiers[0]
        deposit = DepositRequest(
            deposit_id=RandomIds().unique(),
            user=account.account_id,
            amount=Money(currency_code=CURRENCY, minor_units=money),
        )
        await ask_operator(self.state, home, "Deposit", deposit, DepositResponse)
        return User(identifier, account.account_id, await log_in(client, identifier))

    async def _register(self, client: Client, home: str) -> Account:
        request = RegisterRequest(
            identifier=identifier_of(home, self.names),
            password=PASSWORD,
            request_id=RandomIds().unique(),
        )
        return await client.call("AccountService/Register", request, Account)

    async def _account(self, client: Client, user: User, login: Login) -> Account:
        request = GetAccountRequest(account_id=user.account_id)
        return await client.call("AccountService/GetAccount", request, Account, login)

    async def _rename(self, user: User, name: str) -> None:
        request = UpdateProfileRequest(
            account_id=user.account_id,
            profile=Profile(display_name=name),
            update_mask=FieldMask(paths=["display_name"]),
            request_id=RandomIds().unique(),
        )
        await self.at_other.call("AccountService/UpdateProfile", request, Account, user.login)

    async def _transfer(
        self, client: Client, payer: User, payee: User, amount: int
    ) -> TransferResult:
        request = TransferRequest(
            transfer_id=RandomIds().unique(),
            payer_account_id=payer.account_id,
            payee_account_id=payee.account_id,
            amount=Money(currency_code=CURRENCY, minor_units=amount),
        )
        return await client.call("TransferService/Transfer", request, TransferResult, payer.login)

    async def _apply(self, payer: User, payee: User, amount: int) -> Application:
        request = ApplyTransferRequest(
            transfer_id=RandomIds().unique(),
            payer_account_id=payer.account_id,
            payee_account_id=payee.account_id,
            amount=Money(currency_code=CURRENCY, minor_units=amount),
        )
        path = "TransferService/ApplyTransfer"
        return await self.at_other.call(path, request, Application, payer.login)


async def _holds(condition: Callable[[], Awaitable[bool]]) -> bool:
    """Does it hold now? A center that has just come back may not be connected to again yet."""
    try:
        return await condition()
    except RpcError as error:
        if error.reason != "CENTER_UNREACHABLE":
            raise
        return False


async def log_in(client: Client, identifier: str) -> Login:
    request = LoginRequest(identifier=identifier, password=PASSWORD, device="drill")
    session = await client.call("SessionService/Login", request, Session)
    return Login(session.account_id, session.token)


async def refused(call: Awaitable[Any], reason: str) -> RpcError:
    """The error of a call that must be refused for this reason."""
    try:
        await call
    except RpcError as error:
        _expect(error.reason == reason, f"refused, but as {error}")
        return error
    raise Broken(f"it was not refused as {reason}")


async def require_usual(state: Path) -> None:
    """Raises Failure unless all centers run, and every slot is where it is without an operator's doing."""
    mesh = mesh_file.read(state)
    names = list(mesh.centers)
    if len(names) < 2 or any(center.state != "running" for center in mesh.centers.values()):
        raise Failure("this drill needs a mesh of at least two centers, all of them running")
    first = ring.compute(dict.fromkeys(names, 1), 1)
    for name in names:
        status = await ask_operator(state, name, "GetStatus", GetStatusRequest(), CenterStatus)
        if status.draining or status.slots != first.slots_of(name):
            raise Failure(
                f"this drill needs the slots where they are usually, and center {name} is drained or has"
                " others",
                advice=f"Try: duohuo route undrain {name}",
            )


def identifier_of(home: str, centers: Sequence[str]) -> str:
    """A new identifier whose home is this center, as long as no slot has moved."""
    placement = ring.compute(dict.fromkeys(centers, 1), 1)
    while True:
        identifier = f"drill-{RandomIds().unique()}@example.com"
        if placement.home(slot_of(identifier)) == home:
            return identifier


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Broken(otherwise)
