"""How often somebody may be wrong: attempts to guess a password, counted where they are made and shared.

A lock-out grows with each failure and heals by time alone. An attempt counts from its beginning, so that
many at once are no more than the same number one after the other. Each process counts its own failures
from its start; what others count arrives by `merge`: a grow-only counter (Shapiro et al. 2011, "A
comprehensive study of Convergent and Commutative Replicated Data Types", 3.1.1), until its key has been
quiet for long enough to be forgotten.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice, takewhile
from typing import NamedTuple

from runtime.clock import Clock

HEAL_MS = 3_600_000
"""A key is forgotten when it has been quiet for so long."""
KEYS_MAX = 50_000
"""Of more, those that have been quiet longest are forgotten."""
COUNTERS_MAX = 32
"""So many processes' counts are kept of one key; those of more are not."""


class Policy(NamedTuple):
    """So many failures are free; then a wait follows each, twice as long each time."""

    free: int
    first_wait_ms: int
    wait_ms_max: int


def wait_ms(failures: int, policy: Policy) -> int:
    """How long nothing may be tried after the last of so many failures."""
    if failures < policy.free:
        return 0
    doublings = min(failures - policy.free, 32)
    return min(policy.first_wait_ms << doublings, policy.wait_ms_max)


class Failures(NamedTuple):
    """What has been counted of one key, as it is told to others."""

    key: bytes
    counts: dict[str, int]
    """By the process that counted."""
    age_ms: int
    """Since the last one."""


@dataclass(slots=True)
class _Key:
    counts: dict[str, int] = field(default_factory=dict)
    """By the process that counted."""
    last_ms: int = 0
    """When the last failure was, by this center's monotonic clock."""
    pending: int = 0


@dataclass(slots=True)
class Attempt:
    """One attempt that was begun."""

    key: bytes
    wait_ms: int
    """How long it came too early; 0 if it may be made."""


class Guesses:
    """What one process knows. `process` is its name, never used before: it begins to count from nothing."""

    def __init__(self, process: str, clock: Clock) -> None:
        self._process = process
        self._clock = clock
        self._keys: OrderedDict[bytes, _Key] = OrderedDict()
        self._changes: OrderedDict[bytes, int] = OrderedDict()
        self._change = 1
        """0 is before anything, also before what was only heard."""

    def begin(self, kind: str, name: str, policy: Policy) -> Attempt:
        """An attempt on `name`, which is kept as a hash. Say how it ended if it may be made."""
        hashed = sha256(f"{kind} {name}".encode()).digest()[:16]
        now_ms = self._clock.monotonic_ms()
        key = self._key(hashed, now_ms)
        failures = sum(key.counts.values())
        early_ms = max(0, key.last_ms + wait_ms(failures, policy) - now_ms) if failures else 0
        if not early_ms and key.pending and failures + key.pending >= policy.free:
            early_ms = policy.first_wait_ms
        if not early_ms:
            key.pending += 1
        return Attempt(hashed, early_ms)

    def end(self, attempt: Attempt, *, failed: bool) -> None:
        """How an attempt ended that might be made."""
        now_ms = self._clock.monotonic_ms()
        key = self._key(attempt.key, now_ms)
        key.pending = max(0, key.pending - 1)
        if failed:
            key.counts[self._process] = key.counts.get(self._process, 0) + 1
            key.last_ms = now_ms
            self._change += 1
            self._changes[attempt.key] = self._change
            self._changes.move_to_end(attempt.key)
        elif not key.counts and not key.pending:
            self._drop(attempt.key)

    def since(self, change: int, limit: int) -> tuple[list[Failures], int]:
        """What was counted here after a change, and up to which; all that is known if 0. The newest."""
        now_ms = self._clock.monotonic_ms()
        newest = self._changed_after(change) if change else reversed(self._keys)
        counted = ((hashed, self._keys[hashed]) for hashed in newest)
        told = (
            Failures(hashed, dict(key.counts), now_ms - key.last_ms)
            for hashed, key in counted
            if key.counts
        )
        return list(islice(told, limit)), self._change

    def merge(self, told: Failures) -> None:
        """What another process knows."""
        if told.age_ms >= HEAL_MS:
            return
        now_ms = self._clock.monotonic_ms()
        key = self._key(told.key, now_ms)
        last_ms = now_ms - told.age_ms
        for process, count in told.counts.items():
            is_kept = process in key.counts or len(key.counts) < COUNTERS_MAX
            if is_kept and count > key.counts.get(process, 0):
                key.last_ms = max(key.last_ms, last_ms) if key.counts else last_ms
                key.counts[process] = count

    def _changed_after(self, change: int) -> Iterator[bytes]:
        return takewhile(lambda hashed: self._changes[hashed] > change, reversed(self._changes))

    def _key(self, hashed: bytes, now_ms: int) -> _Key:
        key = self._keys.setdefault(hashed, _Key())
        self._keys.move_to_end(hashed)
        if now_ms - key.last_ms >= HEAL_MS:
            key.counts.clear()
        if len(self._keys) > KEYS_MAX:
            self._drop(next(iter(self._keys)))
        return key

    def _drop(self, hashed: bytes) -> None:
        del self._keys[hashed]
        self._changes.pop(hashed, None)
