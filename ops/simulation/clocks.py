"""Clocks that lie: each center's wall clock drifts and jumps; its monotonic clock only drifts."""

from dataclasses import dataclass

from ops.simulation.loop import SimulatedLoop

EPOCH_MS = 1_800_000_000_000


@dataclass(slots=True)
class SimulatedClock:
    """One center's clocks. `offset_ms` is how far the wall clock is off, `rate` how fast it runs."""

    loop: SimulatedLoop
    offset_ms: int = 0
    rate: float = 1.0

    def wall_ms(self) -> int:
        return EPOCH_MS + self.offset_ms + int(self.loop.time() * 1000 * self.rate)

    def monotonic_ms(self) -> int:
        return int(self.loop.time() * 1000)
