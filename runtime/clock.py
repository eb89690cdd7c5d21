"""Time, handed in. `SystemClock` is the only place in the project that reads the machine's clocks."""

import time
from datetime import UTC, datetime
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

_YEAR_1_S, _YEAR_9999_S = -62_135_596_800, 253_402_300_799


class Clock(Protocol):
    """Two clocks: the wall's, which may jump, and one that only goes forward."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as far as this machine knows."""
        ...

    def monotonic_ms(self) -> int:
        """Milliseconds since some fixed moment; for measuring durations."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000


def timestamp(time_ms: int) -> Timestamp:
    """The protobuf form of milliseconds since 1970."""
    return Timestamp(seconds=time_ms // 1000, nanos=time_ms % 1000 * 1_000_000)


def milliseconds(stamp: Timestamp) -> int:
    """Milliseconds since 1970 of a protobuf timestamp; 0 for one that is unset. One that is outside of the
    years 1 to 9999, which timestamp.proto allows, is taken for the nearest."""
    seconds = min(max(stamp.seconds, _YEAR_1_S), _YEAR_9999_S)
    return seconds * 1000 + stamp.nanos // 1_000_000


def iso(time_ms: int) -> str:
    """UTC time for people, to the millisecond."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
