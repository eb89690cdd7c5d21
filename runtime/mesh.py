"""The centers as seen from here: how to reach each, and whether it answers.

A center is taken for lost after two failures in a row, of probes or of calls, and trusted again after
two probes in a row, or twice as many each time that it was lost again soon. While it is lost, calls to it
fail at once and definitely did not run.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import ProbeRequest, ProbeResponse
from runtime.clock import Clock
from runtime.endpoint import Call, Endpoint, Reply
from runtime.errors import RpcError, is_silence, unreachable
from runtime.methods import peer_method
from runtime.peer_clocks import PeerClocks

PROBE_INTERVAL_S = 0.5
PROBE_INTERVAL_LOST_S = 0.1
PROBE_TIMEOUT_S = 1.0
IN_A_ROW = 2
SOON_MS = 10_000
RELAPSES_MAX = 5
_PROBE = peer_method("gateway", "Probe")


@dataclass(slots=True)
class Reachability:
    """What is known of one center. `streak` counts results in a row that speak against `reachable`."""

    reachable: bool
    since_ms: int
    streak: int = 0
    has_answered: bool = False
    back_ms: int | None = None
    """When it came back last, on the monotonic clock."""
    relapses: int = 0
    """How often in a row it was lost soon after it had come back."""
    report: ProbeResponse = field(default_factory=ProbeResponse)
    """What it said last."""

    def needed(self) -> int:
        """So many results in a row change what is believed."""
        return IN_A_ROW if self.reachable else IN_A_ROW << self.relapses


class Mesh:
    """Calls centers by name. `here` is this center; its own endpoint is never taken for lost.

    `clocks` tells how far the others' clocks are away.
    """

    def __init__(self, here: str, endpoints: Mapping[str, Endpoint], clock: Clock) -> None:
        self.here = here
        self.clocks = PeerClocks(here, clock)
        self._endpoints = dict(endpoints)
        self._clock = clock
        self._seen = {
            center: Reachability(True, clock.wall_ms()) for center in endpoints if center != here
        }
        self._listeners: list[Callable[[str, bool], None]] = []
        self._all_answered = asyncio.Event()
        if not self._seen:
            self._all_answered.set()

    @property
    def peers(self) -> list[str]:
        """The other centers."""
        return sorted(self._seen)

    @property
    def local(self) -> Endpoint:
        """This center's own services."""
        return self._endpoints[self.here]

    def reachable(self, center: str) -> bool:
        return center == self.here or (center in self._seen and self._seen[center].reachable)

    def since_ms(self, center: str) -> int:
        """Wall time at which the center's reachability last changed."""
        return self._seen[center].since_ms

    def report(self, center: str) -> ProbeResponse:
        """What another center's gateway said last of itself; empty before it has answered."""
        return self._seen[center].report

    def on_change(self, listener: Callable[[str, bool], None]) -> None:
        """Calls `listener(center, reachable)` when a center is lost or back."""
        self._listeners.append(listener)

    def at(self, center: str) -> Endpoint:
        """The center as an endpoint."""
        return self.local if center == self.here else _Remote(self, center)

    async def unary(self, center: str, call: Call) -> Reply:
        """Calls a center. Raises RpcError; CENTER_UNREACHABLE when it did not answer."""
        if center == self.here:
            return await self.local.unary(call)
        endpoint = self._open(center)
        try:
            reply = await endpoint.unary(call)
        except RpcError as error:
            if is_silence(error):
                self._record(center, answered=False)
            raise
        if self._seen[center].reachable:
            self._seen[center].streak = 0
        return reply

    async def stream(self, center: str, call: Call) -> AsyncIterator[bytes]:
        endpoint = self.local if center == self.here else self._open(center)
        try:
            async for message in endpoint.stream(call):
                yield message
        except RpcError as error:
            if is_silence(error) and center != self.here:
                self._record(center, answered=False)
            raise

    async def wait_for_peers(self, timeout_s: float) -> bool:
        """Waits until all other centers have answered once, but not longer; `run` must be running."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_answered.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Keeps asking all other centers whether they are there."""
        async with asyncio.TaskGroup() as tasks:
            for peer in self.peers:
                tasks.create_task(self._probe(peer))

    async def _probe(self, center: str) -> None:
        call = Call(_PROBE, ProbeRequest().SerializeToString(), PROBE_TIMEOUT_S)
        seen = self._seen[center]
        while True:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    reply = await self._endpoints[center].unary(call)
                seen.report = ProbeResponse.FromString(reply.payload)
            except (RpcError, TimeoutError, DecodeError):
                self._record(center, answered=False)
            else:
                self._record(center, answered=True)
            calm = seen.reachable and seen.has_answered
            await asyncio.sleep(PROBE_INTERVAL_S if calm else PROBE_INTERVAL_LOST_S)

    def _open(self, center: str) -> Endpoint:
        if center not in self._endpoints:
            raise RpcError(
                StatusCode.NOT_FOUND, "UNKNOWN_CENTER", f"there is no center {center} in this mesh"
            )
        if not self.reachable(center):
            raise unreachable(center, ran=False)
        return self._endpoints[center]

    def _record(self, center: str, *, answered: bool) -> None:
        seen = self._seen[center]
        if answered and not seen.has_answered:
            seen.has_answered = True
            if all(other.has_answered for other in self._seen.values()):
                self._all_answered.set()
        seen.streak = 0 if seen.reachable is answered else seen.streak + 1
        if seen.streak < seen.needed():
            return
        now_ms = self._clock.monotonic_ms()
        if not answered:
            soon = seen.back_ms is not None and now_ms - seen.back_ms < SOON_MS
            seen.relapses = min(seen.relapses + 1, RELAPSES_MAX) if soon else 0
        else:
            seen.back_ms = now_ms
        seen.reachable, seen.since_ms, seen.streak = answered, self._clock.wall_ms(), 0
        for listener in self._listeners:
            listener(center, answered)


@dataclass(frozen=True, slots=True)
class _Remote:
    mesh: Mesh
    center: str

    async def unary(self, call: Call) -> Reply:
        return await self.mesh.unary(self.center, call)

    def stream(self, call: Call) -> AsyncIterator[bytes]:
        return self.mesh.stream(self.center, call)
