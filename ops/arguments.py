"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from ops.output import Options

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
Payee = Annotated[str, typer.Argument(help="Identifier or account id.")]
Amount = Annotated[int, typer.Argument(help="In minor units.")]
Payer = Annotated[
    str | None, typer.Option("--from", help="The payer; who logged in last if left out.")
]
TransferId = Annotated[
    str | None,
    typer.Option("--id", help="The transfer's id; made up if left out. Repeat it to ask again."),
]


def state_of(context: typer.Context) -> Path:
    """The state directory that the command was given."""
    options: Options = context.obj
    return options.state
