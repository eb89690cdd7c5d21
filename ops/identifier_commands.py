"""Commands for the identifiers that a user logs in with and is paid by."""

from typing import Annotated

import typer

from ops.arguments import Center, state_of
from ops.output import Format, Output, command, say

Identifier = Annotated[str, typer.Argument(help="E-mail address or phone number.")]

Owner = Annotated[
    str | None,
    typer.Option(
        "--user", help="By any identifier with which they have logged in; the last if left out."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    identifier = typer.Typer(no_args_is_help=True, help="What a user logs in with and is paid by.")
    identifier.command()(add)
    identifier.command()(remove)
    identifier.command("list")(list_identifiers)
    app.add_typer(identifier, name="identifier")


@command
async def add(
    context: typer.Context,
    identifier: Identifier,
    user: Owner = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Give a user another identifier. Example: duohuo identifier add +8613912345678

    From then on it belongs to this account for ever, even if it is removed.
    """
    from duohuo.v1.account_service_pb2 import Account, AddIdentifierRequest
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        request = AddIdentifierRequest(
            account_id=login.account_id, identifier=identifier, request_id=RandomIds().unique()
        )
        account = await client.call("AccountService/AddIdentifier", request, Account, login)
        say(output, f"Yours: {', '.join(account.identifiers)}", plain(account))


@command
async def remove(
    context: typer.Context,
    identifier: Identifier,
    user: Owner = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Stop using an identifier. Example: duohuo identifier remove +8613912345678

    Nobody else can have it; the user may add it again.
    """
    from duohuo.v1.account_service_pb2 import Account, RemoveIdentifierRequest
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        request = RemoveIdentifierRequest(
            account_id=login.account_id, identifier=identifier, request_id=RandomIds().unique()
        )
        account = await client.call("AccountService/RemoveIdentifier", request, Account, login)
        say(output, f"Yours: {', '.join(account.identifiers)}", plain(account))


@command
async def list_identifiers(
    context: typer.Context, user: Owner = None, center: Center = None, output: Output = Format.TEXT
) -> None:
    """Show a user's identifiers, the first one first. Example: duohuo identifier list"""
    from duohuo.v1.account_service_pb2 import Account, GetAccountRequest
    from ops.client import connected

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        account = await client.call(
            "AccountService/GetAccount",
            GetAccountRequest(account_id=login.account_id),
            Account,
            login,
        )
        identifiers = list(account.identifiers)
        say(output, "\n".join(identifiers), {"identifiers": identifiers})
