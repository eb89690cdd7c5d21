"""What came of drills, kept in the mesh's state directory, so that they can be compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops import mesh_file
from ops.output import table
from runtime.clock import SystemClock, iso

KEPT_MAX = 100
DRILLS = {
    "center-loss": "the first center is killed, or cut off, and comes back; 2 centers, half a minute",
    "drain": "the first center is emptied, stopped, started and filled again under load; 2 minutes",
    "nemesis": "users at work under seeded faults of every kind; as long as you like (docs/nemesis.md)",
}


def keep(state: Path, data: Mapping[str, Any]) -> None:
    """One more result; the oldest is forgotten."""
    kept = load(state)[-KEPT_MAX + 1 :]
    kept.append({"time": iso(SystemClock().wall_ms()), **data})
    mesh_file.write_private(_path(state), json.dumps(kept, indent=1) + "\n")


def load(state: Path) -> list[dict[str, Any]]:
    """All that is kept, oldest first."""
    try:
        found: list[dict[str, Any]] = json.loads(_path(state).read_text())
    except (FileNotFoundError, ValueError):
        return []
    return found


def shown(state: Path) -> tuple[str, dict[str, Any]]:
    """The drills there are, and their results; for people and for programs."""
    kept = load(state)
    rows = []
    for one in kept:
        users = one.get("users") or {}
        rows.append(
            (
                one["time"][:19],
                one["drill"],
                "passed" if one["passed"] else "FAILED",
                _ms(one.get("recovery_ms")),
                users.get("calls", "-"),
                users.get("failed", "-"),
                _ms(users.get("slowest_ms")),
            )
        )
    text = table(("DRILL", "WHAT HAPPENS"), DRILLS.items())
    headings = ("WHEN (UTC)", "DRILL", "VERDICT", "RECOVERED IN", "CALLS", "FAILED", "SLOWEST")
    text += "\n\n" + (table(headings, rows) if rows else "None has been done on this mesh yet.")
    return text, {"drills": DRILLS, "results": kept}


def _ms(value: int | None) -> str:
    return "-" if value is None else f"{value} ms"


def _path(state: Path) -> Path:
    return state / "drills.json"
