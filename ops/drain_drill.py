"""`duohuo drill drain`: empty a center, stop and start it, and fill it again, and nobody notices.

This is how a whole center is maintained or replaced. Its users pay all the time, through the gateways of
the other centers, as a load balancer would have it that asks the drained one's health.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from duohuo.v1.account_service_pb2 import Account, RegisterRequest
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    CenterStatus,
    DepositRequest,
    DepositResponse,
    GetPlacementRequest,
    GetStatusRequest,
    PlacementView,
    SetDrainingRequest,
    SetDrainingResponse,
)
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from duohuo.v1.transfer_service_pb2 import TransferRequest, TransferResult
from ops import control, mesh_file, slot_plan, verify
from ops.client import Client, Sessions, ask_operator
from ops.drill import (
    CURRENCY,
    PASSWORD,
    Broken,
    Journal,
    Outcome,
    Traffic,
    User,
    identifier_of,
    log_in,
    perform,
    require_usual,
)
from ops.slot_plan import Step
from runtime.ids import RandomIds

MONEY = 1_000_000
PAYMENTS_WITHOUT = 100
"""So many are made while the center is stopped."""
WITHIN_S = 60.0


async def drain(state: Path, tell: Callable[[str], None]) -> Outcome:
    """Does it with the first center."""
    mesh = mesh_file.read(state)
    names = list(mesh.centers)
    await require_usual(state)
    drained, *others = names
    journal = Journal(tell)
    elsewhere = Client({name: mesh.centers[name].gateway for name in others}, Sessions())
    there = Client({drained: mesh.centers[drained].gateway}, Sessions())
    drill = _Drain(state, names, drained, elsewhere, there, journal)
    return await perform(drill, (elsewhere, there))


@dataclass(slots=True)
class _Drain:
    state: Path
    names: Sequence[str]
    drained: str
    elsewhere: Client
    there: Client
    journal: Journal
    traffic: Traffic = field(default_factory=Traffic)

    async def run(self) -> None:
        step, drained = self.journal.step, self.drained
        async with step("a user of each center, with money, logged in elsewhere"):
            users = [await self._user(name) for name in self.names]
        payments = asyncio.create_task(self.traffic.run(self._payment(users)))
        try:
            async with step(f"all slots of {drained} go to other centers") as notes:
                await self._set_draining(draining=True)
                notes.append(f"{await self._move(self._away)} slots")
            async with step(f"who logs in at {drained} gets a session of another center"):
                _expect(await self._origin(users[0]) != drained, "it made the session itself")
            async with step(f"center {drained} is stopped, and its users go on") as notes:
                await self._control("center stop")
                await self.traffic.more(PAYMENTS_WITHOUT, WITHIN_S)
                notes.append(f"{PAYMENTS_WITHOUT} payments meanwhile")
            restored = time.monotonic()
            async with step(f"center {drained} starts again, and is still drained"):
                await self._control("center start")
                _expect((await self._status()).draining, "it takes everything again")
            async with step(f"{drained} gets its slots back") as notes:
                await self._set_draining(draining=False)
                notes.append(f"{await self._move(self._back)} slots")
            self.journal.recovery_ms = round((time.monotonic() - restored) * 1000)
            async with step("and makes sessions again"):
                _expect(await self._origin(users[0]) == drained, "it does not")
                await self.traffic.more(1, WITHIN_S)
        finally:
            payments.cancel()
            await asyncio.wait([payments])
        async with step("not one payment failed") as notes:
            notes.append(f"{self.traffic.done} payments, slowest {self.traffic.slowest_ms} ms")
            _expect(not self.traffic.failed, f"{self.traffic.failed} did: {self.traffic.why}")
        async with step("verify: no money lost, all copies the same"):
            report = await verify.verify(self.state, WITHIN_S)
            _expect(report.passed, report.text())

    async def restore(self) -> None:
        """Starts the center, whatever was done to it. Its slots stay where they are."""
        if mesh_file.read(self.state).centers[self.drained].state != "running":
            await self._control("center start")

    async def _user(self, home: str) -> User:
        identifier = identifier_of(home, self.names)
        request = RegisterRequest(
            identifier=identifier, password=PASSWORD, request_id=RandomIds().unique()
        )
        account = await self.elsewhere.call("AccountService/Register", request, Account)
        deposit = DepositRequest(
            deposit_id=RandomIds().unique(),
            user=account.account_id,
            amount=Money(currency_code=CURRENCY, minor_units=MONEY),
        )
        await ask_operator(self.state, home, "Deposit", deposit, DepositResponse)
        return User(identifier, account.account_id, await log_in(self.elsewhere, identifier))

    def _payment(self, users: Sequence[User]) -> Callable[[], "asyncio.Future[TransferResult]"]:
        """Each pays the next one in turn."""
        turn = 0

        def pay() -> "asyncio.Future[TransferResult]":
            nonlocal turn
            turn += 1
            payer, payee = users[turn % len(users)], users[(turn + 1) % len(users)]
            request = TransferRequest(
                transfer_id=RandomIds().unique(),
                payer_account_id=payer.account_id,
                payee_account_id=payee.account_id,
                amount=Money(currency_code=CURRENCY, minor_units=1),
            )
            called = self.elsewhere.call(
                "TransferService/Transfer", request, TransferResult, payer.login
            )
            return asyncio.ensure_future(called)

        return pay

    async def _origin(self, user: User) -> str:
        """Which center makes a session for whoever logs in at the drained one's gateway."""
        request = LoginRequest(identifier=user.identifier, password=PASSWORD, device="drill")
        return (await self.there.call("SessionService/Login", request, Session)).origin_center

    async def _set_draining(self, *, draining: bool) -> None:
        request = SetDrainingRequest(draining=draining)
        await ask_operator(self.state, self.drained, "SetDraining", request, SetDrainingResponse)

    async def _move(self, planned: Callable[[PlacementView], list[Step]]) -> int:
        asked = GetPlacementRequest()
        view = await ask_operator(self.state, self.drained, "GetPlacement", asked, PlacementView)
        done = await slot_plan.execute(self.state, planned(view), None)
        _expect(not done.failed, f"{len(done.failed)} could not be moved: {done.failed[:1]}")
        return done.moved

    def _away(self, view: PlacementView) -> list[Step]:
        return slot_plan.drain(view, self.drained, self.names)

    def _back(self, view: PlacementView) -> list[Step]:
        steps = slot_plan.spread(view, dict.fromkeys(self.names, 1))
        return [step for step in steps if step.to == self.drained]

    async def _control(self, action: str) -> None:
        mesh = mesh_file.read(self.state)
        await asyncio.to_thread(control.request, mesh, action, center=self.drained)

    async def _status(self) -> CenterStatus:
        return await ask_operator(
            self.state, self.drained, "GetStatus", GetStatusRequest(), CenterStatus
        )


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Broken(otherwise)
