"""Commands that do what a user's program would do: register, log in, move money."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.output import Failure, Format, Options, Output, command, say, table

if TYPE_CHECKING:
    from duohuo.v1.transfer_service_pb2 import ApplyTransferRequest, TransferRequest

Center = Annotated[
    str | None, typer.Option("--center", help="Which center's gateway to try first.")
]
Password = Annotated[
    str,
    typer.Option(
        prompt=True,
        hide_input=True,
        envvar="DUOHUO_PASSWORD",
        help="Better left to the prompt or to DUOHUO_PASSWORD: other users can see arguments.",
    ),
]
User = Annotated[
    str | None, typer.Argument(help="Identifier or account id; who logged in last if left out.")
]
Currency = Annotated[str, typer.Option(help="ISO 4217 code.")]
From = Annotated[
    str | None, typer.Option("--from", help="The payer; who logged in last if left out.")
]
TransferId = Annotated[
    str | None,
    typer.Option("--id", help="The transfer's id; made up if left out. Repeat it to ask again."),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for work in (
        register,
        login,
        logout,
        sessions,
        whoami,
        profile,
        passwd,
        balance,
        entries,
        transfer,
        apply,
        applications,
        cancel,
        fund,
    ):
        app.command()(work)


@command
async def register(
    context: typer.Context,
    identifier: Annotated[str, typer.Argument(help="E-mail address or phone number.")],
    password: Password,
    name: Annotated[str, typer.Option(help="Display name.")] = "",
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Create an account. Example: duohuo register alice@example.com"""
    from duohuo.v1.account_service_pb2 import Account, RegisterRequest
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    async with connected(_state(context), center) as client:
        account = await client.call(
            "AccountService/Register",
            RegisterRequest(
                identifier=identifier,
                password=password,
                display_name=name,
                request_id=RandomIds().unique(),
            ),
            Account,
        )
        say(
            output,
            f"Account {account.account_id} is yours; its home is center {account.home_center}.\n"
            f"Next: duohuo login {identifier}",
            plain(account),
        )


