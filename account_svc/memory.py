"""Forgets old requests: the one thing that accounts do not keep for ever."""

import asyncio

from account_svc import rules, store
from runtime.errors import RpcError
from runtime.store import Store
from sync_bus.site import Site

INTERVAL_S = 3600.0
PAUSE_S = 0.1
FORGOTTEN_AT_ONCE_MAX = 500


class Memory:
    """Keeps this center's part of the `request` table bounded; `run` for as long as the service lives."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database

    async def run(self) -> None:
        while True:
            forgotten = await self.forget_some()
            await asyncio.sleep(PAUSE_S if forgotten == FORGOTTEN_AT_ONCE_MAX else INTERVAL_S)

    async def forget_some(self) -> int:
        """One bounded step; returns how many requests were forgotten."""
        if self._site.mesh.clocks.local_is_wrong():
            return 0  # who knows how old they are
        before_ms = self._site.clock.wall_ms() - rules.REQUESTS_KEPT_MS
        unit = store.forget_requests(
            self._site.here, before_ms, FORGOTTEN_AT_ONCE_MAX, self._site.stamps.now()
        )
        try:
            return await self._store.write("forget requests", unit)
        except RpcError:
            return 0  # the store does not take writes now
