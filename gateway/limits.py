"""How much one caller may ask of a gateway, so that the others are still served."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import NamedTuple

from grpc import StatusCode

from runtime.clock import Clock
from runtime.errors import RpcError

BURST_S = 2.0
"""Who has been silent may call for so long as fast as can be, up to this many seconds' worth."""
CALLERS_MAX = 20_000


class Limits(NamedTuple):
    """Of each user, and of each client address, behind which may be many users."""

    user_calls_per_s: int = 100
    address_calls_per_s: int = 1_000
    streams_max: int = 20
    """Open streams of one user, or of one address without a session."""


class Bucket(NamedTuple):
    """A token bucket: how many calls may be made, as of a moment."""

    calls: float
    at_ms: int


def take(bucket: Bucket | None, per_s: int, now_ms: int) -> tuple[Bucket, int]:
    """The bucket after one more call, and how many ms too early that is; 0 if it may be made."""
    most = per_s * BURST_S
    calls = most
    if bucket is not None:
        calls = min(most, bucket.calls + (now_ms - bucket.at_ms) * per_s / 1000)
    if calls >= 1:
        return Bucket(calls - 1, now_ms), 0
    return Bucket(calls, now_ms), max(1, round((1 - calls) * 1000 / per_s))


class Limiter:
    """Counts at this gateway. Of too many callers, those that have been silent longest are forgotten."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._early: OrderedDict[bytes, int] = OrderedDict()
        self._streams: Counter[str] = Counter()

    def count_address(self, address: str) -> None:
        """One more call from a client address; empty for what the gateway asks by itself. Raises RpcError
        RATE_LIMITED."""
        if address:
            self._count(f"address {address}", self._limits.address_calls_per_s, "this address")

    def count_user(self, account_id: str, token: str) -> None:
        """One more call by a user, in the session of this token. Raises RpcError RATE_LIMITED."""
        try:
            self._count(account_id, self._limits.user_calls_per_s, "you")
        except RpcError as error:
            until_ms = self._clock.monotonic_ms() + (error.retry_after_ms or 0)
            self._early[_key(token)] = until_ms
            if len(self._early) > CALLERS_MAX:
                self._early.popitem(last=False)
            raise

    def check(self, token: str) -> None:
        """Refuses again, without looking at the session, who has just been refused for coming too early:
        a refusal must cost less than an answer. Raises RpcError RATE_LIMITED."""
        early_ms = self._early.get(_key(token), 0) - self._clock.monotonic_ms()
        if early_ms > 0:
            raise _limited("you", self._limits.user_calls_per_s, early_ms)

    @contextmanager
    def stream(self, caller: str) -> Iterator[None]:
        """While a stream is open. Raises RpcError STREAMS_LIMITED."""
        if self._streams[caller] >= self._limits.streams_max:
            raise RpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "STREAMS_LIMITED",
                f"you have {self._limits.streams_max} streams open at this center",
                retry_after_ms=1000,
                advice="Close one first.",
            )
        self._streams[caller] += 1
        try:
            yield
        finally:
            self._streams[caller] -= 1
            if not self._streams[caller]:
                del self._streams[caller]

    def _count(self, caller: str, per_s: int, whose: str) -> None:
        bucket, early_ms = take(self._buckets.get(caller), per_s, self._clock.monotonic_ms())
        self._buckets[caller] = bucket
        self._buckets.move_to_end(caller)
        if len(self._buckets) > CALLERS_MAX:
            self._buckets.popitem(last=False)
        if early_ms:
            raise _limited(whose, per_s, early_ms)


def _limited(whose: str, per_s: int, early_ms: int) -> RpcError:
    return RpcError(
        StatusCode.RESOURCE_EXHAUSTED,
        "RATE_LIMITED",
        f"too many calls: {whose} may make {per_s} a second at this center",
        retry_after_ms=early_ms,
    )


def _key(token: str) -> bytes:
    return sha256(token.encode()).digest()
