"""A running local mesh as a stage: gateways to call, operators' ports, and its databases to read."""

import asyncio
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from duohuo.v1.announcement_service_pb2 import Announcement, ListAnnouncementsRequest
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    AccountControl,
    AccountControlChange,
    DepositRequest,
    DepositResponse,
    EraseAccountRequest,
    EraseAccountResponse,
    FreezeAccountRequest,
    GetAccountControlRequest,
    LiftAnnouncementRequest,
    MoveSlotRequest,
    MoveSlotResponse,
    RaiseAnnouncementRequest,
    SetDrainingRequest,
    SetDrainingResponse,
    UnfreezeAccountRequest,
)
from gateway import ring
from ops import mesh_file
from ops.client import ask_operator
from ops.mesh_file import MeshView
from ops.simulation.stage import placed
from ops.simulation.workload import CURRENCY
from runtime.clock import SystemClock
from runtime.endpoint import Call, Endpoint
from runtime.errors import RpcError
from runtime.grpc_client import GrpcEndpoint
from runtime.ids import Ids, RandomIds
from runtime.methods import method
from runtime.placement import Placement

SMALL_DISK_BYTES_MAX = 256 * 1024 * 1024
PROBE_TIMEOUT_S = 1.0
PROBE_INTERVAL_S = 0.05
BUSY_TIMEOUT_S = 5.0
_PROBE = method("/duohuo.v1.AnnouncementService/ListAnnouncements")
_BLOCKS_BYTES = (1024 * 1024, 4096, 1)


class Databases:
    """One center's databases, opened read-only for each question."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def rows(self, name: str, sql: str, *values: Any) -> list[Any]:
        path = f"file:{self._directory / name}.db?mode=ro"
        with closing(sqlite3.connect(path, BUSY_TIMEOUT_S, uri=True)) as connection:
            return connection.execute(sql, values).fetchall()


class RealMesh:
    """The mesh on a state directory; a stage for users (`ops.simulation.stage`)."""

    def __init__(self, state: Path) -> None:
        self.state = state
        mesh = self.view()
        self._first: Placement = ring.compute(dict.fromkeys(mesh.centers, 1), 1)
        self.names: Sequence[str] = list(mesh.centers)
        self._gateways = {
            name: GrpcEndpoint(name, center.gateway) for name, center in mesh.centers.items()
        }
        self._disks = {name: Databases(state / name / "stores") for name in self.names}
        self._disturbances = dict.fromkeys(self.names, 0)
        self._disturbed: set[str] = set(self.names)

    async def close(self) -> None:
        for gateway in self._gateways.values():
            await gateway.close()

    def view(self) -> MeshView:
        """How the mesh is now. Raises NoMesh."""
        return mesh_file.read(self.state)

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def now_ms(self) -> int:
        return SystemClock().wall_ms()

    def note(self, what: str) -> None:
        """Real time has no history hash."""

    def ids(self, _random: Random) -> Ids:
        return RandomIds()

    def disk(self, center: str) -> Databases:
        return self._disks[center]

    def has_all(self, center: str) -> bool:  # noqa: ARG002 - no disk is lost in a drill
        return True

    def gateway(self, center: str) -> Endpoint:
        return self._gateways[center]

    async def deposit(self, center: str, deposit_id: str, account_id: str, amount: int) -> None:
        request = DepositRequest(
            deposit_id=deposit_id,
            user=account_id,
            amount=Money(currency_code=CURRENCY, minor_units=amount),
        )
        await ask_operator(self.state, center, "Deposit", request, DepositResponse)

    @property
    def placement(self) -> Placement:
        return placed(self, self._first)

    async def move(self, center: str, slot: int, to: str) -> None:
        request = MoveSlotRequest(slot=slot, home=to)
        await ask_operator(self.state, center, "MoveSlot", request, MoveSlotResponse)

    async def set_frozen(self, center: str, account_id: str, *, frozen: bool) -> None:
        look = GetAccountControlRequest(user=account_id)
        found = await ask_operator(self.state, center, "GetAccountControl", look, AccountControl)
        path, request = (
            ("FreezeAccount", FreezeAccountRequest(user=account_id, version=found.version))
            if frozen
            else ("UnfreezeAccount", UnfreezeAccountRequest(user=account_id, version=found.version))
        )
        await ask_operator(self.state, center, path, request, AccountControlChange)

    async def set_draining(self, center: str, *, draining: bool) -> None:
        request = SetDrainingRequest(draining=draining)
        await ask_operator(self.state, center, "SetDraining", request, SetDrainingResponse)

    async def announce(self, center: str, announcement_id: str) -> None:
        request = RaiseAnnouncementRequest(announcement_id=announcement_id, texts={"en": "Now."})
        await ask_operator(self.state, center, "RaiseAnnouncement", request, Announcement)

    async def lift(self, center: str, announcement_id: str) -> None:
        request = LiftAnnouncementRequest(announcement_id=announcement_id)
        await ask_operator(self.state, center, "LiftAnnouncement", request, Announcement)

    async def erase(self, center: str, account_id: str) -> None:
        request = EraseAccountRequest(user=account_id)
        await ask_operator(self.state, center, "EraseAccount", request, EraseAccountResponse)

    def fits(self, stored: str, password: str) -> bool:
        return _fits(stored, password)

    def undisturbed(self, center: str) -> object | None:
        """How often it was disturbed so far, while it is not."""
        return None if center in self._disturbed else self._disturbances[center]

    def disturb(self, center: str) -> None:
        """From now on nobody may rely on this center."""
        self._disturbances[center] += 1
        self._disturbed.add(center)

    async def calm(self, center: str, within_s: float) -> None:
        """From the center's first answer on, users may rely on it. Raises TimeoutError."""
        call = Call(_PROBE, ListAnnouncementsRequest().SerializeToString(), PROBE_TIMEOUT_S)
        async with asyncio.timeout(within_s):
            while True:
                try:
                    await self._gateways[center].unary(call)
                    break
                except RpcError:
                    await asyncio.sleep(PROBE_INTERVAL_S)
        self._disturbed.discard(center)

    def jetstream(self, center: str) -> Path:
        """Where the center's NATS keeps its streams."""
        return self.state / center / "nats" / "jetstream"

    def has_small_disk(self, center: str) -> bool:
        """Is the center's directory a small file system of its own, which may be filled?"""
        directory = self.state / center
        space = os.statvfs(directory)
        own = directory.stat().st_dev != self.state.stat().st_dev
        return own and space.f_frsize * space.f_blocks <= SMALL_DISK_BYTES_MAX

    def fill_disk(self, center: str) -> None:
        """Leaves not one byte of room. Again and again: others may have made some."""
        with self._filler(center).open("ab", buffering=0) as filler:
            for block_bytes in _BLOCKS_BYTES:
                try:
                    while filler.write(b"\0" * block_bytes) == block_bytes:
                        pass
                except OSError:
                    continue  # a smaller block may still fit

    def free_disk(self, center: str) -> None:
        """Makes room again."""
        self._filler(center).unlink(missing_ok=True)

    def _filler(self, center: str) -> Path:
        return self.state / center / "nemesis-filler"


@lru_cache(maxsize=4096)
def _fits(stored: str, password: str) -> bool:
    try:
        return PasswordHasher().verify(stored, password)
    except VerificationError:
        return False
