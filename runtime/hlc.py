"""Hybrid logical clock: one number that never goes back and stays close to the wall clock.

Kulkarni, Demirbas, Madappa, Avva, Leone: "Logical Physical Clocks and Consistent Snapshots in
Globally Distributed Databases" (2014). The upper 48 bits are milliseconds since 1970, the lower 16 a
counter, so that timestamps compare as plain integers.
"""

from runtime.clock import Clock

COUNTER_BITS = 16
AHEAD_MS_MAX = 3_600_000
"""A remote timestamp further ahead of the local wall clock than this is not believed."""


def physical_ms(hlc: int) -> int:
    """The wall clock part of a timestamp."""
    return hlc >> COUNTER_BITS


CLIENT_AHEAD_MS_MAX = AHEAD_MS_MAX // 2
"""The same for a client's causal token: so that what it drags ahead is still believed elsewhere, by a
center whose clock is up to half an hour behind."""


class TooFarAhead(Exception):
    """A remote timestamp that would drag this clock more than an hour ahead of its wall clock."""


class HybridClock:
    """Issues timestamps above everything issued or observed before.

    `latest` must be stored with what it stamps and handed back in after a restart.
    """

    def __init__(self, clock: Clock, latest: int = 0) -> None:
        self._clock = clock
        self.latest = latest

    def tick(self) -> int:
        """A new timestamp, above `latest` and not below the wall clock."""
        self.latest = max(self.latest + 1, self._clock.wall_ms() << COUNTER_BITS)
        return self.latest

    def observe(self, remote: int) -> None:
        """Makes sure that later timestamps are above `remote`. Raises TooFarAhead."""
        if self.is_too_far_ahead(remote):
            raise TooFarAhead
        self.latest = max(self.latest, remote)

    def observe_client(self, token: int) -> None:
        """The same for a client's causal token, as far as it is believed: no client may be refused,
        and none may drag this clock further ahead than the other centers believe."""
        limit = self._clock.wall_ms() + CLIENT_AHEAD_MS_MAX << COUNTER_BITS
        self.latest = max(self.latest, min(token, limit))

    def is_too_far_ahead(self, remote: int) -> bool:
        """Is a remote timestamp not to be believed, as the wall clock stands now?"""
        return physical_ms(remote) > self._clock.wall_ms() + AHEAD_MS_MAX
