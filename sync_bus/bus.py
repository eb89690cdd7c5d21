"""The fast road, as the replicator sees it: a courier that may forget, repeat and reorder."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from duohuo.internal.v1.log_pb2 import LogEntry


class BusFault(Exception):
    """The bus did not take or give anything; try again later."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Entries that arrived together. Acknowledge them only after they have been applied."""

    entries: Sequence[LogEntry]
    acknowledge: Callable[[], Awaitable[None]]


class Bus(Protocol):
    """One service's connection to the bus of its center."""

    async def last_published(self, topic: str) -> LogEntry | None:
        """The last entry of a topic that the bus holds. Raises BusFault."""
        ...

    async def publish(self, topic: str, entries: Sequence[LogEntry]) -> None:
        """Hands over entries in order; returns when the bus has taken them all. Raises BusFault."""
        ...

    def deliveries(self, source: str) -> AsyncIterator[Delivery]:
        """What arrives from another center, for ever. Raises BusFault."""
        ...

    def doubt(self, source: str) -> None:
        """Entries of another center did not arrive and came over the feed: look after the road."""
        ...
