"""`duohuo bench`: measures, and keeps what it has measured."""

from typing import Annotated

import typer

from ops.arguments import state_of
from ops.output import Failure, Format, Output, command, say


def add_to(app: typer.Typer) -> None:
    """Adds the command to the program."""
    app.command()(bench)


@command
async def bench(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="catch-up or queue; all if left out."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="How often to measure each case.")] = 3,
    entries: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000_000,
            help="How many log entries are missed (catch-up), or applications wait (queue).",
        ),
    ] = 100_000,
    port_base: Annotated[
        int, typer.Option(help="The benchmark's own mesh listens from here.")
    ] = 23_000,
    output: Output = Format.TEXT,
) -> None:
    """Measure with a mesh of its own; no other is needed. Example: duohuo bench catch-up --runs 5

    Progress goes to stderr. Results are kept as JSON in the state directory, under bench.
    """
    import sys

    from ops.bench import run as benches

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress for people

    try:
        wanted = benches.named(names or ())
    except KeyError as error:
        known = ", ".join(benches.BENCHMARKS)
        raise Failure(f"there is no benchmark {error}; there is {known}") from None
    plan = benches.Plan(runs, entries, port_base, state_of(context).absolute() / "bench")
    texts, data = [], []
    for benchmark in wanted:
        results, kept = await benches.run(benchmark, plan, tell)
        texts.append(f"{results.text()}\nkept in {kept}")
        data.append({**results.data(), "kept_in": str(kept)})
    say(output, "\n\n".join(texts), {"benchmarks": data})
