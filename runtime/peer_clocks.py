"""How far the other centers' wall clocks are from this one's.

Each answer to an exchange carries its sender's wall clock. It is compared with the local monotonic clock
at the middle of the round trip, so that a jump of the local wall clock shows at once, and not only
when the next answer comes.
"""

from collections.abc import Mapping
from statistics import median

import structlog

from runtime.clock import Clock
from runtime.hlc import AHEAD_MS_MAX

ALARM_MS = 1000
"""A clock further away than this is an alarm, until it is closer than half of it."""

_logger = structlog.get_logger()


class PeerClocks:
    """What is known of the other centers' clocks in this process."""

    def __init__(self, here: str, clock: Clock) -> None:
        self._here = here
        self._clock = clock
        self._ahead_of_monotonic_ms: dict[str, int] = {}
        self._alarmed: set[str] = set()

    def heard(self, peer: str, peer_wall_ms: int, asked_ms: int) -> None:
        """A peer has told its wall clock, asked at this moment of the local monotonic clock."""
        middle_ms = (asked_ms + self._clock.monotonic_ms()) // 2
        self._ahead_of_monotonic_ms[peer] = peer_wall_ms - middle_ms
        self._alarm(peer, self.drifts_ms()[peer])

    def drifts_ms(self) -> Mapping[str, int]:
        """How far each center that was ever heard is ahead of this one; negative if behind."""
        local_ms = self._clock.wall_ms() - self._clock.monotonic_ms()
        return {peer: ahead - local_ms for peer, ahead in self._ahead_of_monotonic_ms.items()}

    def local_is_wrong(self) -> bool:
        """Is it this center's own clock that is wrong? It is if most of those heard are more than an
        hour away, and on the same side: whatever it stamps now, they would not believe."""
        drifts = list(self.drifts_ms().values())
        far = sum(1 for drift in drifts if abs(drift) > AHEAD_MS_MAX)
        return 2 * far > len(drifts) and abs(median(drifts)) > AHEAD_MS_MAX

    def _alarm(self, peer: str, drift_ms: int) -> None:
        if abs(drift_ms) > ALARM_MS and peer not in self._alarmed:
            self._alarmed.add(peer)
            _logger.error("clocks disagree", center=self._here, peer=peer, drift_ms=drift_ms)
        elif abs(drift_ms) < ALARM_MS / 2 and peer in self._alarmed:
            self._alarmed.remove(peer)
            _logger.warning("clocks agree again", center=self._here, peer=peer, drift_ms=drift_ms)
