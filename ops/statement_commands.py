"""The command that exports a statement."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ops.arguments import Center, User, state_of
from ops.output import command


class StatementFormat(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def add_to(app: typer.Typer) -> None:
    """Adds the command to the program."""
    app.command()(statement)


@command
async def statement(
    context: typer.Context,
    user: User = None,
    since: Annotated[str, typer.Option(help="First day, UTC: 2026-11-01.")] = "",
    until: Annotated[str, typer.Option(help="Last day, UTC, included: 2026-11-30.")] = "",
    form: Annotated[
        StatementFormat, typer.Option("--format", "-o", help="For people, or for programs.")
    ] = StatementFormat.TABLE,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Write here instead; the file appears when it is complete, or not at all.",
        ),
    ] = None,
    center: Center = None,
) -> None:
    """Export a user's statement, newest entries first, each with the balance after it.

    In CSV, text that a spreadsheet would take for a formula (a memo such as =1+1) gets an apostrophe in
    front. Example: duohuo statement alice@example.com --since 2026-11-01 --format csv --output nov.csv
    """
    from ops import statement as statements
    from ops.client import connected

    wanted = statements.period(since, until)
    write = {
        StatementFormat.TABLE: statements.write_table,
        StatementFormat.CSV: statements.write_csv,
        StatementFormat.JSON: statements.write_json,
    }[form]
    async with connected(state_of(context), center) as client:
        found = statements.entries(client, client.sessions.of(user), wanted)
        if file is None:
            await write(sys.stdout, found)
        else:
            with statements.whole_file(file) as out:
                await write(out, found)
        if client.served_by != client.home:
            note = f"note: from center {client.served_by}'s copy; the newest may be missing"
            print(note, file=sys.stderr)  # noqa: T201 - for people, beside the statement
