"""What the users of a simulated mesh did, and what they were told."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Outcome(Enum):
    OK = "ok"
    REFUSED = "refused"
    """It definitely did not run."""
    UNKNOWN = "unknown"
    """It may have run."""


@dataclass(slots=True)
class Operation:
    """One operation of one user, with all its retries."""

    kind: str
    user: int
    facts: dict[str, Any]
    start_s: float
    end_s: float = 0.0
    outcome: Outcome = Outcome.UNKNOWN
    reason: str = ""
    result: Any = None

    def __str__(self) -> str:
        facts = " ".join(f"{key}={value}" for key, value in self.facts.items())
        said = f"{self.outcome.value} {self.reason}".strip()
        return f"{self.start_s:9.3f} - {self.end_s:9.3f} s  user {self.user} {self.kind} {facts}: {said}"


@dataclass(slots=True)
class History:
    """Everything in order of its start, and the guarantees that were seen broken on the way."""

    operations: list[Operation] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def of(self, kind: str, outcome: Outcome | None = None) -> list[Operation]:
        return [
            one
            for one in self.operations
            if one.kind == kind and (outcome is None or one.outcome is outcome)
        ]

    def timeline(self) -> list[str]:
        """All of it, in order, a line each."""
        lines = [(when, f"{when:9.3f} s  -- {what}") for when, what in self.events]
        lines += [(one.start_s, str(one)) for one in self.operations]
        return [line for _, line in sorted(lines)]
