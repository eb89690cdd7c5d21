"""Commands that do what a user's program would do with money, and an operator's deposit."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import Amount, Center, Currency, Payee, Payer, TransferId, User, state_of
from ops.output import Format, Output, command, say, table

if TYPE_CHECKING:
    from duohuo.v1.transfer_service_pb2 import (
        ApplyTransferRequest,
        ReserveFundsRequest,
        TransferRequest,
    )


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for work in (balance, entries, transfer, apply, applications, cancel, fund):
        app.command()(work)


@command
async def balance(
    context: typer.Context, user: User = None, center: Center = None, output: Output = Format.TEXT
) -> None:
    """Show a user's balance. Example: duohuo balance alice@example.com"""
    from duohuo.v1.transfer_service_pb2 import Balance, GetBalanceRequest
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        found = await client.call(
            "TransferService/GetBalance",
            GetBalanceRequest(account_id=login.account_id),
            Balance,
            login,
        )
        text = f"{found.balance.minor_units} {found.balance.currency_code}"
        if found.available != found.balance:
            text += f", {found.available.minor_units} of it available"
        if found.stale:
            text += f"  (a copy, as of {found.as_of.ToJsonString()}; the home center is away)"
        say(output, text, {**plain(found), "served_by": client.served_by})


@command
async def entries(
    context: typer.Context,
    user: User = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, newest first.")] = 20,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Show a user's statement. Example: duohuo entries --limit 5"""
    from duohuo.v1.transfer_service_pb2 import ListEntriesRequest, ListEntriesResponse
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        found = await client.call(
            "TransferService/ListEntries",
            ListEntriesRequest(account_id=login.account_id, page_size=limit),
            ListEntriesResponse,
            login,
        )
        text = table(
            ("NO", "AMOUNT", "BALANCE", "CURRENCY", "WITH", "TRANSFER", "MEMO"),
            (
                (
                    e.number,
                    e.amount.minor_units,
                    e.balance_after.minor_units,
                    e.amount.currency_code,
                    e.counterparty_account_id,
                    e.transfer_id,
                    e.memo,
                )
                for e in found.entries
            ),
        )
        say(output, text, plain(found))


@command
async def transfer(
    context: typer.Context,
    payee: Payee,
    amount: Amount,
    currency: Currency = "CNY",
    payer: Payer = None,
    memo: str = "",
    transfer_id: TransferId = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Move money now. Example: duohuo transfer bob@example.com 250 --currency CNY"""
    from duohuo.v1.money_pb2 import Money
    from duohuo.v1.transfer_service_pb2 import TransferRequest, TransferResult, TransferState
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(payer)
        request = TransferRequest(
            transfer_id=transfer_id or RandomIds().unique(),
            payer_account_id=login.account_id,
            amount=Money(currency_code=currency, minor_units=amount),
            memo=memo,
        )
        set_payee(request, payee)
        try:
            result = await client.call("TransferService/Transfer", request, TransferResult, login)
        except Exception as error:
            add_id(error, request.transfer_id)
            raise
        state = TransferState.Name(result.state).removeprefix("TRANSFER_STATE_")
        text = {
            "CREDITED": f"Done: {amount} {currency} moved.",
            "DEBITED": f"On its way: {amount} {currency} left your account; the payee's center"
            " confirms it when it can.",
        }.get(state, state)
        say(output, f"{text}\nTransfer {request.transfer_id}", plain(result))


@command
async def apply(
    context: typer.Context,
    payee: Payee,
    amount: Amount,
    currency: Currency = "CNY",
    payer: Payer = None,
    memo: str = "",
    transfer_id: TransferId = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Queue a transfer until the payer's home decides. Example: duohuo apply bob@example.com 250"""
    from duohuo.v1.money_pb2 import Money
    from duohuo.v1.transfer_service_pb2 import Application, ApplyTransferRequest
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(payer)
        request = ApplyTransferRequest(
            transfer_id=transfer_id or RandomIds().unique(),
            payer_account_id=login.account_id,
            amount=Money(currency_code=currency, minor_units=amount),
            memo=memo,
        )
        set_payee(request, payee)
        try:
            found = await client.call("TransferService/ApplyTransfer", request, Application, login)
        except Exception as error:
            add_id(error, request.transfer_id)
            raise
        say(
            output,
            f"Queued at center {found.origin_center}: application {found.application_id}\n"
            "Follow it: duohuo applications --watch",
            plain(found),
        )


@command
async def applications(
    context: typer.Context,
    user: User = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show each change.")] = False,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """List a user's queued transfers. Example: duohuo applications --watch"""
    from duohuo.v1.transfer_service_pb2 import (
        Application,
        ApplicationState,
        ListApplicationsRequest,
        ListApplicationsResponse,
        WatchApplicationsRequest,
    )
    from ops.client import connected
    from ops.plain import plain

    def row(found: Application) -> tuple[object, ...]:
        return (
            found.application_id,
            ApplicationState.Name(found.state).removeprefix("APPLICATION_STATE_"),
            found.reason or found.last_attempt_error,
            found.attempts,
            found.amount.minor_units,
            found.amount.currency_code,
        )

    headings = ("APPLICATION", "STATE", "REASON", "ATTEMPTS", "AMOUNT", "CURRENCY")
    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        if not watch:
            listed = await client.call(
                "TransferService/ListApplications",
                ListApplicationsRequest(payer_account_id=login.account_id),
                ListApplicationsResponse,
                login,
            )
            say(output, table(headings, map(row, listed.applications)), plain(listed))
            return
        with suppress(KeyboardInterrupt):
            async for found in client.stream(
                "TransferService/WatchApplications",
                WatchApplicationsRequest(payer_account_id=login.account_id),
                Application,
                login,
            ):
                say(output, "  ".join(str(cell) for cell in row(found)), plain(found))


@command
async def cancel(
    context: typer.Context,
    application_id: str,
    user: User = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Withdraw a queued transfer. Example: duohuo cancel q-a-3fa-0192f0c1..."""
    from duohuo.v1.transfer_service_pb2 import (
        APPLICATION_STATE_CANCELLED,
        Application,
        CancelApplicationRequest,
    )
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        found = await client.call(
            "TransferService/CancelApplication",
            CancelApplicationRequest(application_id=application_id),
            Application,
            login,
        )
        if found.state == APPLICATION_STATE_CANCELLED:
            text = "Cancelled; no money moved and none will."
        else:
            text = (
                "Not known yet: the payer's home center does not answer, and may have decided before.\n"
                "It is asked until it says: cancelled, or what it had decided. Follow it:"
                " duohuo applications --watch"
            )
        say(output, text, plain(found))


@command
async def fund(
    context: typer.Context,
    user: Payee,
    amount: Amount,
    currency: Currency = "CNY",
    deposit_id: Annotated[
        str | None, typer.Option("--id", help="The deposit's id; made up if left out.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Put money into an account, as an operator. Example: duohuo fund alice@example.com 10000"""
    from duohuo.v1.money_pb2 import Money
    from duohuo.v1.operator_service_pb2 import DepositRequest, DepositResponse
    from ops.client import ask_some_operator
    from ops.plain import plain
    from runtime.ids import RandomIds

    state = state_of(context)
    request = DepositRequest(
        deposit_id=deposit_id or RandomIds().unique(),
        user=user,
        amount=Money(currency_code=currency, minor_units=amount),
    )
    try:
        done = await ask_some_operator(state, "Deposit", request, DepositResponse)
    except Exception as error:
        add_id(error, request.deposit_id)
        raise
    say(output, f"Balance: {done.balance.minor_units} {done.balance.currency_code}", plain(done))


def set_payee(
    request: "TransferRequest | ApplyTransferRequest | ReserveFundsRequest", payee: str
) -> None:
    """Names the payee as the user did: by account id or by identifier."""
    from runtime.ids import account_slot

    if account_slot(payee) is not None:
        request.payee_account_id = payee
    else:
        request.payee_identifier = payee


def add_id(error: Exception, wanted: str) -> None:
    """Whoever does not know whether it ran needs the id to ask again."""
    from runtime.errors import RpcError

    if isinstance(error, RpcError) and error.ran:
        error.advice = f"{error.advice} Ask again with --id {wanted}: it runs at most once.".strip()
