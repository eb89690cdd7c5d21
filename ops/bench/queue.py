"""The queue: many applications wait for a home that is away; what do others notice, and how fast is it
worked off when home is back?

Three real centers on one machine: applications wait at b for users of a, which is stopped, and meanwhile
a user of c applies at b too, again and again. Then a is started, and watched for at most two minutes. Each
payer's applications must have been decided in their order, and if all were, `duohuo verify` must pass.
"""

import asyncio
import sqlite3
import time
from itertools import pairwise

from account_svc.passwords import Argon2Passwords
from account_svc.registry import AccountRow
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import CenterStatus, GetStatusRequest
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_SUCCEEDED,
    Application,
    ApplyTransferRequest,
    WatchApplicationsRequest,
)
from ops import mesh_file
from ops.bench.backlog import CURRENCY, Writer
from ops.bench.benchmark import Benchmark, Figures, Setup
from ops.bench.calls import Calls
from ops.bench.catch_up import PASSWORD, verified
from ops.bench.mesh import command_center, processor_s, running_mesh
from ops.client import Client, Login, Sessions, ask_operator
from ops.output import Failure
from runtime.errors import RpcError
from runtime.ids import RandomIds

DEAD, ORIGIN, LIVE = CENTERS = ("a", "b", "c")
PAYERS = 1000
MEASURED_S = 15.0
DRAIN_MEASURED_S_MAX = 120.0
STUCK_AFTER_S = 60.0
VERIFIED_WITHIN_S = 120.0
POLL_INTERVAL_S = 0.1
COUNT_INTERVAL_S = 1.0
"""The origin counts all that is open for this: tens of milliseconds for 100,000."""
PAUSE_S = 0.2
TELL_INTERVAL_S = 5.0


async def run(_case: str, setup: Setup) -> Figures:
    """One outage with a full queue. Raises Failure, RpcError or ControlError."""
    writers = {name: Writer(name, CENTERS, setup.directory / name / "stores") for name in CENTERS}
    passwords = Argon2Passwords()
    password_hash = await passwords.hash(PASSWORD)
    passwords.close()
    async with running_mesh(setup.directory, CENTERS, setup.port_base):
        users = {}
        for name, count in ((DEAD, PAYERS), (LIVE, 2)):
            setup.tell(f"making {count} users at {name}")
            await command_center(setup.directory, "stop", name)
            users[name] = await writers[name].make_users(count, password_hash)
            await command_center(setup.directory, "start", name)
        await verified(setup, VERIFIED_WITHIN_S)
        mesh = mesh_file.read(setup.directory)
        client = Client({ORIGIN: mesh.centers[ORIGIN].gateway}, Sessions())
        try:
            user = LiveUser(client, *users[LIVE])
            empty, away, draining = (Calls(user.apply, pause_s=PAUSE_S) for _ in range(3))
            await user.log_in()
            await user.run_for(empty, MEASURED_S)
            await command_center(setup.directory, "stop", DEAD)
            await _fill(writers[ORIGIN], users[DEAD], setup)
            await user.log_in()  # its session has ended with the origin's process
            figures = await _while_away(user, away, setup)
            figures |= await _drain(user, draining, setup)
        finally:
            await client.close()
        if figures["decided_percent"] == 100:  # else the copies are still on their way
            setup.tell("verify")
            await verified(setup, VERIFIED_WITHIN_S)
    _require_order(setup)
    for calls, when in ((empty, "empty"), (away, "away"), (draining, "draining")):
        figures |= calls.figures(when)
    return figures


QUEUE = Benchmark("queue", ("applications",), run)


class LiveUser:
    """A user of the living center, logged in at the origin, who watches what becomes of applications."""

    def __init__(self, client: Client, payer: AccountRow, payee: AccountRow) -> None:
        self._client = client
        self._payer = payer
        self._payee = payee
        self._login: Login | None = None
        self._decided: dict[str, asyncio.Future[Application]] = {}

    async def log_in(self) -> None:
        request = LoginRequest(identifier=self._payer.identifier, password=PASSWORD, device="bench")
        session = await self._client.call("SessionService/Login", request, Session)
        self._login = Login(session.account_id, session.token)

    async def watch(self) -> None:
        """Follows the applications until cancelled."""
        request = WatchApplicationsRequest(payer_account_id=self._payer.account_id)
        async for found in self._client.stream(
            "TransferService/WatchApplications", request, Application, self._login
        ):
            if found.HasField("decide_time") and found.transfer_id in self._decided:
                self._decided.pop(found.transfer_id).set_result(found)

    async def apply(self) -> None:
        """Applies for a transfer, and waits until it is decided."""
        request = ApplyTransferRequest(
            transfer_id=RandomIds().unique(),
            payer_account_id=self._payer.account_id,
            payee_account_id=self._payee.account_id,
            amount=Money(currency_code=CURRENCY, minor_units=1),
        )
        decided = asyncio.get_running_loop().create_future()
        self._decided[request.transfer_id] = decided
        await self._client.call("TransferService/ApplyTransfer", request, Application, self._login)
        found = await decided
        if found.state != APPLICATION_STATE_SUCCEEDED:
            raise Failure(f"an application ended as {found}")

    async def run_for(self, calls: Calls, duration_s: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self.watch())
            await calls.run_for(duration_s)
            watching.cancel()


