"""Wakes those who wait for more entries of a topic, and nobody else, whatever else is committed."""

from collections import defaultdict

from runtime.signal import Signal
from runtime.store import Store
from sync_bus import log


class Growth:
    """How far the topics of a store's log reach, looked up once after each commit for all who wait."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._heads: dict[str, int] = {}
        self._grown: defaultdict[str, Signal] = defaultdict(Signal)
        self._committed = Signal()
        store.on_commit(self._committed.notify)

    async def run(self) -> None:
        while True:
            committed = self._committed.next()
            heads = await self._store.read(log.heads())
            for topic, head in heads.items():
                if self._heads.get(topic) != head:
                    self._heads[topic] = head
                    self._grown[topic].notify()
            await self._committed.wait(committed)

    def of(self, topic: str) -> Signal:
        """Changes with each commit that has added entries to a topic."""
        return self._grown[topic]