@command
async def login(
    context: typer.Context,
    identifier: Annotated[str, typer.Argument(help="E-mail address or phone number.")],
    password: Password,
    device: Annotated[str, typer.Option(help="A name for this device.")] = "duohuo command line",
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Start a session, kept in the state directory. Example: duohuo login alice@example.com"""
    from duohuo.v1.session_service_pb2 import LoginRequest, Session
    from ops.client import Login, connected, normal
    from ops.plain import plain

    async with connected(_state(context), center) as client:
        request = LoginRequest(identifier=identifier, password=password, device=device)
        session = await client.call("SessionService/Login", request, Session)
        user = normal(identifier)
        client.sessions.logins[user] = Login(session.account_id, session.token)
        client.sessions.current = user
        shown = plain(session)
        del shown["token"]
        say(output, f"Logged in at center {session.origin_center} as {session.account_id}.", shown)


@command
async def logout(context: typer.Context, user: User = None, output: Output = Format.TEXT) -> None:
    """End a session. Example: duohuo logout"""
    from duohuo.v1.session_service_pb2 import LogoutRequest, LogoutResponse
    from ops.client import connected

    async with connected(_state(context)) as client:
        login = client.sessions.of(user)
        await client.call("SessionService/Logout", LogoutRequest(token=login.token), LogoutResponse)
        client.sessions.logins = {
            name: other for name, other in client.sessions.logins.items() if other is not login
        }
        say(output, "Logged out.", {"account_id": login.account_id})


@command
async def sessions(
    context: typer.Context,
    user: User = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="End them all, everywhere.")] = False,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """List a user's sessions in all centers. Example: duohuo sessions"""
    from duohuo.v1.session_service_pb2 import (
        ListSessionsRequest,
        ListSessionsResponse,
        RevokeSessionsRequest,
        RevokeSessionsResponse,
    )
    from ops.client import connected
    from ops.plain import plain

    async with connected(_state(context), center) as client:
        login = client.sessions.of(user)
        if revoke:
            done = await client.call(
                "SessionService/RevokeSessions",
                RevokeSessionsRequest(account_id=login.account_id),
                RevokeSessionsResponse,
                login,
            )
            say(output, "All sessions are over; those of other centers follow.", plain(done))
            return
        found = await client.call(
            "SessionService/ListSessions",
            ListSessionsRequest(account_id=login.account_id),
            ListSessionsResponse,
            login,
        )
        text = table(
            ("SESSION", "CENTER", "DEVICE", "SINCE"),
            (
                (s.session_id, s.origin_center, s.device, s.create_time.ToJsonString())
                for s in found.sessions
            ),
        )
        if found.unreachable_centers:
            text += f"\nNot asked, because away: {', '.join(found.unreachable_centers)}"
        say(output, text, plain(found))


@command
async def whoami(
    context: typer.Context, user: User = None, center: Center = None, output: Output = Format.TEXT
) -> None:
    """Show the account of a logged-in user. Example: duohuo whoami --center b"""
    from duohuo.v1.account_service_pb2 import Account, GetAccountRequest
    from ops.client import connected
    from ops.plain import plain

    async with connected(_state(context), center) as client:
        login = client.sessions.of(user)
        account = await client.call(
            "AccountService/GetAccount",
            GetAccountRequest(account_id=login.account_id),
            Account,
            login,
        )
        text = (
            f"{', '.join(account.identifiers)}  {account.profile.display_name}\n"
            f"account {account.account_id}, home center {account.home_center},"
            f" answered by center {client.served_by}"
        )
        say(output, text, {**plain(account), "served_by": client.served_by})


@command
async def profile(
    context: typer.Context,
    user: User = None,
    name: Annotated[str | None, typer.Option(help="Display name.")] = None,
    language: Annotated[str | None, typer.Option(help="BCP 47 tag.")] = None,
    time_zone: Annotated[str | None, typer.Option(help="IANA name.")] = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Change a user's profile. Example: duohuo profile --name "Alice B." """
    from google.protobuf.field_mask_pb2 import FieldMask

    from duohuo.v1.account_service_pb2 import Account, Profile, UpdateProfileRequest
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    given = {"display_name": name, "language": language, "time_zone": time_zone}
    fields = {field: value for field, value in given.items() if value is not None}
    if not fields:
        raise Failure("nothing to change", advice="Give --name, --language or --time-zone.")
    async with connected(_state(context), center) as client:
        login = client.sessions.of(user)
        account = await client.call(
            "AccountService/UpdateProfile",
            UpdateProfileRequest(
                account_id=login.account_id,
                profile=Profile(**fields),
                update_mask=FieldMask(paths=list(fields)),
                request_id=RandomIds().unique(),
            ),
            Account,
            login,
        )
        say(output, f"Changed at center {client.served_by}.", plain(account))


@command
async def passwd(
    context: typer.Context,
    password: Password,
    new_password: Annotated[
        str,
        typer.Option(
            prompt=True, hide_input=True, confirmation_prompt=True, envvar="DUOHUO_NEW_PASSWORD"
        ),
    ],
    user: User = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Change a user's password. Example: duohuo passwd"""
    from duohuo.v1.account_service_pb2 import ChangePasswordRequest, ChangePasswordResponse
    from ops.client import connected
    from runtime.ids import RandomIds

    async with connected(_state(context), center) as client:
        login = client.sessions.of(user)
        await client.call(
            "AccountService/ChangePassword",
            ChangePasswordRequest(
                account_id=login.account_id,
                old_password=password,
                new_password=new_password,
                request_id=RandomIds().unique(),
            ),
            ChangePasswordResponse,
            login,
        )
        say(output, f"Changed at center {client.served_by}.", {"served_by": client.served_by})


@command
async def balance(
    context: typer.Context, user: User = None, center: Center = None, output: Output = Format.TEXT
) -> None:
    """Show a user's balance. Example: duohuo balance alice@example.com"""
    from duohuo.v1.transfer_service_pb2 import Balance, GetBalanceRequest
    from ops.client import connected
    from ops.plain import plain

    async with connected(_state(context), center) as client:
        login = client.sessions.of(user)
        found = await client.call(
            "TransferService/GetBalance",
            GetBalanceRequest(account_id=login.account_id),
            Balance,
            login,
        )
        text = f"{found.balance.minor_units} {found.balance.currency_code}"
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

    async with connected(_state(context), center) as client:
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
    payee: Annotated[str, typer.Argument(help="Identifier or account id.")],
    amount: Annotated[int, typer.Argument(help="In minor units.")],
    currency: Currency = "CNY",
    payer: From = None,
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

    async with connected(_state(context), center) as client:
        login = client.sessions.of(payer)
        request = TransferRequest(
            transfer_id=transfer_id or RandomIds().unique(),
            payer_account_id=login.account_id,
            amount=Money(currency_code=currency, minor_units=amount),
            memo=memo,
        )
        _set_payee(request, payee)
        try:
            result = await client.call("TransferService/Transfer", request, TransferResult, login)
        except Exception as error:
            _add_id(error, request.transfer_id)
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
    payee: Annotated[str, typer.Argument(help="Identifier or account id.")],
    amount: Annotated[int, typer.Argument(help="In minor units.")],
    currency: Currency = "CNY",
    payer: From = None,
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

    async with connected(_state(context), center) as client:
        login = client.sessions.of(payer)
        request = ApplyTransferRequest(
            transfer_id=transfer_id or RandomIds().unique(),
            payer_account_id=login.account_id,
            amount=Money(currency_code=currency, minor_units=amount),
            memo=memo,
        )
        _set_payee(request, payee)
        try:
            found = await client.call("TransferService/ApplyTransfer", request, Application, login)
        except Exception as error:
            _add_id(error, request.transfer_id)
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
    async with connected(_state(context), center) as client:
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
    from duohuo.v1.transfer_service_pb2 import Application, CancelApplicationRequest
    from ops.client import connected
    from ops.plain import plain

    async with connected(_state(context), center) as client:
        login = client.sessions.of(user)
        found = await client.call(
            "TransferService/CancelApplication",
            CancelApplicationRequest(application_id=application_id),
            Application,
            login,
        )
        say(output, "Cancelled; no money moved and none will.", plain(found))


@command
async def fund(
    context: typer.Context,
    user: Annotated[str, typer.Argument(help="Identifier or account id.")],
    amount: Annotated[int, typer.Argument(help="In minor units.")],
    currency: Currency = "CNY",
    deposit_id: Annotated[
        str | None, typer.Option("--id", help="The deposit's id; made up if left out.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Put money into an account, as an operator. Example: duohuo fund alice@example.com 10000"""
    from duohuo.v1.money_pb2 import Money
    from duohuo.v1.operator_service_pb2 import DepositRequest, DepositResponse
    from ops import mesh_file
    from ops.client import ask_operator
    from ops.plain import plain
    from runtime.errors import RpcError
    from runtime.ids import RandomIds

    state = _state(context)
    request = DepositRequest(
        deposit_id=deposit_id or RandomIds().unique(),
        user=user,
        amount=Money(currency_code=currency, minor_units=amount),
    )
    for center in mesh_file.read(state).centers:
        try:
            done = await ask_operator(state, center, "Deposit", request, DepositResponse)
        except RpcError as error:
            if error.reason != "CENTER_UNREACHABLE":
                _add_id(error, request.deposit_id)
                raise
            failed = error
        else:
            text = f"Balance: {done.balance.minor_units} {done.balance.currency_code}"
            say(output, text, plain(done))
            return
    _add_id(failed, request.deposit_id)
    raise failed


def _state(context: typer.Context) -> Path:
    options: Options = context.obj
    return options.state


def _set_payee(request: "TransferRequest | ApplyTransferRequest", payee: str) -> None:
    from runtime.ids import account_slot

    if account_slot(payee) is not None:
        request.payee_account_id = payee
    else:
        request.payee_identifier = payee


def _add_id(error: Exception, wanted: str) -> None:
    """Whoever does not know whether it ran needs the id to ask again."""
    from runtime.errors import RpcError

    if isinstance(error, RpcError) and error.ran:
        error.advice = f"{error.advice} Ask again with --id {wanted}: it runs at most once.".strip()
