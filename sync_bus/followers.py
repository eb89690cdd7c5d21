"""How far the other centers have followed this one's log, for those who want to tell a user."""

import asyncio
from contextlib import suppress

from runtime.signal import Signal
from runtime.store import Store, Unit
from sync_bus import log


class Followers:
    """The centers that `destinations` names, and what they have confirmed."""

    def __init__(self, destinations: list[str], store: Store) -> None:
        self._destinations = destinations
        self._store = store
        self._committed = Signal()
        store.on_commit(self._committed.notify)

    async def wait(self, topic: str, timeout_s: float) -> list[str]:
        """Until all have applied what a topic has now, but not for longer; returns those that have not."""
        seq = (await self._store.read(log.heads()))[topic]
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    committed = self._committed.next()
                    if not await self._store.read(self._behind(topic, seq)):
                        return []
                    await self._committed.wait(committed)
        return await self._store.read(self._behind(topic, seq))

    def _behind(self, topic: str, seq: int) -> Unit[list[str]]:
        behind = []
        for destination in self._destinations:
            confirmed = yield from log.confirmations(destination)
            if confirmed.get(topic, 0) < seq:
                behind.append(destination)
        return behind
