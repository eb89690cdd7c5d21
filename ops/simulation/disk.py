"""Real SQLite files under a simulated crash: they keep exactly what was committed."""

import sqlite3
from pathlib import Path
from random import Random
from typing import Any

from ops.simulation.loop import SimulatedLoop
from runtime.store import SqliteStore, T, Unit, drive, in_place, run_batch

COMMIT_S_MAX = 0.004


class DiskFullError(sqlite3.OperationalError):
    """What SQLite raises when there is no room."""

    sqlite_errorname = "SQLITE_FULL"


class SimulatedDisk:
    """The disk of one center. It outlives the center's processes."""

    def __init__(self, directory: Path, loop: SimulatedLoop, random: Random) -> None:
        self.full = False
        self.slow_s = 0.0
        self._directory = directory
        self._loop = loop
        self._random = random
        self._open: dict[str, sqlite3.Connection] = {}
        directory.mkdir(parents=True)

    def store(self, name: str, schema: str) -> SqliteStore:
        """The product's own store, with its batches run in place after a simulated delay."""
        connection = self._connect(name)
        connection.executescript(schema)

        async def hop(units: list[Unit[Any]]) -> list[Any]:
            await self._delay()
            if self.full:
                raise DiskFullError("database or disk is full")
            outcomes = run_batch(connection, units)
            # Committed; a crash from here on loses the answers, not the effect.
            await self._delay()
            return outcomes

        def copied() -> sqlite3.Connection:
            copy = sqlite3.connect(":memory:", isolation_level=None)
            copy.deserialize(connection.serialize())
            return copy

        return _InPlaceStore(hop, connection, copied, in_place)

    def crash(self) -> None:
        """Closes the files without a word, as a killed process does."""
        for connection in self._open.values():
            # An error that is still remembered keeps a statement, and that the file's lock, beyond closing.
            connection.execute("PRAGMA locking_mode=NORMAL")
            connection.execute("SELECT 1 FROM sqlite_master").fetchall()
            connection.close()
        self._open.clear()

    def lose(self) -> None:
        """A new, empty disk takes its place. The center must have been killed."""
        self.crash()
        for file in self._directory.iterdir():
            file.unlink()

    def alter(self, name: str, sql: str, *values: Any) -> None:
        """Somebody changes a database by hand."""
        self._connect(name).execute(sql, values)

    def has(self, name: str) -> bool:
        """Has a service made its database yet?"""
        found = self._connect(name).execute("SELECT 1 FROM sqlite_master WHERE name = 'log_head'")
        return bool(found.fetchall())

    def rows(self, name: str, sql: str, *values: Any) -> list[Any]:
        """What is on the disk now, for checks; nothing while a lost disk's tables are not made again."""
        try:
            return self._connect(name).execute(sql, values).fetchall()
        except sqlite3.OperationalError:
            if self.has(name):
                raise
            return []

    def _connect(self, name: str) -> sqlite3.Connection:
        if name not in self._open:
            connection = sqlite3.connect(self._directory / f"{name}.db", isolation_level=None)
            # Power loss is not simulated below SQLite, so syncing would only cost time.
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA journal_mode=MEMORY")
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._open[name] = connection
        return self._open[name]

    async def _delay(self) -> None:
        await self._loop.pause(self._random.random() * (COMMIT_S_MAX + self.slow_s))


class _InPlaceStore(SqliteStore):
    """Its writes happen between other tasks' steps, never during a read: a read is its own snapshot."""

    async def read(self, unit: Unit[T]) -> T:
        return drive(self._reader, unit)
