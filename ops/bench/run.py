"""Runs benchmarks, their cases in turn, and keeps the results."""

import asyncio
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops import mesh_file
from ops.bench.benchmark import Benchmark, Figures, Setup, summarise
from ops.bench.catch_up import CATCH_UP
from ops.bench.flood import FLOOD
from ops.bench.login_timing import LOGIN_TIMING
from ops.bench.queue import QUEUE
from ops.output import table
from runtime.clock import SystemClock, iso

BENCHMARKS = {benchmark.name: benchmark for benchmark in (CATCH_UP, FLOOD, LOGIN_TIMING, QUEUE)}


@dataclass(slots=True)
class Results:
    """The figures of one benchmark, run by run."""

    benchmark: str
    entries: int
    start_ms: int
    runs: list[tuple[str, Figures]] = field(default_factory=list)

    def of(self, case: str) -> list[Figures]:
        return [figures for run_case, figures in self.runs if run_case == case]

    def data(self) -> dict[str, Any]:
        """For programs, and for keeping."""
        cases = dict.fromkeys(case for case, _ in self.runs)
        return {
            "benchmark": self.benchmark,
            "start_time": iso(self.start_ms),
            "entries": self.entries,
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "summary": {
                case: {name: one._asdict() for name, one in summarise(self.of(case)).items()}
                for case in cases
            },
            "runs": [{"case": case, "figures": figures} for case, figures in self.runs],
        }

    def text(self) -> str:
        """For people: the median of each figure, and its spread."""
        rows = [
            (case, name, f"{one.median:.4g}", f"{one.lowest:.4g} to {one.highest:.4g}")
            for case in dict.fromkeys(case for case, _ in self.runs)
            for name, one in summarise(self.of(case)).items()
        ]
        return f"{self.benchmark}, {self.entries} entries\n" + table(
            ("CASE", "FIGURE", "MEDIAN", "SPREAD"), rows
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How benchmarks are to be run."""

    runs: int
    entries: int
    port_base: int
    results: Path
    """The directory for results, and for what the runs need meanwhile."""


async def run(
    benchmark: Benchmark, plan: Plan, tell: Callable[[str], None]
) -> tuple[Results, Path]:
    """Runs all cases, in turn, so many times; returns the results and the file that keeps them.

    What was measured is kept after each run, so that a failure or Ctrl-C loses only the run at hand.
    Raises what a run raises; what that run left behind stays for a look.
    """
    plan.results.mkdir(parents=True, exist_ok=True, mode=0o700)
    results = Results(benchmark.name, plan.entries, SystemClock().wall_ms())
    kept = plan.results / f"{benchmark.name}-{results.start_ms}.json"
    for number in range(1, plan.runs + 1):
        for case in benchmark.cases:
            title = f"{benchmark.name} {case}, run {number} of {plan.runs}"
            directory = Path(tempfile.mkdtemp(prefix=f"{benchmark.name}-", dir=plan.results))
            setup = Setup(directory, plan.port_base, plan.entries, _titled(title, tell))
            try:
                figures = await benchmark.run(case, setup)
            except Exception:
                tell(f"{title}: FAILED; its data and logs are in {directory}")
                raise
            except asyncio.CancelledError:
                shutil.rmtree(directory)
                raise
            shutil.rmtree(directory)
            results.runs.append((case, figures))
            mesh_file.write_private(kept, json.dumps(results.data(), indent=2) + "\n")
            tell(f"{title}: " + ", ".join(f"{name} {one:.4g}" for name, one in figures.items()))
    return results, kept


def _titled(title: str, tell: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: tell(f"{title}: {line}")


def named(wanted: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, or all. Raises KeyError."""
    return [BENCHMARKS[name] for name in wanted or BENCHMARKS]
