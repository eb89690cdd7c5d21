"""A mesh of a benchmark's own: `duohuo up` as users start it, in processes of its own."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

from ops import control, mesh_file
from ops.child import Child
from ops.local_config import environment
from ops.output import Failure

READY_WITHIN_S = 60.0
POLL_INTERVAL_S = 0.05


@asynccontextmanager
async def running_mesh(
    state: Path,
    centers: Sequence[str],
    port_base: int,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[None]:
    """Runs a mesh on a state directory, from when all of it is ready. `settings` are environment
    variables. Raises Failure."""
    arguments = ("--centers", ",".join(centers), "--port-base", str(port_base))
    command = (sys.executable, "-P", "-m", "ops.main", "--state", str(state), "up", *arguments)
    up = Child("duohuo up", command, {**environment(()), **settings}, state / "up.log")
    try:
        await up.start()
        await _wait_ready(up, state, centers)
        yield
    finally:
        await up.stop()


async def command_center(state: Path, verb: str, center: str) -> None:
    """Does what `duohuo center VERB CENTER` does. Raises ControlError."""
    mesh = mesh_file.read(state)
    await asyncio.to_thread(control.request, mesh, f"center {verb}", center=center)


def processor_s(pid: int) -> float | None:
    """Processor time that all threads of a process have used so far; None where nobody tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _wait_ready(up: Child, state: Path, centers: Sequence[str]) -> None:
    deadline_s = asyncio.get_running_loop().time() + READY_WITHIN_S
    while True:
        try:
            mesh = mesh_file.read(state)
        except mesh_file.NoMesh:
            running = 0
        else:
            running = sum(center.state == "running" for center in mesh.centers.values())
        if running == len(centers):
            return
        if up.pid is None or asyncio.get_running_loop().time() > deadline_s:
            raise Failure(f"the benchmark's mesh did not start:\n{up.last_words()}")
        await asyncio.sleep(POLL_INTERVAL_S)
