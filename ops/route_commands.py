"""`duohuo route`: where users' calls go, and how to have them go elsewhere."""

from typing import Annotated

import typer

from ops.arguments import Payee, state_of
from ops.output import Failure, Format, Output, command, say


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    route = typer.Typer(no_args_is_help=True, help="Where users' calls go.")
    route.command()(show)
    route.command()(move)
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
