"""Commands that do what a user's program would do with accounts and sessions."""

from typing import Annotated

import typer

from ops.arguments import Center, Password, User, state_of
from ops.output import Failure, Format, Output, command, say, table


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for work in (register, login, logout, sessions, whoami, profile, passwd):
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

    async with connected(state_of(context), center) as client:
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

    async with connected(state_of(context), center) as client:
        user, proofs = normal(identifier), client.sessions.device_proofs
        request = LoginRequest(
            identifier=user, password=password, device=device, device_proof=proofs.get(user, "")
        )
        session = await client.call("SessionService/Login", request, Session)
        proofs[user] = session.device_proof
        client.sessions.logins[user] = Login(session.account_id, session.token)
        client.sessions.current = user
        shown = plain(session)
        del shown["token"], shown["device_proof"]
        say(output, f"Logged in at center {session.origin_center} as {session.account_id}.", shown)


@command
async def logout(context: typer.Context, user: User = None, output: Output = Format.TEXT) -> None:
    """End a session. Example: duohuo logout"""
    from duohuo.v1.session_service_pb2 import LogoutRequest, LogoutResponse
    from ops.client import connected

    async with connected(state_of(context)) as client:
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
    end: Annotated[str | None, typer.Option(metavar="SESSION", help="End this one.")] = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """List a user's sessions in all centers, or end some. Example: duohuo sessions --end a-0192f0c1…"""
    from duohuo.v1.session_service_pb2 import (
        ListSessionsRequest,
        ListSessionsResponse,
        RevokeSessionRequest,
        RevokeSessionResponse,
        RevokeSessionsRequest,
        RevokeSessionsResponse,
    )
    from ops.client import connected
    from ops.plain import plain

    async with connected(state_of(context), center) as client:
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
        if end is not None:
            ended = await client.call(
                "SessionService/RevokeSession",
                RevokeSessionRequest(account_id=login.account_id, session_id=end),
                RevokeSessionResponse,
                login,
            )
            say(output, "The session is over.", plain(ended))
            return
        found = await client.call(
            "SessionService/ListSessions",
            ListSessionsRequest(account_id=login.account_id),
            ListSessionsResponse,
            login,
        )
        text = table(
            ("SESSION", "CENTER", "DEVICE", "SINCE", "LAST USED"),
            (
                (
                    s.session_id,
                    s.origin_center,
                    s.device,
                    s.create_time.ToJsonString(),
                    s.last_use_time.ToJsonString(),
                )
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

    async with connected(state_of(context), center) as client:
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
    async with connected(state_of(context), center) as client:
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
    """Change a user's password; other sessions end. Example: duohuo passwd"""
    from duohuo.v1.account_service_pb2 import ChangePasswordRequest, ChangePasswordResponse
    from ops.client import connected
    from runtime.ids import RandomIds

    async with connected(state_of(context), center) as client:
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
