"""What a benchmark is, and the plain arithmetic on its figures."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

Figures = Mapping[str, float]
"""What one run has measured, by name, with the unit last: `entries_per_s`, `p99_before_ms`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is given."""

    directory: Path
    """Its own, and empty. It is removed after a run that succeeds."""
    port_base: int
    entries: int
    """How much work, for benchmarks that work through entries."""
    tell: Callable[[str], None]
    """Takes a line of progress."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Things to be compared are the cases of one benchmark: they are run in turn, so that whatever
    else the machine does meanwhile falls on all of them alike. `run` raises Failure."""

    name: str
    cases: Sequence[str]
    run: Callable[[str, Setup], Awaitable[Figures]]


class Summary(NamedTuple):
    """A figure over several runs."""

    median: float
    lowest: float
    highest: float


def summarise(runs: Sequence[Figures]) -> dict[str, Summary]:
    """Each figure over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    found = {}
    for name in names:
        values = [run[name] for run in runs if name in run]
        found[name] = Summary(median(values), min(values), max(values))
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of at least two values do not exceed."""
    return quantiles(values, n=100, method="inclusive")[percent - 1]