async def _fill(writer: Writer, payers: list[AccountRow], setup: Setup) -> None:
    """The origin accepts all of them, and the living center has copies of them."""
    setup.tell(f"{setup.entries} applications for {DEAD} are accepted at {ORIGIN}")
    await command_center(setup.directory, "stop", ORIGIN)
    await writer.apply(payers, setup.entries, DEAD)
    head = (await writer.heads())["applications"]
    await command_center(setup.directory, "start", ORIGIN)
    setup.tell(f"waiting until {LIVE} has copied them")
    moved_s, before = time.monotonic(), -1
    while before < head:
        status = await _status(setup, LIVE)
        cursors = [
            road.cursor
            for road in (status.roads if status else ())
            if (road.source_center, road.topic) == (ORIGIN, "applications")
        ]
        if cursors and cursors[0] > before:
            moved_s, before = time.monotonic(), cursors[0]
        _require_progress(moved_s)
        await asyncio.sleep(POLL_INTERVAL_S)


async def _while_away(user: LiveUser, calls: Calls, setup: Setup) -> dict[str, float]:
    """What the queue costs while nobody can work it off."""
    setup.tell(f"{LIVE}'s user applies for {MEASURED_S:.0f} s while {DEAD} is away")
    pid = mesh_file.read(setup.directory).centers[ORIGIN].pids["serve"]
    await user.run_for(calls, MEASURED_S)
    before, started_s = processor_s(pid), time.monotonic()
    await asyncio.sleep(MEASURED_S)  # only the queue, and what a center does anyway
    used = processor_s(pid)
    if before is None or used is None:
        return {}
    return {"idle_processor_percent": 100 * (used - before) / (time.monotonic() - started_s)}


async def _drain(user: LiveUser, calls: Calls, setup: Setup) -> dict[str, float]:
    """Home is back: until its first decision, and until its last, but not for ever."""
    setup.tell(f"starting {DEAD}")
    first_s: float | None = None
    async with asyncio.TaskGroup() as tasks:
        live = [tasks.create_task(user.watch()), tasks.create_task(calls.run())]
        await command_center(setup.directory, "start", DEAD)
        used_s = _processor_s(setup)
        back_s = moved_s = told_s = time.monotonic()
        left = setup.entries
        while left > 0 and time.monotonic() - back_s < DRAIN_MEASURED_S_MAX:
            status = await _status(setup, ORIGIN)
            now_s = time.monotonic()
            # The live user's own one may be among them.
            still = max(0, status.counts["applications_open"] - 1) if status else left
            if still < left:
                moved_s, left = now_s, still
                first_s = first_s or now_s
            _require_progress(moved_s)
            if now_s - told_s > TELL_INTERVAL_S:
                told_s = now_s
                setup.tell(f"{left} of {setup.entries} left after {now_s - back_s:.0f} s")
            await asyncio.sleep(COUNT_INTERVAL_S)
        for task in live:
            task.cancel()
    if first_s is None:
        raise Failure("nothing was decided")
    decided, took_s = setup.entries - left, moved_s - back_s
    return {
        "processor_us_per_decision": (_processor_s(setup) - used_s) * 1e6 / decided,
        "first_decided_s": first_s - back_s,
        "decided_per_s": decided / max(took_s, 0.001),
        "decided_percent": 100 * decided / setup.entries,
    }


def _require_order(setup: Setup) -> None:
    """Raises Failure unless each payer's applications were decided in the order of their ids."""
    path = (setup.directory / DEAD / "stores" / "transfer.db").absolute()
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as books:
        rows = books.execute(
            "SELECT account_id, transfer_id FROM entry WHERE minor_units < 0"
            " AND transfer_id LIKE 'queue-%' AND account_id NOT LIKE '%.%' ORDER BY account_id, number"
        ).fetchall()
    if any(one > other for one, other in pairwise(rows)):
        raise Failure("a payer's applications were not decided in their order")


def _processor_s(setup: Setup) -> float:
    """Processor time that all centers' processes have used so far."""
    centers = mesh_file.read(setup.directory).centers.values()
    return sum(processor_s(center.pids["serve"]) or 0.0 for center in centers)


async def _status(setup: Setup, center: str) -> CenterStatus | None:
    try:
        status = await ask_operator(
            setup.directory, center, "GetStatus", GetStatusRequest(), CenterStatus, timeout_s=5.0
        )
    except RpcError:
        return None
    return None if status.silent_roles else status


def _require_progress(moved_s: float) -> None:
    if time.monotonic() - moved_s > STUCK_AFTER_S:
        raise Failure(f"nothing has moved for {STUCK_AFTER_S:.0f} s")
