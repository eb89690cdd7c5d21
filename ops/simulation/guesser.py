"""GUARD: somebody guesses at a user's password at one center, and one center starts again. After that he
gets in nowhere, not even with the right password; the user, on a device that has logged in before, does
everywhere."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from duohuo.v1.session_service_pb2 import LoginRequest
from ops.simulation.history import History
from ops.simulation.stage import Stage
from ops.simulation.workload import User
from runtime.endpoint import CLIENT, Call
from runtime.errors import RpcError
from runtime.methods import method

GUESSES = 20
HEARD_WITHIN_S = 2.5
TIMEOUT_S = 5.0
ADDRESS = "192.0.2.66"
_LOGIN = method("/duohuo.v1.SessionService/Login")


async def guess(
    stage: Stage,
    users: Sequence[User],
    history: History,
    restart: Callable[[str], Awaitable[None]],
) -> None:
    """To be run while no other fault is made and all copies are complete. `restart` kills a center, starts
    it and waits until it serves."""
    victim = next((user for user in users if _can_tell(user)), None)
    if victim is None:
        return
    await asyncio.sleep(HEARD_WITHIN_S)  # centers that were cut off see each other again
    where = stage.names[victim.number % len(stage.names)]
    wrong = [_login(stage, where, victim, f"guess {number}", "") for number in range(GUESSES)]
    answers = set(await asyncio.gather(*wrong))
    if answers != {"BAD_CREDENTIALS"}:
        history.broken.append(f"GUARD: guesses at {where} were answered {sorted(answers)}")
    await asyncio.sleep(HEARD_WITHIN_S)
    restarted = stage.names[(2 * victim.number + 1) % len(stage.names)]
    await restart(restarted)
    await asyncio.sleep(HEARD_WITHIN_S)
    for center in stage.names:
        for proof, expected in (("", "BAD_CREDENTIALS"), (victim.device_proof, "OK")):
            answer = await _login(stage, center, victim, victim.password, proof)
            if answer != expected:
                device = "the user's device" if proof else "a guesser"
                history.broken.append(
                    f"GUARD: {device} was answered {answer} at {center}, after guesses at {where}"
                    f" and a restart of {restarted}"
                )


def _can_tell(user: User) -> bool:
    """Is it certain what the user's device should be answered?"""
    known = user.device_proof and not user.maybe_passwords
    return bool(known and not user.device_refused)


async def _login(stage: Stage, center: str, victim: User, password: str, proof: str) -> str:
    request = LoginRequest(
        identifier=victim.identifier, password=password, device="guesser", device_proof=proof
    )
    call = Call(_LOGIN, request.SerializeToString(), TIMEOUT_S, {CLIENT: ADDRESS})
    try:
        await stage.gateway(center).unary(call)
    except RpcError as error:
        return error.reason
    return "OK"
