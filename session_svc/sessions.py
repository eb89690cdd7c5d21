"""The sessions that this center made: on its disk, or in memory while the disk is full.

A full disk must not keep users out. A session that it has no room for is kept in memory, counts like a
stored one, and is stored as soon as there is room. A center that stops before that forgets it: sessions
outlive nobody, a new login recreates them. What ends a session for good needs no memory: a logout takes it
out of memory, a revocation is on disk before it is acknowledged and is looked up at every use.
"""

import asyncio
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import structlog

from runtime.errors import RpcError
from runtime.store import DISK_FULL, Store, StoreFault
from session_svc import store
from session_svc.store import NewSession, SessionRow
from sync_bus.log import Stamp, Stamps

USE_NOTED_EVERY_MS = 60_000
UNSTORED_MAX = 10_000
STORED_AT_ONCE_MAX = 100
"""Few, so that other writes of the same commit do not fail for want of much room."""
RETRY_INTERVAL_S = 1.0

_logger = structlog.get_logger()


class Lifetimes(NamedTuple):
    """How long a session lasts, at most and without being used; and how long after a password was set its
    account's home must confirm it."""

    absolute_ms: int = 7 * 24 * 3600 * 1000
    idle_ms: int = 24 * 3600 * 1000
    password_confirm_ms: int = 0


class Sessions:
    """Run `run` for as long as the service lives: it stores what had to wait."""

    def __init__(self, here: str, database: Store, stamps: Stamps, lifetimes: Lifetimes) -> None:
        self._here = here
        self._store = database
        self._stamps = stamps
        self.lifetimes = lifetimes
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
        unstored = self._unstored.get(hashed)
        row = unstored.row if unstored else await self._store.read(store.find(hashed))
        now_ms = self._stamps.steady_ms()
        if row is None or not self._lasts(row, now_ms):
            return None
        if unstored is not None and await self._store.read(
            store.is_revoked(row, unstored.stamp.hlc)
        ):
            return None
        if now_ms - row.last_use_ms >= USE_NOTED_EVERY_MS:
            await self._note_use(hashed, now_ms)
        return row

    async def of_account(self, account_id: str) -> list[SessionRow]:
        """An account's sessions, newest first."""
        found = {
            one.row.session_id: one.row
            for one in list(self._unstored.values())
            if one.row.account_id == account_id
            and not await self._store.read(store.is_revoked(one.row, one.stamp.hlc))
        }
        stored = await self._store.read(store.of_account(account_id))
        found |= {row.session_id: row for row in stored}
        now_ms = self._stamps.steady_ms()
        good = [row for row in found.values() if self._lasts(row, now_ms)]
        return sorted(good, key=lambda row: row.create_ms, reverse=True)[: store.SESSIONS_MAX]

    async def remove(self, hashed: bytes) -> None:
        """Ends a session. Raises StoreFault if it is stored and the disk does not take that."""
        if hashed in self._unstored:
            async with self._moving:
                if self._unstored.pop(hashed, None) is not None:
                    return
        await self._store.write("logout", store.remove(hashed))

    async def end(self, account_id: str, session_id: str) -> None:
        """Ends a session by its name. Raises StoreFault as `remove` does."""
        for hashed, one in list(self._unstored.items()):
            if one.row.session_id == session_id and one.row.account_id == account_id:
                await self.remove(hashed)
                return
        await self._store.write("end session", store.end(account_id, session_id))

    async def revoke_all(self, account_id: str, stamp: Stamp, kept_session_id: str = "") -> int:
        """Ends the account's sessions here, but for one, and tells the other centers; returns how many
        ended here."""
        ended = await self._store.write(
            "revoke sessions", store.revoke_all(self._here, account_id, stamp, kept_session_id)
        )
        async with self._moving:
            over = [
                one.hashed
                for one in self._unstored.values()
                if one.row.account_id == account_id
                and one.row.session_id != kept_session_id
                and one.stamp.hlc < stamp.hlc
            ]
            for hashed in over:
                del self._unstored[hashed]
        return ended + len(over)

    async def counts(self) -> dict[str, int]:
        """How many there are, for people."""
        now_ms = self._stamps.steady_ms()
        counts = await self._store.read(store.counts(now_ms, now_ms - self.lifetimes.idle_ms))
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

    def _lasts(self, row: SessionRow, now_ms: int) -> bool:
        return row.expire_ms > now_ms and row.last_use_ms > now_ms - self.lifetimes.idle_ms

    async def _note_use(self, hashed: bytes, now_ms: int) -> None:
        if (unstored := self._unstored.get(hashed)) is not None:
            used = unstored.row._replace(last_use_ms=now_ms)
            self._unstored[hashed] = unstored._replace(row=used)
            return
        with suppress(RpcError):  # a full disk: it was used all the same, and is noted next time
            await self._store.write("session used", store.note_use(hashed, now_ms))
