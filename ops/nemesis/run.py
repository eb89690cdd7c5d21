"""The drill from start to verdict: users and faults, then healing, settling, and the checks."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ops import mesh_file, verify
from ops.nemesis.faults import Faults
from ops.nemesis.stage import RealMesh
from ops.output import Failure
from ops.simulation import checks, leavers, operators
from ops.simulation.history import History, Outcome
from ops.simulation.workload import HOLDS_LAST_MS, Workload
from runtime.ids import RandomIds

USERS = 10
THINK_S = 0.1
"""Of the busiest user; each further one thinks 1.6 times as long."""
PROGRESS_INTERVAL_S = 10.0
WATCH_INTERVAL_S = 1.0
SETTLE_WITHIN_S = 120.0
"""After the last fault all copies agree and every application is decided within this time."""
SHOWN_OF_EACH = 3
"""Violations of one guarantee that are shown to people; all are in the JSON."""
ROLES_WITH_PARKED = ("account", "session", "transfer")


@dataclass(frozen=True, slots=True)
class Report:
    """What was tried, what was said, and whether the guarantees held."""

    seed: int
    minutes: float
    passed: bool
    tried: int
    ok: int
    refused: int
    indefinite: int
    by_kind: dict[str, dict[str, int]]
    reasons: dict[str, int]
    sure_logins: int
    faults: dict[str, int]
    skipped: list[str]
    settled_s: float
    violations: list[str]
    history: str

    def text(self) -> str:
        kinds = "\n".join(
            f"  {kind:16}" + "  ".join(f"{said} {count}" for said, count in counts.items())
            for kind, counts in self.by_kind.items()
        )
        lines = [
            (
                f"operations: {self.tried} tried, {self.ok} ok, {self.refused} refused,"
                f" {self.indefinite} indefinite\n{kinds}"
            ),
            f"why not ok: {_counted(self.reasons)}",
            f"logins that had to succeed: {self.sure_logins}",
            f"faults: {_counted(self.faults)}",
            *(f"skipped: {skipped}" for skipped in self.skipped),
            f"settled {self.settled_s:.1f} s after the last fault ({SETTLE_WITHIN_S:.0f} s allowed)",
            f"history: {self.history}",
            *_some_of_each(self.violations),
            (
                f"drill nemesis, seed {self.seed}, {self.minutes:g} minutes:"
                f" {len(self.violations)} violations, {'passed' if self.passed else 'FAILED'}"
            ),
        ]
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        return {"drill": "nemesis", **asdict(self)}


async def nemesis(state: Path, minutes: float, seed: int, tell: Callable[[str], None]) -> Report:
    """Runs the drill on the mesh of a state directory."""
    view = mesh_file.read(state)
    if len(view.centers) < 2 or any(center.state != "running" for center in view.centers.values()):
        raise Failure("this drill needs a mesh of at least two centers, all of them running")
    stage = RealMesh(state)
    try:
        history = History()
        faults = Faults(stage, history, seed)
        prefix = f"nemesis-{RandomIds().unique()[-12:]}-"
        workload = Workload(stage, history, str(seed), USERS, prefix, THINK_S)
        for skipped in faults.skipped:
            tell(f"skipped: {skipped}")
        settled_s = await _scenario(stage, workload, faults, history, minutes * 60, tell)
        history.broken += checks.after(stage, workload.users, history)
        path = state / f"nemesis-{seed}.log"
        mesh_file.write_private(path, "\n".join(history.timeline()) + "\n")
        return _report(seed, minutes, history, faults, settled_s, path)
    finally:
        await stage.close()


async def _scenario(
    stage: RealMesh,
    workload: Workload,
    faults: Faults,
    history: History,
    duration_s: float,
    tell: Callable[[str], None],
) -> float:
    """Users and faults, then healing; returns how long it took to settle."""
    for name in stage.names:
        await stage.calm(name, SETTLE_WITHIN_S)
    started_s = stage.now_s()
    until_s = started_s + duration_s
    async with asyncio.TaskGroup() as tasks:
        around = (
            tasks.create_task(_watch(faults)),
            tasks.create_task(_progress(stage, faults, history, started_s, tell)),
        )
        users = [tasks.create_task(workload.run(user, until_s)) for user in workload.users]
        users.append(tasks.create_task(operators.freeze(workload, until_s)))
        users.append(tasks.create_task(operators.announce(workload, until_s)))
        users.append(tasks.create_task(leavers.come_and_go(workload, until_s)))
        try:
            await faults.run(until_s)
        finally:
            await faults.heal()
        healed_s = stage.now_s()
        await asyncio.gather(*users)
        for task in around:
            task.cancel()
    tell("all is healed; waiting until all centers agree and nothing is open")
    await _settle(stage, history, healed_s)
    return stage.now_s() - healed_s


async def _settle(stage: RealMesh, history: History, healed_s: float) -> None:
    """CONVERGE: waits until all centers agree and nothing is open."""
    while True:
        report = await verify.verify(stage.state, 0)
        still_open = checks.still_open(stage)
        still_open += [
            f"a hold at {name}"
            for name in stage.names
            if stage.disk(name).rows("transfer", _HOLDS_OPEN, stage.now_ms() + max(HOLDS_LAST_MS))
        ]
        if report.passed and not still_open:
            break
        if stage.now_s() > healed_s + SETTLE_WITHIN_S:
            history.broken.append(f"CONVERGE: {still_open} still open; {report.text()}")
            break
        await asyncio.sleep(0.5)
    for name in stage.names:
        for role in ROLES_WITH_PARKED:
            parked = stage.disk(name).rows(role, "SELECT source, topic, seq, reason FROM parked")
            history.broken += [f"CONVERGE: {name} parked {row}" for row in parked]


# Holds of others, that last longer, are none of ours.
_HOLDS_OPEN = "SELECT 1 FROM hold WHERE state = 2 AND expire_ms < ?"


async def _watch(faults: Faults) -> None:
    while True:
        await asyncio.sleep(WATCH_INTERVAL_S)
        await faults.watch()


async def _progress(
    stage: RealMesh,
    faults: Faults,
    history: History,
    started_s: float,
    tell: Callable[[str], None],
) -> None:
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL_S)
        said = _said(history)
        broken = ", ".join(f"{kind} {target}" for target, kind in faults.now.items())
        tell(
            f"{stage.now_s() - started_s:6.0f} s  {len(history.operations)} tried, {said['ok']} ok,"
            f" {said['refused']} refused, {said['unknown']} indefinite;"
            f" {faults.made.total()} faults, now: {broken or 'none'};"
            f" {len(history.broken)} violations"
        )


def _report(
    seed: int, minutes: float, history: History, faults: Faults, settled_s: float, path: Path
) -> Report:
    violations = list(dict.fromkeys(history.broken))
    said = _said(history)
    by_kind: dict[str, Counter[str]] = {}
    for one in history.operations:
        by_kind.setdefault(one.kind, Counter())[one.outcome.value] += 1
    return Report(
        seed,
        minutes,
        not violations,
        len(history.operations),
        said[Outcome.OK.value],
        said[Outcome.REFUSED.value],
        said[Outcome.UNKNOWN.value],
        {kind: dict(sorted(counts.items())) for kind, counts in sorted(by_kind.items())},
        dict(Counter(one.reason for one in history.operations if one.reason).most_common()),
        sum(1 for one in history.of("login") if one.facts["copied"]),
        dict(faults.made.most_common()),
        faults.skipped,
        settled_s,
        violations,
        str(path),
    )


def _said(history: History) -> Counter[str]:
    return Counter(one.outcome.value for one in history.operations)


def _some_of_each(violations: list[str]) -> Iterator[str]:
    """A few of each guarantee, so that many of one do not hide another."""
    found: dict[str, list[str]] = {}
    for violation in violations:
        found.setdefault(violation.partition(":")[0], []).append(violation)
    for guarantee, those in found.items():
        yield from (f"VIOLATION {violation}" for violation in those[:SHOWN_OF_EACH])
        if len(those) > SHOWN_OF_EACH:
            yield f"VIOLATION {guarantee}: and {len(those) - SHOWN_OF_EACH} more"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"
