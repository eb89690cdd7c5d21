"""One seed, from start to verdict; and many seeds, on all cores."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import TimeoutError as Overdue
from multiprocessing import get_context
from pathlib import Path

import structlog

from ops import verify
from ops.simulation import checks, guesser, leavers, operators
from ops.simulation.faults import Nemesis
from ops.simulation.history import History, Outcome
from ops.simulation.loop import Incarnation, SimulatedLoop
from ops.simulation.workload import Workload
from ops.simulation.world import World

USERS = 6
CHECK_INTERVAL_S = 5.0
SETTLE_S_MAX = 300.0
"""Within so much simulated time after the last fault all is the same everywhere and decided."""
TIMELINE_LINES = 60
SEED_S_MAX = 120.0
"""A seed that takes longer than this, and this again for each simulated minute, is stuck."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What to simulate, besides the seed."""

    centers: int = 3
    minutes: float = 1.0


@dataclass(slots=True)
class Result:
    """What one seed showed."""

    seed: int
    broken: list[str]
    digest: str
    simulated_s: float
    settled_s: float
    took_s: float
    operations: dict[str, int]
    reached: dict[str, int]
    timeline: list[str] = field(default_factory=list)


def run_seed(seed: int, setup: Setup) -> Result:
    """Runs one seed in this thread."""
    logged = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started = time.perf_counter()
    directory = Path(tempfile.mkdtemp(prefix="duohuo-simulate-", dir=_memory()))
    loop = SimulatedLoop(str(seed))
    asyncio.set_event_loop(loop)
    try:
        history = History()
        world = World(str(seed), [chr(97 + i) for i in range(setup.centers)], loop, directory)
        workload = Workload(world, history, str(seed), USERS)
        settled_s = loop.run(_scenario(world, workload, history, setup))
        broken = list(dict.fromkeys(history.broken))
        return Result(
            seed,
            broken,
            loop.digest,
            loop.time(),
            settled_s,
            time.perf_counter() - started,
            {
                outcome.value: sum(1 for one in history.operations if one.outcome is outcome)
                for outcome in Outcome
            },
            world.network.counts,
            history.timeline() if broken else [],
        )
    finally:
        for center in world.centers.values():
            center.disk.crash()
        asyncio.set_event_loop(None)
        structlog.configure(**logged)
        shutil.rmtree(directory, ignore_errors=True)


def run_seeds(seeds: range, setup: Setup, processes: int) -> Iterator[Result]:
    """Runs many seeds, in as many processes, and yields results in order.

    Raises: `RuntimeError` for a seed that does not end.
    """
    # Spawned, not forked: a fork of a process that has used gRPC may never run.
    with get_context("spawn").Pool(processes) as pool:
        results = pool.imap(partial(run_seed, setup=setup), seeds)
        for seed in seeds:
            try:
                yield results.next(SEED_S_MAX * (1 + setup.minutes))
            except Overdue:
                raise RuntimeError(f"seed {seed} does not end, or its process was killed") from None


async def _scenario(world: World, workload: Workload, history: History, setup: Setup) -> float:
    """Users and faults, then healing; returns how long it took to settle."""
    for name in world.centers:
        world.start(name)
    await asyncio.sleep(1)
    until_s = world.loop.time() + setup.minutes * 60
    clients = Incarnation(world.loop, "clients")
    nemesis = Nemesis(world, history)
    async with asyncio.TaskGroup() as tasks:
        checking = tasks.create_task(_check_for_ever(world, history))
        users = [clients.spawn(workload.run(user, until_s)) for user in workload.users]
        users.append(clients.spawn(operators.freeze(workload, until_s)))
        if world.may_move:
            users.append(clients.spawn(operators.move(workload, until_s)))
        users.append(clients.spawn(operators.drain(workload, until_s)))
        users.append(clients.spawn(operators.announce(workload, until_s)))
        users.append(clients.spawn(leavers.come_and_go(workload, until_s)))
        await nemesis.run(until_s)
        healed_s = world.loop.time()
        await asyncio.wait(users, timeout=SETTLE_S_MAX)
        for user in users:
            if user.done():
                user.result()
            elif user.cancel():
                history.broken.append(f"CONVERGE: a user still tries: {history.operations[-1]}")
        await _settle(world, history)
        await guesser.guess(world, workload.users, history, partial(_restart, world, history))
        checking.cancel()
    history.broken += checks.after(world, workload.users, history)
    history.broken += checks.notified(world, workload.users, history, world.receivers)
    history.broken += [f"CRASH: {crash}" for crash in world.crashes]
    history.broken += [f"ESCAPED: {escaped}" for escaped in world.loop.escaped]
    return world.loop.time() - healed_s


async def _restart(world: World, history: History, name: str) -> None:
    """Kills a center, starts it, and waits until it serves."""
    world.kill(name)
    world.start(name)
    for _ in range(int(SETTLE_S_MAX / CHECK_INTERVAL_S)):
        if world.undisturbed(name) is not None:
            return
        await asyncio.sleep(CHECK_INTERVAL_S)
    history.broken.append(f"LOGIN: {name} was started again and does not serve")


async def _check_for_ever(world: World, history: History) -> None:
    while True:
        await asyncio.sleep(CHECK_INTERVAL_S)
        history.broken += checks.during(world)


async def _settle(world: World, history: History) -> None:
    """CONVERGE: waits until all centers agree and nothing is open, no application and no hold."""
    deadline_s = world.loop.time() + SETTLE_S_MAX
    names = list(world.centers)
    while True:
        report = verify.judge(await world.facts(), names)
        still_open = checks.still_open(world)
        still_open += [
            f"a hold at {name}"
            for name, center in world.centers.items()
            if center.disk.rows("transfer", "SELECT 1 FROM hold WHERE state = 2")
        ]
        still_open += [
            f"sessions that are to end at {name}"
            for name, center in world.centers.items()
            if center.disk.rows("account", "SELECT 1 FROM revocation_due")
        ]
        if report.passed and not still_open:
            break
        if world.loop.time() > deadline_s:
            history.broken.append(f"CONVERGE: {still_open} still open; {report.text()}")
            break
        await asyncio.sleep(1)
    for name, center in world.centers.items():
        for role in ("account", "session", "transfer"):
            parked = center.disk.rows(role, "SELECT source, topic, seq, reason FROM parked")
            history.broken += [f"CONVERGE: {name} parked {row}" for row in parked]


def _memory() -> str | None:
    """A directory in memory, where there is one: the disks of a simulation are thrown away."""
    shared = Path("/dev/shm")  # noqa: S108 - a private directory is made in it
    return str(shared) if shared.is_dir() else None


def describe(result: Result, setup: Setup) -> str:
    """A failing seed for people: what broke, how to see it again, and what led there."""
    shown = result.timeline[-TIMELINE_LINES:]
    return "\n".join(
        [
            f"seed {result.seed} BROKE {len(result.broken)} promises:",
            *(f"  {broken}" for broken in result.broken[:20]),
            f"the last {len(shown)} of {len(result.timeline)} things that happened:",
            *(f"  {line}" for line in shown),
            (
                f"replay: duohuo simulate --seed {result.seed} --centers {setup.centers}"
                f" --minutes {setup.minutes:g}"
            ),
        ]
    )
