"""Commands for entries of other centers' logs that a center could not apply."""

from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import state_of
from ops.output import Failure, Format, Output, command, say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from duohuo.v1.operator_service_pb2 import EntryName, ParkedAction

Center = Annotated[str, typer.Argument(help="The center that could not apply it.")]
Entry = Annotated[
    str, typer.Argument(help="Its name in `duohuo parked list`: source/topic/number.")
]

RETRY_TIMEOUT_S = 60.0


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    parked = typer.Typer(
        no_args_is_help=True, help="See, retry or drop entries that a center could not apply."
    )
    parked.command("list")(list_parked)
    parked.command()(retry)
    parked.command()(drop)
    app.add_typer(parked, name="parked")


@command
async def list_parked(context: typer.Context, center: Center, output: Output = Format.TEXT) -> None:
    """Show what a center could not apply, and what was done about it. Example: duohuo parked list b"""
    from duohuo.v1.operator_service_pb2 import ListParkedRequest, ListParkedResponse
    from ops.client import ask_operator
    from ops.plain import plain
    from runtime.clock import iso

    found = await ask_operator(
        state_of(context), center, "ListParked", ListParkedRequest(), ListParkedResponse
    )
    rows = [
        (
            _shown(entry.name),
            entry.kind or "(cannot be decoded)",
            entry.reason,
            iso(entry.park_time.ToMilliseconds()),
        )
        for entry in found.entries
    ]
    parts = [
        table(("ENTRY", "KIND", "REASON", "SINCE"), rows)
        if rows
        else f"Center {center} has applied everything that came.",
    ]
    if found.actions:
        parts.append(_actions(found.actions))
    if found.silent_roles:
        parts.append(f"Not asked, because silent: {', '.join(found.silent_roles)}")
    say(output, "\n\n".join(parts), plain(found))


@command
async def retry(
    context: typer.Context,
    center: Center,
    entry: Annotated[
        str | None, typer.Argument(help="source/topic/number; all of them if left out.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Apply parked entries, now that the cause is gone. Example: duohuo parked retry b a/ledger/17"""
    from duohuo.v1.operator_service_pb2 import RetryParkedRequest, RetryParkedResponse
    from ops.client import ask_operator
    from ops.plain import plain

    request = RetryParkedRequest(name=_name(entry) if entry else None)
    done = await ask_operator(
        state_of(context), center, "RetryParked", request, RetryParkedResponse, RETRY_TIMEOUT_S
    )
    text = _actions(done.actions) if done.actions else f"Nothing is parked at center {center}."
    if done.silent_roles:
        text += f"\nNot asked, because silent: {', '.join(done.silent_roles)}"
    say(output, text, plain(done))
    if done.silent_roles or any(action.after != "applied" for action in done.actions):
        raise typer.Exit(1)


@command
async def drop(
    context: typer.Context, center: Center, entry: Entry, output: Output = Format.TEXT
) -> None:
    """Give a parked entry up: the center will never have its effect, so its copies will differ, and
    money that the entry brings stays in transit. Example: duohuo parked drop b a/ledger/17"""
    from duohuo.v1.operator_service_pb2 import DropParkedRequest, DropParkedResponse
    from ops.client import ask_operator
    from ops.plain import plain

    done = await ask_operator(
        state_of(context),
        center,
        "DropParked",
        DropParkedRequest(name=_name(entry)),
        DropParkedResponse,
    )
    say(output, _actions(done.actions), plain(done))


def _name(entry: str) -> "EntryName":
    from duohuo.v1.operator_service_pb2 import EntryName

    parts = entry.split("/")
    if len(parts) != 3 or not parts[2].isdecimal():
        raise Failure(
            f"{entry} does not name an entry",
            advice="Names look like a/ledger/17; see `parked list`.",
        )
    return EntryName(source_center=parts[0], topic=parts[1], seq=int(parts[2]))


def _shown(name: "EntryName") -> str:
    return f"{name.source_center}/{name.topic}/{name.seq}"


def _actions(actions: "Sequence[ParkedAction]") -> str:
    from runtime.clock import iso

    return table(
        ("WHEN", "WHO", "ACTION", "ENTRY", "BEFORE", "AFTER"),
        [
            (
                iso(one.time.ToMilliseconds()),
                one.who,
                one.action,
                _shown(one.name),
                one.before,
                one.after,
            )
            for one in actions
        ],
    )
