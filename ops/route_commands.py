"""`duohuo route`: where users' calls go, and how to have them go elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import Payee, state_of
from ops.output import Failure, Format, Output, command, progress, say

if TYPE_CHECKING:
    from duohuo.v1.operator_service_pb2 import CenterStatus, CountSlotsResponse, PlacementView
    from ops.slot_plan import Done, Step

Drained = Annotated[str, typer.Argument(metavar="CENTER", help="Which center.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    route = typer.Typer(no_args_is_help=True, help="Where users' calls go.")
    route.command()(show)
    for work in (move, plan, apply, drain, undrain):
        route.command()(work)
    app.add_typer(route, name="route")


@command
async def show(context: typer.Context, user: Payee, output: Output = Format.TEXT) -> None:
    """Show a user's home, who comes next, and what if home died now.

    Example: duohuo route show alice@example.com
    """
    import asyncio

    from duohuo.v1.operator_service_pb2 import (
        CenterStatus,
        GetRouteRequest,
        GetStatusRequest,
        Route,
    )
    from ops import route as routes
    from ops.client import ask_operator, ask_some_operator
    from ops.plain import plain
    from runtime.errors import RpcError

    state = state_of(context)
    found = await ask_some_operator(state, "GetRoute", GetRouteRequest(user=user), Route)
    home, *rest = found.centers

    async def copy(center: str) -> routes.Behind | None:
        try:
            asked = GetStatusRequest()
            return routes.behind(
                await ask_operator(state, center, "GetStatus", asked, CenterStatus), home
            )
        except RpcError:
            return None

    answers = await asyncio.gather(*(copy(center) for center in rest))
    copies = {center: one for center, one in zip(rest, answers, strict=True) if one}
    say(
        output,
        routes.shown(user, found, copies),
        {
            **plain(found),
            "if_home_died": routes.outlook(found.centers)._asdict(),
            "copies": {center: one._asdict() for center, one in copies.items()},
        },
    )


@command
async def move(
    context: typer.Context,
    to: Annotated[str, typer.Option(help="The center that shall be home.")],
    user: Annotated[
        str | None, typer.Argument(help="Identifier or account id: whose slot to move.")
    ] = None,
    slot: Annotated[int | None, typer.Option(help="Which slot, from 0 to 4095.")] = None,
    epoch: Annotated[
        int | None, typer.Option(help="Only if the slot is in this epoch; see route show.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Give a user's slot to another center, with all its users, while they go on.

    Example: duohuo route move alice@example.com --to b
    """
    from duohuo.v1.operator_service_pb2 import MoveSlotRequest, MoveSlotResponse
    from ops.client import ask_some_operator
    from ops.plain import plain
    from ops.route import moved

    if (user is None) == (slot is None):
        raise Failure(
            "either a user or --slot must be given", advice="See duohuo route move --help"
        )
    request = MoveSlotRequest(home=to, epoch=epoch)
    if user is None:
        request.slot = slot or 0
    else:
        request.user = user
    done = await ask_some_operator(state_of(context), "MoveSlot", request, MoveSlotResponse)
    say(output, moved(done), plain(done))


