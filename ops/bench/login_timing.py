"""Can somebody learn from the time of an answer whether a user exists, or is locked?

One after the other, in random order: logins of unknown users, wrong passwords of known users, and the right
password of a user who is locked because somebody has guessed. Each pair is compared by a Kolmogorov-Smirnov
test: a small p would say that the times differ.
"""

import math
import time
from collections.abc import Sequence
from itertools import combinations
from random import Random

from account_svc.passwords import Argon2Passwords
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from ops import mesh_file
from ops.bench.backlog import Writer
from ops.bench.benchmark import Benchmark, Figures, Setup, percentile
from ops.bench.catch_up import PASSWORD, verified
from ops.bench.mesh import command_center, running_mesh
from ops.client import Client, Sessions
from ops.drill import identifier_of
from ops.output import Failure
from runtime.errors import RpcError

HOME, _ = CENTERS = ("a", "b")
CALLS_MAX = 1000
"""Of each kind. Each is made twice, and the second one is measured: what a process keeps in memory of an
identifier that was used lately must not tell the kinds apart."""
LOCKED_MAX = 200
"""Users that are locked one after the other."""
CALLS_PER_USER = 2
"""Twice as many logins must not lock a user."""
LOCKING_GUESSES = 5
LOCKED_FOR_S = 15.0
"""Well below the first wait."""
VERIFIED_WITHIN_S = 60.0
TELL_EVERY = 500


async def run(_case: str, setup: Setup) -> Figures:
    """All three kinds in one. Raises Failure, RpcError or ControlError."""
    calls = min(setup.entries, CALLS_MAX)
    passwords = Argon2Passwords()
    password_hash = await passwords.hash(PASSWORD)
    passwords.close()
    writer = Writer(HOME, CENTERS, setup.directory / HOME / "stores")
    async with running_mesh(setup.directory, CENTERS, setup.port_base):
        await command_center(setup.directory, "stop", HOME)
        users = await writer.make_users(calls // CALLS_PER_USER + 1 + LOCKED_MAX, password_hash)
        await command_center(setup.directory, "start", HOME)
        await verified(setup, VERIFIED_WITHIN_S)
        known, victims = users[:-LOCKED_MAX], iter(users[-LOCKED_MAX:])
        unknown = [identifier_of(HOME, CENTERS) for _ in known]
        client = Client({HOME: mesh_file.read(setup.directory).centers[HOME].gateway}, Sessions())
        try:
            tries = [
                *(("unknown", unknown[n // CALLS_PER_USER], "wrong") for n in range(calls)),
                *(("wrong", known[n // CALLS_PER_USER].identifier, "wrong") for n in range(calls)),
                *(("locked", "", PASSWORD) for _ in range(calls)),
            ]
            locked, locked_s = "", -LOCKED_FOR_S
            Random(0).shuffle(tries)  # noqa: S311 - any order will do
            took_ms: dict[str, list[float]] = {"unknown": [], "wrong": [], "locked": []}
            for number, (kind, identifier, password) in enumerate(tries):
                if time.monotonic() - locked_s >= LOCKED_FOR_S:
                    locked, locked_s = next(victims).identifier, time.monotonic()
                    for _ in range(LOCKING_GUESSES):
                        await _refused_ms(client, locked, "wrong")
                await _refused_ms(client, identifier or locked, password)
                took_ms[kind].append(await _refused_ms(client, identifier or locked, password))
                if number % TELL_EVERY == 0:
                    setup.tell(f"{number} of {len(tries)} logins")
        finally:
            await client.close()
    figures = {f"p50_{kind}_ms": percentile(values, 50) for kind, values in took_ms.items()}
    for one, other in combinations(took_ms, 2):
        figures[f"ks_p_{one}_{other}"] = ks_p(took_ms[one], took_ms[other])
    return figures


LOGIN_TIMING = Benchmark("login-timing", ("refused",), run)


async def _refused_ms(client: Client, identifier: str, password: str) -> float:
    request = LoginRequest(identifier=identifier, password=password, device="bench")
    started = time.perf_counter()
    try:
        await client.call("SessionService/Login", request, Session)
    except RpcError as error:
        if error.reason != "BAD_CREDENTIALS":
            raise
        return (time.perf_counter() - started) * 1000
    raise Failure("a login went through that had to be refused")


def ks_p(one: Sequence[float], other: Sequence[float]) -> float:
    """How likely two samples of one distribution differ at least so much: the two-sample
    Kolmogorov-Smirnov test, asymptotic (Press et al., Numerical Recipes, 3rd edition, 14.3.3)."""
    apart, i, j = 0.0, 0, 0
    left, right = sorted(one), sorted(other)
    while i < len(left) and j < len(right):
        at = min(left[i], right[j])
        while i < len(left) and left[i] == at:
            i += 1
        while j < len(right) and right[j] == at:
            j += 1
        apart = max(apart, abs(i / len(left) - j / len(right)))
    size = math.sqrt(len(left) * len(right) / (len(left) + len(right)))
    scaled = (size + 0.12 + 0.11 / size) * apart
    if scaled < 0.2:
        return 1.0
    terms = (math.exp(-2 * k * k * scaled * scaled) * (1 if k % 2 else -1) for k in range(1, 101))
    return min(1.0, 2 * sum(terms))
