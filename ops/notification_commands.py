"""Commands for notifications: a user's own setting, and what operators see of those undelivered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import Center, User, state_of
from ops.output import Failure, Format, Output, command, say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from duohuo.v1.account_service_pb2 import Notification
    from duohuo.v1.operator_service_pb2 import Delivery

Origin = Annotated[str, typer.Argument(help="The center that accepted the application.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(notify)
    undelivered = typer.Typer(
        no_args_is_help=True, help="See, retry or drop notifications that did not reach their user."
    )
    undelivered.command("list")(list_undelivered)
    undelivered.command()(retry)
    undelivered.command()(drop)
    app.add_typer(undelivered, name="notifications")


@command
async def notify(
    context: typer.Context,
    user: User = None,
    webhook: Annotated[
        str | None, typer.Option(help="The URL to call, https; an empty one for none.")
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(help="Holds the secret to sign calls with; one is made up if left out."),
    ] = None,
    email: Annotated[
        bool | None, typer.Option("--email/--no-email", help="Mail to the account's own address.")
    ] = None,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Show or change how a user hears of decided applications.
    Example: duohuo notify --webhook https://example.com/hooks --email"""
    from duohuo.v1.account_service_pb2 import (
        GetNotificationRequest,
        Notification,
        SetNotificationRequest,
    )
    from ops.client import connected
    from ops.plain import plain
    from runtime.ids import RandomIds

    if secret_file is not None and not webhook:
        raise Failure("a secret is for a webhook", advice="Give --webhook too.")
    async with connected(state_of(context), center) as client:
        login = client.sessions.of(user)
        present = await client.call(
            "AccountService/GetNotification",
            GetNotificationRequest(account_id=login.account_id),
            Notification,
            login,
        )
        if webhook is None and email is None:
            say(output, _setting(present), plain(present))
            return
        made_up, secret = "", ""
        if secret_file is not None:
            secret = secret_file.read_text().strip()
        elif webhook and not present.webhook_secret_set:
            secret = made_up = RandomIds().secret()
        changed = await client.call(
            "AccountService/SetNotification",
            SetNotificationRequest(
                account_id=login.account_id,
                webhook_url=present.webhook_url if webhook is None else webhook,
                webhook_secret=secret,
                email=present.email if email is None else email,
                request_id=RandomIds().unique(),
            ),
            Notification,
            login,
        )
        shown = plain(changed)
        text = _setting(changed)
        if made_up:
            shown["webhook_secret"] = made_up
            text += f"\nThe calls are signed with this secret, which is not shown again: {made_up}"
        say(output, text, shown)


@command
async def list_undelivered(
    context: typer.Context, center: Origin, output: Output = Format.TEXT
) -> None:
    """Show a center's dead letters, and what it still tries. Example: duohuo notifications list a"""
    from duohuo.v1.operator_service_pb2 import (
        ListNotificationsRequest,
        ListNotificationsResponse,
    )
    from ops.client import ask_operator
    from ops.plain import plain

    found = await ask_operator(
        state_of(context),
        center,
        "ListNotifications",
        ListNotificationsRequest(),
        ListNotificationsResponse,
    )
    nothing = f"Every notification of center {center} has arrived, or is on its way."
    say(output, _deliveries(found.deliveries) if found.deliveries else nothing, plain(found))


@command
async def retry(
    context: typer.Context,
    center: Origin,
    notification: Annotated[
        str | None, typer.Argument(help="Its id in the list; all dead letters if left out.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Deliver dead letters after all. Example: duohuo notifications retry a"""
    from duohuo.v1.operator_service_pb2 import (
        RetryNotificationsRequest,
        RetryNotificationsResponse,
    )
    from ops.client import ask_operator
    from ops.plain import plain

    done = await ask_operator(
        state_of(context),
        center,
        "RetryNotifications",
        RetryNotificationsRequest(notification_id=notification or ""),
        RetryNotificationsResponse,
    )
    nothing = f"Center {center} has no dead letters."
    say(output, _deliveries(done.deliveries) if done.deliveries else nothing, plain(done))


@command
async def drop(
    context: typer.Context,
    center: Origin,
    notification: Annotated[str, typer.Argument(help="Its id in the list.")],
    output: Output = Format.TEXT,
) -> None:
    """Give up what is not delivered of a notification; its user still sees the application's end when
    asking. Example: duohuo notifications drop a decided-q-a-3fa-0192f0c1d2e3f4a5b6c7d8e9f0a1b2c3"""
    from duohuo.v1.operator_service_pb2 import DropNotificationRequest, DropNotificationResponse
    from ops.client import ask_operator
    from ops.plain import plain

    done = await ask_operator(
        state_of(context),
        center,
        "DropNotification",
        DropNotificationRequest(notification_id=notification),
        DropNotificationResponse,
    )
    say(output, _deliveries(done.deliveries), plain(done))


def _setting(setting: "Notification") -> str:
    return (
        f"webhook: {setting.webhook_url or 'none'}\n"
        f"mail:    {'to the address of the account' if setting.email else 'none'}"
    )


def _deliveries(deliveries: "Sequence[Delivery]") -> str:
    from duohuo.v1.operator_service_pb2 import Channel, DeliveryState
    from runtime.clock import iso

    return table(
        ("NOTIFICATION", "CHANNEL", "STATE", "ATTEMPTS", "LAST ERROR", "SINCE", "NEXT ATTEMPT"),
        [
            (
                one.notification_id,
                Channel.Name(one.channel).removeprefix("CHANNEL_"),
                DeliveryState.Name(one.state).removeprefix("DELIVERY_STATE_"),
                one.attempts,
                one.last_error,
                iso(one.create_time.ToMilliseconds()),
                iso(one.next_attempt_time.ToMilliseconds())
                if one.HasField("next_attempt_time")
                else "",
            )
            for one in deliveries
        ],
    )
