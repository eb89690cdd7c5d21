"""What commands print: a sentence or a table for people, or JSON with `-o json`."""

import asyncio
import functools
import json
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

P = ParamSpec("P")


class Format(StrEnum):
    TEXT = "text"
    JSON = "json"


Output = Annotated[Format, typer.Option("-o", "--output", help="For people, or for programs.")]


@dataclass(frozen=True, slots=True)
class Options:
    """What is given before the command."""

    state: Path


@dataclass
class Failure(Exception):
    """A command that did not do what it should: what happened, whether it ran, what to do."""

    message: str
    reason: str = ""
    ran: bool | None = None
    advice: str = ""
    announced: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"error: {self.message}" + (f" ({self.reason})" if self.reason else "")]
        if self.ran is not None:
            lines.append("It may have run." if self.ran else "It did not run.")
        if self.advice:
            lines.append(self.advice)
        lines += (f"! {text}" for text in self.announced)
        return "\n".join(lines)


def command(
    work: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, None]:
    """Makes a command of a coroutine function; failures end it with exit code 1."""

    @functools.wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            asyncio.run(work(*args, **kwargs))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            if kwargs.get("output") is Format.JSON:
                shown = {
                    key: value for key, value in vars(failure).items() if value not in (None, ())
                }
                print(json.dumps({"error": shown}, indent=2))  # noqa: T201 - what was asked for
            else:
                print(failure, file=sys.stderr)  # noqa: T201 - for people
            raise typer.Exit(1) from None

    return run


def say(output: Format, text: str, data: Any) -> None:
    """Prints the text, or the data as JSON."""
    print(json.dumps(data, indent=2) if output is Format.JSON else text)  # noqa: T201 - its purpose


def progress() -> Callable[[str], None] | None:
    """Says on a terminal's standard error how far it is, in one line; None if there is no terminal."""
    if not sys.stderr.isatty():
        return None
    return lambda line: print(f"\r\033[K{line}\r", end="", file=sys.stderr, flush=True)  # noqa: T201 - its purpose


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns for people, wide enough for their cells."""
    cells = [tuple(headings), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _failure(error: Exception) -> Failure | None:
    from ops.control import ControlError
    from ops.mesh_file import NoMesh
    from runtime.errors import RpcError

    match error:
        case Failure():
            return error
        case RpcError():
            advice = error.advice
            if error.retry_after_ms is not None:
                advice = f"{advice} Retry in {error.retry_after_ms / 1000:g} s.".strip()
            field = error.field_name
            named = not field or error.message.startswith(field)
            message = error.message if named else f"{field} {error.message}"
            announced = tuple(one.text for one in error.announcements)
            return Failure(message, error.reason, error.ran, advice, announced)
        case NoMesh() | ControlError():
            return Failure(str(error))
    return None
