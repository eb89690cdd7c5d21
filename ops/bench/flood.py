"""One user floods a gateway; what does another one notice?

With the limit of a user's calls that is shipped, not that of `duohuo up`; as both have one address here,
that of an address must not count. The flood comes from a process of its own; all share the cores of one
machine, so the other user's calls are also slower for want of processor time.
"""

import asyncio
import json
import sys
from functools import partial

from account_svc.passwords import Argon2Passwords
from account_svc.registry import AccountRow
from duohuo.v1.account_service_pb2 import Account, GetAccountRequest
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from ops import mesh_file
from ops.bench.backlog import Writer
from ops.bench.benchmark import Benchmark, Figures, Setup
from ops.bench.calls import Calls
from ops.bench.catch_up import PASSWORD, verified
from ops.bench.mesh import command_center, running_mesh
from ops.client import Client, Login, Sessions
from ops.output import Failure

HOME, _ = CENTERS = ("a", "b")
SHIPPED = {"DUOHUO_USER_CALLS_PER_S": "100"}
MEASURED_S = 15.0
VERIFIED_WITHIN_S = 60.0


async def run(_case: str, setup: Setup) -> Figures:
    """Calm, then flooded. Raises Failure, RpcError or ControlError."""
    passwords = Argon2Passwords()
    password_hash = await passwords.hash(PASSWORD)
    passwords.close()
    writer = Writer(HOME, CENTERS, setup.directory / HOME / "stores")
    async with running_mesh(setup.directory, CENTERS, setup.port_base, SHIPPED):
        await command_center(setup.directory, "stop", HOME)
        other, flooding = await writer.make_users(2, password_hash)
        await command_center(setup.directory, "start", HOME)
        await verified(setup, VERIFIED_WITHIN_S)
        address = mesh_file.read(setup.directory).centers[HOME].gateway
        client = Client({HOME: address}, Sessions())
        try:
            asked = GetAccountRequest(account_id=other.account_id)
            login = await _logged_in(client, other)
            ask = partial(client.call, "AccountService/GetAccount", asked, Account, login)
            calm, flooded = Calls(ask), Calls(ask)
            await calm.run_for(MEASURED_S)
            setup.tell("the flood begins")
            flood = asyncio.create_task(_flood(address, await _logged_in(client, flooding)))
            await flooded.run_for(MEASURED_S)
            answers = await flood
        finally:
            await client.close()
    return {
        **calm.figures("calm"),
        **flooded.figures("flooded"),
        # A call of the other user that fails ends the run.
        "flood_served_per_s": answers.pop("OK", 0) / MEASURED_S,
        "flood_refused_per_s": sum(answers.values()) / MEASURED_S,
    }


FLOOD = Benchmark("flood", ("one-user",), run)


async def _logged_in(client: Client, user: AccountRow) -> Login:
    request = LoginRequest(identifier=user.identifier, password=PASSWORD, device="bench")
    session = await client.call("SessionService/Login", request, Session)
    return Login(session.account_id, session.token)


async def _flood(address: str, login: Login) -> dict[str, int]:
    """What the flooding process says came of its calls."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "ops.bench.flooder", address, str(MEASURED_S)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate(f"{login.account_id}\n{login.token}\n".encode())
    if process.returncode:
        raise Failure("the flooding process failed")
    answers: dict[str, int] = json.loads(said)
    return answers
