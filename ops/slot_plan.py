"""Which slots to move so that each center is home of as many as it should be, and moving them.

A plan is a list of steps, each bound to the epoch in which its slot was found: executing it again, after
whatever has stopped it, does what is left, and nothing that has changed since.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from duohuo.v1.operator_service_pb2 import (
    CountSlotsResponse,
    MoveSlotRequest,
    MoveSlotResponse,
    PlacementView,
)
from gateway import ring
from ops import mesh_file
from ops.output import Failure, table
from ops.status import duration
from runtime.endpoint import AUTHORIZATION, Endpoint, ask
from runtime.errors import RpcError
from runtime.grpc_client import GrpcEndpoint
from runtime.methods import method
from runtime.placement import SLOTS

AT_ONCE = 64
"""So many slots move at a time. Each waits for up to a second until its new home has said how far it is."""
STEPS_PER_S = 30
"""About so many, as seen on a machine with two cores."""
TRIES_MAX = 5
PAUSE_S = 1.0
MOVE_TIMEOUT_S = 20.0
_MOVE = method("/duohuo.v1.OperatorService/MoveSlot")


@dataclass(frozen=True, slots=True)
class Step:
    """One slot to move, if it is still in this epoch."""

    slot: int
    source: str
    to: str
    epoch: int


class Done(NamedTuple):
    """What came of a plan."""

    moved: int
    overtaken: Sequence[Step]
    """Somebody else has moved these since the plan was made."""
    failed: Sequence[tuple[Step, RpcError]]

    def text(self) -> str:
        said = f"{self.moved} slots moved"
        if self.overtaken:
            said += (
                f"; {len(self.overtaken)} had been moved by somebody else since the plan was made"
            )
        return said

    def plain(self) -> dict[str, Any]:
        return {"moved": self.moved, "overtaken": [asdict(step) for step in self.overtaken]}


def left(center: str, counts: Mapping[str, int]) -> str:
    """What a drained center still has, and what that means for stopping it."""
    if not any(counts.values()):
        return f"Nobody uses center {center} any more: it can be stopped."
    named = {
        "sessions": "sessions (their users log in again once it is stopped)",
        "applications_open": "open applications (decided when it runs)",
        "money_in_transit": "transfers in transit (settled when it runs)",
    }
    found = ", ".join(f"{count} {named[name]}" for name, count in counts.items() if count)
    return f"Still at center {center}: {found}. When `duohuo status` shows none, nobody notices a stop."


def drain(view: PlacementView, center: str, centers: Sequence[str]) -> list[Step]:
    """Everything away from one center, shared among the others. Raises Failure without another one."""
    others = [name for name in centers if name != center]
    if not others:
        raise Failure(f"{center} is the only center there is", advice="Nothing can be moved away.")
    target = ring.compute(dict.fromkeys(others, 1), 1)
    return [
        Step(slot, center, target.home(slot), view.epochs[slot])
        for slot, home in enumerate(_homes(view))
        if home == center
    ]


def spread(view: PlacementView, weights: Mapping[str, int]) -> list[Step]:
    """Every slot to where it would be if the mesh began with centers of these weights."""
    target = ring.compute(weights, 1)
    return [
        Step(slot, home, target.home(slot), view.epochs[slot])
        for slot, home in enumerate(_homes(view))
        if home != target.home(slot)
    ]


def shown(steps: Sequence[Step], counted: CountSlotsResponse) -> str:
    """A plan for people: what moves, between whom, and for how long."""
    if not steps:
        return "nothing to move: all slots are where they should be"
    money = ", ".join(f"{one.minor_units} {one.currency_code}" for one in counted.balances)
    between = Counter((step.source, step.to) for step in steps)
    what = (
        f"{len(steps)} slots with {counted.accounts} accounts, {money or 'no money'},"
        f" {counted.applications_open} open applications and {counted.holds_open} open holds,"
        f" in about {duration(1000 * len(steps) // STEPS_PER_S)}"
    )
    rows = [(*pair, count) for pair, count in sorted(between.items())]
    wait = "While a slot moves, payments of its users wait for a moment."
    return "\n".join(
        [what, table(("FROM", "TO", "SLOTS"), rows), wait, "Nothing has been done yet."]
    )


def save(steps: Sequence[Step], path: Path) -> None:
    path.write_text(json.dumps([asdict(step) for step in steps], indent=1) + "\n")


def load(path: Path, centers: Sequence[str]) -> list[Step]:
    """Raises Failure if that is no plan for these centers."""
    advice = "Make one: duohuo route plan --help"
    try:
        steps = [Step(**step) for step in json.loads(path.read_text())]
    except FileNotFoundError:
        raise Failure(f"there is no file {path}", advice=advice) from None
    except (ValueError, TypeError):
        raise Failure(f"{path} is no plan", advice=advice) from None
    if not all(_is_possible(step, centers) for step in steps):
        raise Failure(f"{path} is no plan for centers {', '.join(centers)}", advice=advice)
    return steps


async def execute(state: Path, steps: Sequence[Step], tell: Callable[[str], None] | None) -> Done:
    """Does the steps, some at a time; begins no further one after one has failed."""
    mesh = mesh_file.read(state)
    who = {AUTHORIZATION: f"Bearer {mesh_file.operator_token(state)}"}
    waiting = list(reversed(steps))
    moved, overtaken, failed = 0, list[Step](), list[tuple[Step, RpcError]]()

    async with AsyncExitStack() as closing:
        endpoints = {}
        for name, center in mesh.centers.items():
            endpoints[name] = GrpcEndpoint(name, center.operator)
            closing.push_async_callback(endpoints[name].close)

        async def work() -> None:
            nonlocal moved
            while waiting:
                step = waiting.pop()
                try:
                    await _move(endpoints[step.source], step, who)
                    moved += 1
                except RpcError as error:
                    if error.reason == "STALE_EPOCH":
                        overtaken.append(step)
                    else:
                        failed.append((step, error))
                        waiting.clear()
                if tell is not None:
                    tell(f"{moved} of {len(steps)} slots moved, {len(failed)} failed")

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    if tell is not None:
        tell("")
    return Done(moved, overtaken, failed)


async def _move(operators: Endpoint, step: Step, who: Mapping[str, str]) -> None:
    request = MoveSlotRequest(slot=step.slot, home=step.to, epoch=step.epoch)
    for left in reversed(range(TRIES_MAX)):
        try:
            await ask(operators, _MOVE, request, MoveSlotResponse, MOVE_TIMEOUT_S, who)
        except RpcError as error:
            if error.reason == "STALE_EPOCH" or not left:
                raise
            await asyncio.sleep(PAUSE_S)
        else:
            return


def _homes(view: PlacementView) -> list[str]:
    return [view.centers[number] for number in view.homes]


def _is_possible(step: Step, centers: Sequence[str]) -> bool:
    numbers = type(step.slot) is int and type(step.epoch) is int
    return numbers and 0 <= step.slot < SLOTS and step.source in centers and step.to in centers