@command
async def plan(
    context: typer.Context,
    file: Annotated[Path | None, typer.Option(help="Where to write the plan, for apply.")] = None,
    away_from: Annotated[
        str | None, typer.Option("--drain", help="Everything away from this center.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="How much each center shall have, such as a=1,b=1,c=2.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Show which slots would move, and what is in them. Changes nothing.

    Example: duohuo route plan --drain a --file away-from-a.json
    """
    from dataclasses import asdict

    from ops import slot_plan
    from ops.plain import plain

    if (away_from is None) == (weights is None):
        raise Failure("either --drain or --weights must be given")
    view = await _placement(context)
    if away_from is not None:
        steps = slot_plan.drain(view, _known(context, away_from), _centers(context))
    else:
        steps = slot_plan.spread(view, _weights(context, weights or ""))
    counted = await _counted(context, steps)
    if file is not None:
        slot_plan.save(steps, file)
    text = slot_plan.shown(steps, counted)
    if file is not None and steps:
        text += f"\nTo do it: duohuo route apply {file}"
    say(output, text, {"steps": [asdict(step) for step in steps], **plain(counted)})


@command
async def apply(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A plan that route plan has written.")],
    output: Output = Format.TEXT,
) -> None:
    """Move what a plan says, but for what has changed since. Again after a crash, it goes on.

    Example: duohuo route apply away-from-a.json
    """
    from ops import slot_plan

    moved = await _execute(context, slot_plan.load(file, _centers(context)))
    say(output, moved.text(), moved.plain())


@command
async def drain(
    context: typer.Context,
    center: Drained,
    force: Annotated[
        bool, typer.Option("--force", help="Also the last center that takes anything new.")
    ] = False,
    output: Output = Format.TEXT,
) -> None:
    """Move all slots of a center to the others, and make no new sessions there, so that it can be stopped.

    Example: duohuo route drain a
    """
    from ops import slot_plan

    await _set_draining(context, _known(context, center), draining=True, forced=force)
    steps = slot_plan.drain(await _placement(context), center, await _taking(context, center))
    moved = await _execute(context, steps)
    status = await _status(context, center)
    left = {
        name: status.counts[name] for name in ("sessions", "applications_open", "money_in_transit")
    }
    say(output, f"{moved.text()}\n{slot_plan.left(center, left)}", {**moved.plain(), "left": left})


@command
async def undrain(context: typer.Context, center: Drained, output: Output = Format.TEXT) -> None:
    """Give a center its share of all slots, as at the beginning.

    Example: duohuo route undrain a
    """
    from ops import slot_plan

    await _set_draining(context, _known(context, center), draining=False, forced=False)
    weights = dict.fromkeys(_centers(context), 1)
    steps = slot_plan.spread(await _placement(context), weights)
    moved = await _execute(context, [step for step in steps if step.to == center])
    say(output, moved.text(), moved.plain())


async def _set_draining(
    context: typer.Context, center: str, *, draining: bool, forced: bool
) -> None:
    from duohuo.v1.operator_service_pb2 import SetDrainingRequest, SetDrainingResponse
    from ops.client import ask_operator

    request = SetDrainingRequest(draining=draining, forced=forced)
    await ask_operator(state_of(context), center, "SetDraining", request, SetDrainingResponse)


async def _status(context: typer.Context, center: str) -> "CenterStatus":
    from duohuo.v1.operator_service_pb2 import CenterStatus, GetStatusRequest
    from ops.client import ask_operator

    return await ask_operator(
        state_of(context), center, "GetStatus", GetStatusRequest(), CenterStatus
    )


async def _taking(context: typer.Context, drained: str) -> list[str]:
    """The center that is being drained, and those others that answer and are not."""
    from runtime.errors import RpcError

    found = [drained]
    for name in _centers(context):
        if name == drained:
            continue
        try:
            status = await _status(context, name)
        except RpcError:
            continue
        found += [] if status.draining else [name]
    return found


async def _execute(context: typer.Context, steps: "list[Step]") -> "Done":
    from ops import slot_plan

    done = await slot_plan.execute(state_of(context), steps, progress())
    if done.failed:
        step, error = done.failed[0]
        left = len(steps) - done.moved - len(done.overtaken)
        raise Failure(
            f"{done.moved} slots moved, {left} did not, as slot {step.slot} could not: {error.message}",
            error.reason,
            advice="What has moved stays so. Do the same again to go on; see duohuo status.",
        )
    return done


async def _placement(context: typer.Context) -> "PlacementView":
    from duohuo.v1.operator_service_pb2 import GetPlacementRequest, PlacementView
    from ops.client import ask_some_operator

    asked = GetPlacementRequest()
    return await ask_some_operator(state_of(context), "GetPlacement", asked, PlacementView)


async def _counted(context: typer.Context, steps: "list[Step]") -> "CountSlotsResponse":
    from duohuo.v1.operator_service_pb2 import CountSlotsRequest, CountSlotsResponse
    from ops.client import ask_some_operator

    asked = CountSlotsRequest(slots=[step.slot for step in steps])
    return await ask_some_operator(state_of(context), "CountSlots", asked, CountSlotsResponse)


def _centers(context: typer.Context) -> list[str]:
    from ops import mesh_file

    return list(mesh_file.read(state_of(context)).centers)


def _known(context: typer.Context, center: str) -> str:
    centers = _centers(context)
    if center not in centers:
        raise Failure(f"there is no center {center}; there is {', '.join(centers)}")
    return center


def _weights(context: typer.Context, given: str) -> dict[str, int]:
    """Raises Failure unless each center has a weight, and one of them some."""
    try:
        weights = {
            name: int(weight) for name, weight in (one.split("=") for one in given.split(","))
        }
    except ValueError:
        raise Failure("--weights must look like a=1,b=1,c=2") from None
    if sorted(weights) != sorted(_centers(context)):
        raise Failure(f"--weights must name each of the centers: {', '.join(_centers(context))}")
    if min(weights.values()) < 0 or max(weights.values()) == 0 or max(weights.values()) > 100:
        raise Failure("weights must be from 0 to 100, and not all 0")
    return weights
