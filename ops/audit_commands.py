"""The command that shows what operators did."""

from typing import Annotated

import typer

from ops.arguments import Center, state_of
from ops.output import Failure, Format, Output, command, say, table


def add_to(app: typer.Typer) -> None:
    """Adds the command to the program."""
    audit = typer.Typer(no_args_is_help=True, help="See what operators did.")
    audit.command("list")(list_audit)
    app.add_typer(audit, name="audit")


@command
async def list_audit(
    context: typer.Context,
    target: Annotated[str, typer.Option(help="Only this id, such as an account's.")] = "",
    action: Annotated[str, typer.Option(help="Only this action, such as deposit.")] = "",
    since: Annotated[str, typer.Option(help="Only from this date on: 2026-11-25.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 100,
    center: Center = None,
    output: Output = Format.TEXT,
) -> None:
    """Show what operators did at all centers. Example: duohuo audit list --action deposit"""
    from datetime import UTC, datetime

    from duohuo.v1.operator_service_pb2 import ListAuditRequest, ListAuditResponse
    from ops import mesh_file
    from ops.client import ask_operator
    from ops.plain import plain
    from runtime.clock import iso

    state = state_of(context)
    request = ListAuditRequest(target=target, action=action, limit=limit)
    if since:
        try:
            request.since_time.FromDatetime(datetime.fromisoformat(since).replace(tzinfo=UTC))
        except ValueError:
            raise Failure(f"{since} is not a date", advice="Dates look like 2026-11-25.") from None
    asked = center or next(iter(mesh_file.read(state).centers))
    found = await ask_operator(state, asked, "ListAudit", request, ListAuditResponse)
    rows = [
        (
            iso(one.time.ToMilliseconds()),
            one.center,
            one.who,
            one.action,
            one.target,
            one.before,
            one.after,
        )
        for one in found.actions
    ]
    text = table(("WHEN", "CENTER", "WHO", "ACTION", "TARGET", "BEFORE", "AFTER"), rows)
    if not rows:
        text = "No operator has done anything of this kind."
    if found.silent_roles:
        text += f"\nNot asked, because silent: {', '.join(found.silent_roles)}"
    say(output, text, plain(found))
