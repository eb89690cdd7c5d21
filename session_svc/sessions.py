"""The sessions that this center made: on its disk, or in memory while the disk is full.

A full disk must not keep users out. A session that it has no room for is kept in memory, counts like a
stored one, and is stored as soon as there is room. A center that stops before that forgets it: sessions
outlive nobody, a new login recreates them. What ends a session for good needs no memory: a logout takes it
out of memory, a revocation is on disk before it is acknowledged and is looked up at every use.
"""

import asyncio
from itertools import islice

import structlog

from runtime.clock import Clock
from runtime.errors import RpcError
from runtime.store import DISK_FULL, Store, StoreFault
from session_svc import store
from session_svc.store import NewSession, SessionRow
from sync_bus.log import Stamp

UNSTORED_MAX = 10_000
STORED_AT_ONCE_MAX = 100
"""Few, so that other writes of the same commit do not fail for want of much room."""
RETRY_INTERVAL_S = 1.0

_logger = structlog.get_logger()


class Sessions:
    """Run `run` for as long as the service lives: it stores what had to wait."""

    def __init__(self, here: str, database: Store, clock: Clock) -> None:
        self._here = here
        self._store = database
        self._clock = clock
        self._unstored: dict[bytes, NewSession] = {}
        self._is_waiting = asyncio.Event()
        # Held while sessions move from memory to disk: what ends one must then wait to see where it is.
        self._moving = asyncio.Lock()

    async def add(self, session: NewSession) -> None:
        """Stores a new session, or keeps it until it can be. Raises RpcError, also if too many wait."""
        try:
            await self._store.write("login", store.add(*session))
        except StoreFault as fault:
            if fault.reason != DISK_FULL or len(self._unstored) >= UNSTORED_MAX:
                raise
            self._unstored[session.hashed] = session
            if not self._is_waiting.is_set():
                self._is_waiting.set()
                _logger.warning("disk full, sessions are kept in memory")

    async def find(self, hashed: bytes) -> SessionRow | None:
        """The session behind a token, if it is still good."""
        # Memory first: what is being stored is for a moment in both, and never in neither.
        if (unstored := self._unstored.get(hashed)) is not None:
            return unstored.row if await self._is_good(unstored) else None
        return await self._store.read(store.find(hashed, self._clock.wall_ms()))

    async def of_account(self, account_id: str) -> list[SessionRow]:
        """An account's sessions, newest first."""
        unstored = [one for one in self._unstored.values() if one.row.account_id == account_id]
        found = {one.row.session_id: one.row for one in unstored if await self._is_good(one)}
        stored = await self._store.read(store.of_account(account_id, self._clock.wall_ms()))
        found |= {row.session_id: row for row in stored}
        newest_first = sorted(found.values(), key=lambda row: row.create_ms, reverse=True)
        return newest_first[: store.LISTED_MAX]

    async def remove(self, hashed: bytes) -> None:
        """Ends a session. Raises StoreFault if it is stored and the disk does not take that."""
        if hashed in self._unstored:
            async with self._moving:
                if self._unstored.pop(hashed, None) is not None:
                    return
        await self._store.write("logout", store.remove(hashed))

    async def revoke_all(self, account_id: str, stamp: Stamp) -> int:
        """Ends the account's sessions here and tells the other centers; returns how many ended here."""
        ended = await self._store.write(
            "revoke sessions", store.revoke_all(self._here, account_id, stamp)
        )
        async with self._moving:
            over = [
                one.hashed
                for one in self._unstored.values()
                if one.row.account_id == account_id and one.stamp.hlc < stamp.hlc
            ]
            for hashed in over:
                del self._unstored[hashed]
        return ended + len(over)

    async def counts(self) -> dict[str, int]:
        """How many there are, for people."""
        counts = await self._store.read(store.counts(self._clock.wall_ms()))
        counts["sessions"] += len(self._unstored)
        return counts

    async def run(self) -> None:
        """Stores what waits, as soon as there is room."""
        while True:
            await self._is_waiting.wait()
            await asyncio.sleep(RETRY_INTERVAL_S)
            await self.store_waiting()

    async def store_waiting(self) -> None:
        """Stores what waits, or as much as the disk takes now."""
        while self._unstored:
            try:
                await self._store_some()
            except RpcError:
                return  # still full, or busy
        self._is_waiting.clear()
        _logger.info("no session waits for room any more")

    async def _store_some(self) -> None:
        async with self._moving:
            some = list(islice(self._unstored.values(), STORED_AT_ONCE_MAX))
            await self._store.write("logins that waited", store.add_all(some))
            for session in some:
                del self._unstored[session.hashed]

    async def _is_good(self, unstored: NewSession) -> bool:
        if unstored.row.expire_ms <= self._clock.wall_ms():
            return False
        return not await self._store.read(
            store.is_revoked(unstored.row.account_id, unstored.stamp.hlc)
        )
