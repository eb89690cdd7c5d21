"""What lies in the state directory of a local mesh, above all `mesh.json`: how to reach everything.

`mesh.json` is there while the mesh runs. Whoever reads it learns where everything listens, which
processes there are, and the token that the supervisor wants to see from those who command it.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

CenterState = Literal["starting", "running", "paused", "stopped", "killed", "failed"]
LinkState = Literal["up", "cut"]

FILE_NAME = "mesh.json"
LOCK_NAME = "mesh.lock"
TOKEN_KEY_NAME = "token-key"  # noqa: S105 - a file's name
CERTIFICATES_NAME = "certs"
OPERATOR_TOKEN_VARIABLE = "DUOHUO_OPERATOR_TOKEN"  # noqa: S105 - a variable's name
OPERATORS_NAME = "operators"
OPERATOR_TOKEN_NAME = "operator-token"  # noqa: S105 - a file's name


class NoMesh(Exception):
    """No mesh runs there. The message says so to people."""


@dataclass(frozen=True, slots=True)
class CenterView:
    """One center, as others see it. `pids` names the processes that are there."""

    state: CenterState
    gateway: str
    operator: str
    nats: str
    nats_monitor: str
    logs: str
    pids: dict[str, int]


@dataclass(frozen=True, slots=True)
class LinkView:
    """One link between two centers. The delay is added each way."""

    state: LinkState
    delay_ms: int


@dataclass(frozen=True, slots=True)
class MeshView:
    """A running mesh."""

    supervisor: str
    supervisor_pid: int
    control_token: str = field(repr=False)
    console: str | None
    centers: dict[str, CenterView]
    links: dict[str, LinkView]


def link_name(first: str, second: str) -> str:
    """The one name of the link between two centers."""
    return "-".join(sorted((first, second)))


def write_private(path: Path, text: str) -> None:
    """Puts a whole file in place at once, for its owner only."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def write(state_dir: Path, mesh: MeshView) -> None:
    """Writes `mesh.json`."""
    write_private(state_dir / FILE_NAME, json.dumps(asdict(mesh), indent=2) + "\n")


def remove(state_dir: Path) -> None:
    """Removes `mesh.json`, if it is there."""
    (state_dir / FILE_NAME).unlink(missing_ok=True)


def read(state_dir: Path) -> MeshView:
    """The mesh that runs on this state directory. Raises NoMesh."""
    path = state_dir / FILE_NAME
    advice = f"start one with `duohuo --state {state_dir} up`"
    try:
        mesh = _parse(path.read_bytes())
    except FileNotFoundError:
        raise NoMesh(f"no mesh is running on {state_dir}; {advice}") from None
    except OSError as error:
        raise NoMesh(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NoMesh(f"{path} does not describe a mesh; {advice}") from None
    if not _is_alive(mesh.supervisor_pid):
        raise NoMesh(f"the mesh on {state_dir} is gone, it did not stop by itself; {advice}")
    return mesh


def operator_token(state_dir: Path) -> str:
    """The bearer token to operate this mesh with: one's own, or that of its owner. Raises NoMesh."""
    if own := os.environ.get(OPERATOR_TOKEN_VARIABLE):
        return own
    path = state_dir / OPERATOR_TOKEN_NAME
    try:
        return path.read_text("utf-8").strip()
    except OSError as error:
        raise NoMesh(f"cannot read {path}: {error.strerror}") from None


def _parse(text: bytes) -> MeshView:
    raw = json.loads(text)
    return MeshView(
        **{
            **raw,
            "supervisor_pid": int(raw["supervisor_pid"]),
            "centers": {name: CenterView(**center) for name, center in raw["centers"].items()},
            "links": {name: LinkView(**link) for name, link in raw["links"].items()},
        }
    )


def _is_alive(pid: int) -> bool:
    with suppress(PermissionError):  # alive, and somebody else's
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
