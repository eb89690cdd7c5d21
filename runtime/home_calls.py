"""Calling the home of a slot, wherever that is by now: whoever is not home says who is."""

import asyncio
from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import Message
from grpc import StatusCode

from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.mesh import Mesh
from runtime.methods import Method
from runtime.placement import Placement

M = TypeVar("M", bound=Message)
WRONG_HOME = "WRONG_HOME"
WAIT_S_FIRST = 0.02
WAIT_S_MAX = 0.2
TRIPS_MAX = 12


def named_home(error: RpcError, slot: int, placement: Placement) -> str:
    """Whom to ask next, after one that is not home; what it knows better is learned. It may know less, or
    be about to become home itself: then who asks waits a little."""
    try:
        epoch = int(error.details.get("epoch", "0"))
    except ValueError:
        epoch = 0
    named = error.details.get("home", "")
    if placement.learn(slot, epoch, named):
        return named
    return named if named in placement.centers else placement.home(slot)


def wait_s(trips: int) -> float:
    """How long to wait before the next trip: not at all before the first that was corrected."""
    return 0.0 if trips <= 1 else min(WAIT_S_FIRST * 2 ** (trips - 2), WAIT_S_MAX)


def slot_moving(slot: int) -> RpcError:
    """For those who would have to wait too long for somebody to act as home."""
    return RpcError(
        StatusCode.UNAVAILABLE,
        "SLOT_MOVING",
        f"slot {slot} is moving to another center, which has not taken it over yet",
        retry_after_ms=1000,
        advice="Ask again in a moment; nothing was done.",
    )


async def ask_home(
    mesh: Mesh,
    placement: Placement,
    slot: int,
    method: Method,
    request: Message,
    response_type: type[M],
    timeout_s: float,
    metadata: Mapping[str, str] | None = None,
) -> M:
    """Asks the home of a slot, and whoever that is by now. Raises what it raises; SLOT_MOVING if nobody is
    home for too long."""
    home = placement.home(slot)
    for trips in range(1, TRIPS_MAX + 1):
        try:
            return await ask(mesh.at(home), method, request, response_type, timeout_s, metadata)
        except RpcError as error:
            if error.reason != WRONG_HOME:
                raise
            home = named_home(error, slot, placement)
        await asyncio.sleep(wait_s(trips))
    raise slot_moving(slot)
