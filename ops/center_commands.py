"""Commands that run centers: serve, up, and what can be done to a running mesh."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.arguments import state_of
from ops.output import Failure, Format, Output, command, progress, say

if TYPE_CHECKING:
    from ops.mesh_file import MeshView

Name = Annotated[str, typer.Argument(help="A center.")]


class Loss(StrEnum):
    """How a drill loses a center."""

    KILL = "kill"
    CUT = "cut"


class Drill(StrEnum):
    """What can go wrong on purpose."""

    CENTER_LOSS = "center-loss"
    DRAIN = "drain"
    NEMESIS = "nemesis"


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for mesh_command in (up, serve, status, verify, why, drill, simulate):
        app.command()(mesh_command)
    center = typer.Typer(no_args_is_help=True, help="Lose a center on purpose, and bring it back.")
    for verb, text in (
        ("kill", "SIGKILL everything of a center, its NATS included."),
        ("stop", "Stop a center in good order."),
        ("start", "Start a center that is not running."),
        ("pause", "SIGSTOP everything of a center."),
        ("resume", "SIGCONT everything of a center."),
    ):
        center.command(verb, help=f"{text} Example: duohuo center {verb} a")(_center_command(verb))
    app.add_typer(center, name="center")
    link = typer.Typer(no_args_is_help=True, help="Cut, heal or slow the link between two centers.")
    for link_command in (cut, heal, delay):
        link.command()(link_command)
    app.add_typer(link, name="link")


@command
async def up(
    context: typer.Context,
    centers: Annotated[str, typer.Option(help="Names of the centers, with commas.")] = "a,b",
    port_base: Annotated[
        int, typer.Option(help="Center number i listens from here + 100 i.")
    ] = 7000,
    wan_latency_ms: Annotated[
        int, typer.Option(min=0, max=10_000, help="Added each way between centers.")
    ] = 0,
    split: Annotated[bool, typer.Option("--split", help="One process for each role.")] = False,
    output: Output = Format.TEXT,
) -> None:
    """Run a whole mesh on this machine. Example: duohuo up --centers a,b,c --wan-latency-ms 20"""
    import json
    from dataclasses import asdict

    from ops import supervisor
    from ops.local_config import StartError
    from ops.mesh_file import MeshView

    state = state_of(context)

    def announce(mesh: MeshView) -> None:
        if output is Format.JSON:
            shown = asdict(mesh)
            del shown["control_token"]
            print(json.dumps(shown), flush=True)  # noqa: T201 - what was asked for
        else:
            print(_what_to_try(state, mesh), flush=True)  # noqa: T201 - as above

    try:
        code = await supervisor.run(
            centers.split(","), state, port_base, wan_latency_ms, split, announce
        )
    except StartError as error:
        raise Failure(str(error)) from None
    raise typer.Exit(code)


def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    center: Annotated[str | None, typer.Option(help="This center's name.")] = None,
    roles: Annotated[str | None, typer.Option(help="What to serve, with commas.")] = None,
) -> None:
    """Serve roles of one center. Example: duohuo serve --center a --roles account,session

    Settings that are not given come from the environment (DUOHUO_ and the name in capitals), then
    from the TOML file.
    """
    import sys

    import uvloop
    from pydantic import ValidationError

    from ops import serve as server
    from runtime.config import UnknownSettingError, load

    try:
        settings = load(config, center=center, roles=roles.split(",") if roles else None)
        uvloop.run(server.serve(settings))
    except ValidationError as error:
        problems = "\n".join(
            f"  {'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"
            for problem in error.errors()
        )
        print(f"error: the settings are wrong; nothing was started\n{problems}", file=sys.stderr)  # noqa: T201 - for people
        raise typer.Exit(2) from None
    except (server.StartError, UnknownSettingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - for people
        raise typer.Exit(1) from None


@command
async def status(context: typer.Context, output: Output = Format.TEXT) -> None:
    """Show who is up, how far behind, and what is queued. Example: duohuo status"""
    from ops import status as view

    text, data = await view.collect(state_of(context))
    say(output, text, data)


@command
async def verify(
    context: typer.Context,
    wait_s: Annotated[
        float, typer.Option(min=0, max=300, help="How long to wait for entries in flight.")
    ] = 10,
    output: Output = Format.TEXT,
) -> None:
    """Prove that no money is lost and all copies agree. Example: duohuo verify"""
    from ops import verify as checks

    report = await checks.verify(state_of(context), wait_s, progress())
    say(output, report.text(), report.data())
    if not report.passed:
        raise typer.Exit(1)


@command
async def why(
    context: typer.Context,
    wanted: Annotated[
        str,
        typer.Argument(metavar="ID", help="Transfer, application, trace, account or identifier."),
    ],
    spans: Annotated[
        bool, typer.Option("--spans", help="With every step and its milliseconds, while kept.")
    ] = False,
    output: Output = Format.TEXT,
) -> None:
    """Tell the story of a transfer: who asked, each attempt, what was decided on which balance, and what
    the other center did; or of an account's profile and password: which writes count, and which
    lost to them. Example: duohuo why 0192f0c1..."""
    from ops import why as stories

    text, data = await stories.tell(state_of(context), wanted, with_spans=spans)
    say(output, text, data)


@command
async def drill(
    context: typer.Context,
    name: Annotated[
        Drill,
        typer.Argument(help="One planned loss, a drained center, or seeded faults under load."),
    ] = Drill.CENTER_LOSS,
    how: Annotated[
        Loss, typer.Option(help="center-loss: kill the center, or cut it off.")
    ] = Loss.KILL,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=1440, help="nemesis: how long to break things.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="nemesis: which faults, when, and where.")] = 0,
    listed: Annotated[
        bool, typer.Option("--list", help="Show which drills there are, and what came of them.")
    ] = False,
    output: Output = Format.TEXT,
) -> None:
    """Break a mesh on purpose and see what holds. Example: duohuo drill nemesis --minutes 5 --seed 7"""
    from dataclasses import asdict

    from ops import drain_drill, drill_results
    from ops import drill as drills
    from ops.nemesis import run as nemeses

    if listed:
        say(output, *drill_results.shown(state_of(context)))
        return

    def tell(line: str) -> None:
        if output is Format.TEXT:
            print(line, flush=True)  # noqa: T201 - progress for people

    if name is Drill.NEMESIS:
        report = await nemeses.nemesis(state_of(context), minutes, seed, tell)
        passed, verdict, data = report.passed, report.text(), report.data()
    else:
        if name is Drill.DRAIN:
            outcome = await drain_drill.drain(state_of(context), tell)
            data = {"drill": name.value, **asdict(outcome)}
        else:
            outcome = await drills.center_loss(state_of(context), how.value, tell)
            data = {"drill": name.value, "how": how.value, **asdict(outcome)}
        passed, verdict = outcome.passed, outcome.text(name.value)
    drill_results.keep(state_of(context), data)
    say(output, verdict, data)
    if not passed:
        raise typer.Exit(1)


@command
async def simulate(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 100,
    seed: Annotated[int | None, typer.Option(help="This seed alone, with its timeline.")] = None,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    centers: Annotated[int, typer.Option(min=2, max=5, help="How many centers.")] = 3,
    minutes: Annotated[
        float, typer.Option(min=0.1, max=600, help="Simulated minutes of faults in each seed.")
    ] = 1.0,
    processes: Annotated[int, typer.Option(min=1, help="How many seeds at a time.")] = 2,
    output: Output = Format.TEXT,
) -> None:
    """Run the real services under seeded faults. Example: duohuo simulate --seeds 300"""
    import time
    from collections import Counter
    from dataclasses import asdict

    from ops.simulation.run import Setup, describe, run_seeds

    setup = Setup(centers, minutes)
    wanted = range(first, first + seeds) if seed is None else range(seed, seed + 1)
    started, broken, results = time.monotonic(), [], []
    reached: Counter[str] = Counter()
    simulated_s = busy_s = 0.0
    for result in run_seeds(wanted, setup, min(processes, len(wanted))):
        results.append((result.seed, result.digest))
        reached.update(result.reached)
        simulated_s, busy_s = simulated_s + result.simulated_s, busy_s + result.took_s
        if result.broken:
            broken.append(asdict(result))
        if output is Format.TEXT and result.broken:
            print(describe(result, setup), flush=True)  # noqa: T201 - what people wait for
        if output is Format.TEXT and len(results) % 100 == 0:
            print(f"{len(results)} seeds, {len(broken)} broken", flush=True)  # noqa: T201 - progress
    took_s = time.monotonic() - started
    text = (
        f"{len(results)} seeds, {len(broken)} broken; {simulated_s / 60:.0f} simulated minutes in"
        f" {took_s:.0f} s ({simulated_s / busy_s:.0f} a minute on a core)\n"
        f"reached: {', '.join(f'{name} {count}' for name, count in sorted(reached.items()))}"
    )
    if seed is not None:
        text += f"\nhistory {results[0][1]}"
    data = {
        "seeds": len(results),
        "broken": broken,
        "simulated_s": simulated_s,
        "took_s": took_s,
        "reached": dict(reached),
        "histories": dict(results),
    }
    say(output, text, data)
    if broken:
        raise typer.Exit(1)


def _center_command(verb: str) -> Callable[..., None]:
    @command
    async def work(context: typer.Context, name: Name, output: Output = Format.TEXT) -> None:
        _control(context, f"center {verb}", output, f"Center {name}: {verb} done.", center=name)

    return work


@command
async def cut(
    context: typer.Context, first: Name, second: Name, output: Output = Format.TEXT
) -> None:
    """Stop all traffic between two centers, both ways. Example: duohuo link cut a b"""
    done = f"The link between {first} and {second} is cut."
    _control(context, "link cut", output, done, first=first, second=second)


@command
async def heal(
    context: typer.Context, first: Name, second: Name, output: Output = Format.TEXT
) -> None:
    """Let traffic flow again, at the normal speed. Example: duohuo link heal a b"""
    done = f"The link between {first} and {second} is up."
    _control(context, "link heal", output, done, first=first, second=second)


@command
async def delay(
    context: typer.Context,
    first: Name,
    second: Name,
    delay_ms: Annotated[int, typer.Argument(min=0, max=10_000, help="Added each way.")],
    output: Output = Format.TEXT,
) -> None:
    """Slow a link down, both ways. Example: duohuo link delay a b 50"""
    done = f"The link between {first} and {second} takes {delay_ms} ms more each way."
    _control(context, "link delay", output, done, first=first, second=second, delay_ms=delay_ms)


def _control(
    context: typer.Context, action: str, output: Format, done: str, **arguments: object
) -> None:
    from ops import control, mesh_file

    answer = control.request(mesh_file.read(state_of(context)), action, **arguments)
    say(output, done, answer)


def _what_to_try(state: Path, mesh: "MeshView") -> str:
    option = "" if state == Path(".duohuo") else f" --state {state}"
    program = f"duohuo{option}"
    centers = "\n".join(
        f"  center {name}: gateway {center.gateway}, operators {center.operator}"
        for name, center in mesh.centers.items()
    )
    first = next(iter(mesh.centers))
    return (
        f"Duohuo is up: {len(mesh.centers)} centers, all alive.\n{centers}\n\n"
        "Try in another terminal (Ctrl-C here stops everything, data is kept):\n"
        f"  {program} register alice@example.com    then: login, fund, balance, transfer, apply\n"
        f"  {program} status\n"
        f"  {program} drill center-loss\n"
        f"  {program} center kill {first}"
    )
