"""Commands for what an account may do, as an operator: `duohuo account`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops.arguments import Payee, state_of
from ops.output import Format, Output, command, say, table

if TYPE_CHECKING:
    from duohuo.v1.operator_service_pb2 import (
        AccountControl,
        CloseAccountRequest,
        FreezeAccountRequest,
        SetLimitsRequest,
        UnfreezeAccountRequest,
    )

    Change = FreezeAccountRequest | UnfreezeAccountRequest | CloseAccountRequest | SetLimitsRequest

Limit = int | None


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    account = typer.Typer(
        no_args_is_help=True, help="See, freeze, unfreeze, close, limit or erase a user's account."
    )
    for work in (show, freeze, unfreeze, close, limits, erase):
        account.command()(work)
    app.add_typer(account, name="account")


@command
async def show(context: typer.Context, user: Payee, output: Output = Format.TEXT) -> None:
    """Show what an account may do. Example: duohuo account show alice@example.com"""
    from duohuo.v1.operator_service_pb2 import AccountControl, GetAccountControlRequest
    from ops.client import ask_some_operator
    from ops.plain import plain

    request = GetAccountControlRequest(user=user)
    found = await ask_some_operator(state_of(context), "GetAccountControl", request, AccountControl)
    say(output, table(_HEADINGS, [_row("", found)]), plain(found))


@command
async def freeze(context: typer.Context, user: Payee, output: Output = Format.TEXT) -> None:
    """Let an account neither pay nor receive. Example: duohuo account freeze alice@example.com"""
    from duohuo.v1.operator_service_pb2 import FreezeAccountRequest

    await _change(context, "FreezeAccount", FreezeAccountRequest(user=user), output)


@command
async def unfreeze(context: typer.Context, user: Payee, output: Output = Format.TEXT) -> None:
    """Let it pay and receive again. Example: duohuo account unfreeze alice@example.com"""
    from duohuo.v1.operator_service_pb2 import UnfreezeAccountRequest

    await _change(context, "UnfreezeAccount", UnfreezeAccountRequest(user=user), output)


@command
async def close(context: typer.Context, user: Payee, output: Output = Format.TEXT) -> None:
    """Close an account for ever; it must be empty. Example: duohuo account close alice@example.com"""
    from duohuo.v1.operator_service_pb2 import CloseAccountRequest

    await _change(context, "CloseAccount", CloseAccountRequest(user=user), output)


@command
async def erase(
    context: typer.Context,
    user: Payee,
    sure: Annotated[
        bool, typer.Option("--yes", help="Do not ask whether it is meant.", show_default=False)
    ] = False,
    output: Output = Format.TEXT,
) -> None:
    """Erase what is personal of an account, for ever. Example: duohuo account erase alice@example.com

    It is closed first, so it must be empty. Its id stays, and with it what it has paid and been paid.
    """
    from duohuo.v1.operator_service_pb2 import EraseAccountRequest, EraseAccountResponse
    from ops.client import ask_some_operator
    from ops.plain import plain

    if not sure:
        typer.confirm(f"Erase {user} in all centers? Nothing brings it back.", abort=True, err=True)
    done = await ask_some_operator(
        state_of(context), "EraseAccount", EraseAccountRequest(user=user), EraseAccountResponse
    )
    text = f"Erased: {done.account_id}"
    if done.waiting_for:
        text += (
            f"\nNot yet at {', '.join(done.waiting_for)}: it follows as soon as it is there. Ask again "
            "with the account's id to see whether it has."
        )
    say(output, text, plain(done))


@command
async def limits(
    context: typer.Context,
    user: Payee,
    per_transfer: Annotated[
        Limit, typer.Option(min=0, help="In minor units; 0: no limit. Stays if left out.")
    ] = None,
    per_day: Annotated[
        Limit, typer.Option(min=0, help="Of a UTC day; 0: no limit. Stays if left out.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Limit what it pays. Example: duohuo account limits alice@example.com --per-day 100000"""
    from duohuo.v1.operator_service_pb2 import SetLimitsRequest

    request = SetLimitsRequest(
        user=user, per_transfer_minor_units_max=per_transfer, per_day_minor_units_max=per_day
    )
    await _change(context, "SetLimits", request, output)


async def _change(context: typer.Context, path: str, request: "Change", output: Format) -> None:
    from duohuo.v1.operator_service_pb2 import (
        AccountControl,
        AccountControlChange,
        GetAccountControlRequest,
    )
    from ops.client import ask_some_operator
    from ops.plain import plain

    # Of the version that was there before: should it arrive late, it changes nothing.
    look = GetAccountControlRequest(user=request.user)
    found = await ask_some_operator(state_of(context), "GetAccountControl", look, AccountControl)
    request.version = found.version
    done = await ask_some_operator(state_of(context), path, request, AccountControlChange)
    rows = [_row("before", done.before), _row("after", done.after)]
    say(output, table(_HEADINGS, rows), plain(done))


_HEADINGS = ("", "ACCOUNT", "HOME", "STATUS", "PER TRANSFER", "PER DAY", "PAID TODAY")


def _row(when: str, control: "AccountControl") -> tuple[Any, ...]:
    from duohuo.v1.operator_service_pb2 import AccountStatus

    return (
        when,
        control.account_id,
        control.home_center,
        AccountStatus.Name(control.status).removeprefix("ACCOUNT_STATUS_"),
        control.per_transfer_minor_units_max or "-",
        control.per_day_minor_units_max or "-",
        control.paid_today_minor_units,
    )
