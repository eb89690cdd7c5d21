"""The sure road: other centers read a service's log, and say how far they have applied it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from grpc import StatusCode

from duohuo.internal.v1.log_pb2 import LogEntry
from duohuo.internal.v1.peer_services_pb2 import (
    ExchangeRequest,
    ExchangeResponse,
    PullRequest,
    PullResponse,
)
from runtime.clock import Clock
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, invalid
from runtime.store import Store, Unit
from sync_bus import lag, log
from sync_bus.growth import Growth

PULL_ENTRIES_MAX = 500
PULL_BYTES_MAX = 512 * 1024
"""Of one answer; an entry that is larger goes alone."""


class FeedServicer:
    """Serves `Exchange` and `Pull` of a service's peer interface."""

    def __init__(
        self,
        store: Store,
        peers: frozenset[str],
        clock: Clock,
        mark_lost: Callable[[], Awaitable[None]],
        growth: Growth,
    ) -> None:
        self._store = store
        self._peers = peers
        self._clock = clock
        self._mark_lost = mark_lost
        self._growth = growth

    async def Exchange(self, request: ExchangeRequest, _incoming: Incoming) -> ExchangeResponse:
        if request.center not in self._peers:
            raise invalid("center", "not a center of this mesh")
        life = await self._store.read(log.life())
        heads = await self._store.read(log.heads())
        answer = ExchangeResponse(
            heads=heads, time_ms=self._clock.wall_ms(), generation=life.generation
        )
        if request.generation > life.generation > 0:
            await self._mark_lost()  # a later life has begun, and this store is of an earlier one
        if request.generation != life.generation:
            answer.bases.update(await self._store.read(log.bases()))
            return answer
        if any(seq > heads.get(topic, seq) for topic, seq in request.cursors.items()):
            await self._mark_lost()
            return answer
        known = await self._store.read(log.confirmations(request.center))
        news = [
            (topic, seq)
            for topic, seq in sorted(request.cursors.items())
            if seq > known.get(topic, seq)
        ]
        if news:
            await self._store.write("confirm", _confirm(request.center, news))
        answer.missing_since_ms.update(await self._store.read(lag.missing_since(request.cursors)))
        return answer

    async def Pull(self, request: PullRequest, _incoming: Incoming) -> AsyncIterator[PullResponse]:
        after = request.after_seq
        grown = self._growth.of(request.topic)
        while True:
            change = grown.next()
            entries = await self._store.read(log.read_after(request.topic, after, PULL_ENTRIES_MAX))
            begins = entries[0].seq if entries else await self._head(request.topic) + 1
            if begins > after + 1:
                raise RpcError(
                    StatusCode.FAILED_PRECONDITION,
                    "SNAPSHOT_NEEDED",
                    "the log no longer holds what comes after this number",
                )
            if entries:
                entries = fitting(entries, PULL_BYTES_MAX)
                after = entries[-1].seq
                yield PullResponse(entries=entries, head=after)
            elif request.follow:
                await grown.wait(change)
            else:
                return

    async def _head(self, topic: str) -> int:
        return (await self._store.read(log.heads())).get(topic, 0)


def _confirm(destination: str, news: Sequence[tuple[str, int]]) -> Unit[None]:
    """All topics in one unit: a destination is behind in several at once, and each commit costs a sync."""
    for topic, seq in news:
        yield from log.confirm(destination, topic, seq)


def fitting(entries: list[LogEntry], bytes_max: int) -> list[LogEntry]:
    """As many of the first entries as fit together, but at least one."""
    left = bytes_max
    for count, entry in enumerate(entries):
        left -= entry.ByteSize()
        if left < 0 and count:
            return entries[:count]
    return entries
