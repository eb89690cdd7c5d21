"""The databases that must keep the store's contract."""

import sqlite3
from pathlib import Path
from typing import Protocol

from runtime.store import Row, SqliteStore, Store

SCHEMA = """
CREATE TABLE IF NOT EXISTS item (
  name TEXT NOT NULL PRIMARY KEY, amount INTEGER NOT NULL CHECK (amount >= 0)) STRICT, WITHOUT ROWID;
"""


class Backend(Protocol):
    """One database: a store on it, and a look at it from outside."""

    async def open(self) -> Store: ...

    async def close(self) -> None: ...

    def committed(self, sql: str) -> list[Row]:
        """What anybody else who asks the database is told."""
        ...


class SqliteBackend:
    """A file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store.db"
        self._store: SqliteStore | None = None

    async def open(self) -> SqliteStore:
        self._store = await SqliteStore.open(self.path, SCHEMA)
        return self._store

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()

    def committed(self, sql: str) -> list[Row]:
        other = sqlite3.connect(self.path)
        try:
            return other.execute(sql).fetchall()
        finally:
            other.close()


BACKENDS = {"sqlite": SqliteBackend}
