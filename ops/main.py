"""The `duohuo` command. Each command is imported when it is called: start-up is noticed."""

from pathlib import Path
from typing import Annotated

import typer

from ops import (
    account_commands,
    announce_commands,
    audit_commands,
    bench_commands,
    center_commands,
    certificate_commands,
    control_commands,
    export_commands,
    hold_commands,
    identifier_commands,
    money_commands,
    notification_commands,
    operator_commands,
    parked_commands,
    route_commands,
    statement_commands,
)
from ops.output import Options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Accounts, sessions and money that stay up while a whole data center goes down.",
)
center_commands.add_to(app)
account_commands.add_to(app)
identifier_commands.add_to(app)
money_commands.add_to(app)
statement_commands.add_to(app)
hold_commands.add_to(app)
export_commands.add_to(app)
control_commands.add_to(app)
route_commands.add_to(app)
announce_commands.add_to(app)
parked_commands.add_to(app)
audit_commands.add_to(app)
notification_commands.add_to(app)
operator_commands.add_to(app)
certificate_commands.add_to(app)
bench_commands.add_to(app)


@app.callback()
def options(
    context: typer.Context,
    state: Annotated[Path, typer.Option(help="Which mesh: its state directory.")] = Path(".duohuo"),
) -> None:
    """Accounts, sessions and money that stay up while a whole data center goes down."""
    context.obj = Options(state)


def main() -> None:
    """Runs the command."""
    app()


if __name__ == "__main__":
    main()
