"""Commands that do what a user's program would do with holds."""

from typing import Annotated

import typer

from ops.arguments import Amount, Center, Currency, Payee, Payer, TransferId, state_of
from ops.money_commands import add_id, set_payee
from ops.output import Format, Output, command, say

HoldId = Annotated[str, typer.Argument(help="The hold's id, as `duohuo reserve` has shown it.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for work in (reserve, capture, release):
        app.command()(work)


@command
async def reserve(
    context: typer.Context,
    payee: Payee,
    amount: Amount,
    currency: Currency = "CNY",
    payer: Payer = None,
    memo: str = "",
    lasts_s: Annotated[
        int | None,
        typer.Option("--for", min=1, help="In seconds; 7 days if left out, at most 30 days."),
    ] = None,
    hold_id: Annotated[
        str | None,
        typer.Option("--id", help="The hold's id; made up if left out. Repeat it to ask again."),
    ] = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Hold money back for a payee. Example: duohuo reserve bob@example.com 250 --for 3600"""
    from duohuo.v1.money_pb2 import Money
    from duohuo.v1.transfer_service_pb2 import Hold, ReserveFundsRequest
    from ops.client import connected
    from ops.plain import plain
    from runtime.clock import SystemClock, timestamp
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(payer)
        request = ReserveFundsRequest(
            hold_id=hold_id or RandomIds().unique(),
            payer_account_id=login.account_id,
            amount=Money(currency_code=currency, minor_units=amount),
            memo=memo,
        )
        if lasts_s is not None:
            request.expire_time.CopyFrom(timestamp(SystemClock().wall_ms() + 1000 * lasts_s))
        set_payee(request, payee)
        try:
            hold = await client.call("TransferService/ReserveFunds", request, Hold, login)
        except Exception as error:
            add_id(error, request.hold_id)
            raise
        say(
            output,
            f"Held until {hold.expire_time.ToJsonString()}: {amount} {currency}\n"
            f"Next: duohuo capture {hold.hold_id}, or duohuo release {hold.hold_id}",
            plain(hold),
        )


@command
async def capture(
    context: typer.Context,
    hold_id: HoldId,
    amount: Annotated[
        int | None, typer.Option(help="In minor units, at most what is held; all if left out.")
    ] = None,
    currency: Currency = "CNY",
    payer: Payer = None,
    transfer_id: TransferId = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Pay a hold's payee, and give the rest back. Example: duohuo capture HOLD_ID --amount 200"""
    from duohuo.v1.money_pb2 import Money
    from duohuo.v1.transfer_service_pb2 import (
        CaptureHoldRequest,
        CaptureHoldResponse,
        TransferState,
    )
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(payer)
        request = CaptureHoldRequest(
            payer_account_id=login.account_id,
            hold_id=hold_id,
            transfer_id=transfer_id or RandomIds().unique(),
        )
        if amount is not None:
            request.amount.CopyFrom(Money(currency_code=currency, minor_units=amount))
        try:
            done = await client.call(
                "TransferService/CaptureHold", request, CaptureHoldResponse, login
            )
        except Exception as error:
            add_id(error, request.transfer_id)
            raise
        paid = done.hold.captured
        state = TransferState.Name(done.transfer.state).removeprefix("TRANSFER_STATE_")
        say(
            output,
            f"Captured {paid.minor_units} of {done.hold.amount.minor_units}"
            f" {paid.currency_code}: {state}\nTransfer {request.transfer_id}",
            plain(done),
        )


@command
async def release(
    context: typer.Context,
    hold_id: HoldId,
    payer: Payer = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Give up a hold: its money is available again. Example: duohuo release HOLD_ID"""
    from duohuo.v1.transfer_service_pb2 import Hold, ReleaseHoldRequest
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(payer)
        request = ReleaseHoldRequest(payer_account_id=login.account_id, hold_id=hold_id)
        hold = await client.call("TransferService/ReleaseHold", request, Hold, login)
        amount = hold.amount
        text = f"Released: {amount.minor_units} {amount.currency_code} are available again."
        say(output, text, plain(hold))
