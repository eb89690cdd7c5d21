"""Commands for who may act at the operators' port: a file that gateways read at each call."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import state_of
from ops.output import Failure, Format, Output, command, say, table
from runtime.operators import Role

if TYPE_CHECKING:
    from runtime.operators import Operator

Name = Annotated[str, typer.Argument(help="A name, as the audit log will show it.")]
File = Annotated[
    Path | None,
    typer.Option("--file", help="The operators' file; that of the local mesh if left out."),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    operator = typer.Typer(no_args_is_help=True, help="Say who may look, or act, as an operator.")
    operator.command()(add)
    operator.command("list")(list_operators)
    operator.command()(remove)
    app.add_typer(operator, name="operator")


@command
async def add(
    context: typer.Context,
    name: Name,
    role: Annotated[Role, typer.Option(help="A viewer may look at everything.")] = "viewer",
    days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="For so long; for ever if left out.")
    ] = None,
    file: File = None,
    output: Output = Format.TEXT,
) -> None:
    """Make a token for somebody. Example: duohuo operator add ann --role viewer --days 90

    The token is shown once, and kept nowhere: ann sets DUOHUO_OPERATOR_TOKEN to it. It counts at once.
    """
    import secrets
    from datetime import UTC, datetime, timedelta

    from runtime.operators import NAME, Operator, token_hash

    path, present = _read(context, file)
    if not NAME.fullmatch(name):
        raise Failure("a name has up to 32 of a-z, 0-9, '.', '_' and '-', and begins with a letter")
    if any(one.name == name for one in present):
        raise Failure(f"there is an operator {name}", advice="Remove that one first.")
    token = secrets.token_urlsafe(32)
    last_day = None if days is None else datetime.now(UTC).date() + timedelta(days=days)
    made = Operator(name, role, token_hash(token), last_day)
    _write(path, [*present, made])
    say(
        output,
        f"{name} is {role}{f' until {last_day}' if last_day else ''}. The token, shown only now:\n{token}",
        {**_shown(made), "token": token},
    )


@command
async def list_operators(
    context: typer.Context, file: File = None, output: Output = Format.TEXT
) -> None:
    """Show who they are. Example: duohuo operator list"""
    _, present = _read(context, file)
    rows = [(one.name, one.role, str(one.last_day or "never")) for one in present]
    say(
        output,
        table(("NAME", "ROLE", "EXPIRES"), rows),
        {"operators": [_shown(one) for one in present]},
    )


@command
async def remove(
    context: typer.Context, name: Name, file: File = None, output: Output = Format.TEXT
) -> None:
    """Take somebody's token away, at once. Example: duohuo operator remove ann"""
    path, present = _read(context, file)
    left = [one for one in present if one.name != name]
    if len(left) == len(present):
        raise Failure(f"there is no operator {name}", advice="See `duohuo operator list`.")
    _write(path, left)
    say(output, f"{name} is no operator any more.", {"removed": name})


def _shown(one: "Operator") -> dict[str, str]:
    return {
        "name": one.name,
        "role": one.role,
        "last_day": one.last_day.isoformat() if one.last_day else "",
    }


def _read(context: typer.Context, file: Path | None) -> tuple[Path, list["Operator"]]:
    from ops import mesh_file
    from runtime.operators import parse

    path = file or state_of(context) / mesh_file.OPERATORS_NAME
    try:
        return path, parse(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read {path}: {error}") from None


def _write(path: Path, operators: list["Operator"]) -> None:
    from ops import mesh_file

    try:
        mesh_file.write_private(path, "".join(f"{one.line()}\n" for one in operators))
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from None
