"""Units of work on a service's own database.

A unit is synchronous logic on one transaction: a generator that yields statements, receives rows and
returns its result. It does not know who drives it, so it runs unchanged in SQLite's writer thread
and in place under a simulator. Raising undoes the unit and nothing else.
"""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import aiosqlite
from grpc import StatusCode

from runtime import telemetry
from runtime.errors import RpcError

T = TypeVar("T")
Value = str | int | float | bytes | None
Row = tuple[Any, ...]
Statement = tuple[str, Sequence[Value]]
Unit = Generator[Statement, list[Row], T]

Hop = Callable[[list[Unit[Any]]], Awaitable[list[Any]]]
"""Takes a batch of units to where the database may be waited for, and runs `run_batch` there."""

Aside = Callable[..., Awaitable[Any]]
"""Calls a function with its arguments where it may take its time."""

BATCH_UNITS_MAX = 512
PENDING_UNITS_MAX = 10_000
DISK_FULL = "DISK_FULL"
"""The reason of a StoreFault while there is no room. Reading goes on."""
CACHE_KIB = 32 * 1024


def query(sql: str, *values: Value) -> Generator[Statement, list[Row], list[Row]]:
    """Yields one statement from inside a unit: `rows = yield from query("SELECT ...", value)`."""
    return (yield sql, values)


class Store(Protocol):
    """Runs units, one after the other, each wholly or not at all."""

    async def write(self, name: str, unit: Unit[T]) -> T:
        """Runs the unit and returns once its effect is on disk. If cancelled, it may still happen."""
        ...

    async def read(self, unit: Unit[T]) -> T:
        """Runs a unit that only reads, on one consistent snapshot that holds all finished writes."""
        ...

    def frozen(self) -> AbstractContextManager["Reader"]:
        """The store as it is now, whatever is written meanwhile; for reads that take their time."""
        ...

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after every commit."""
        ...

    @property
    def takes_writes(self) -> bool:
        """Did the last write get to the disk? Whoever asks tries one now and then, if nobody else does."""
        ...


class Reader(Protocol):
    """Runs units that only read."""

    async def read(self, unit: Unit[T]) -> T: ...


_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
"""What SQLite says for want of room: in the log or the database, and in the log's shared index."""


class StoreFault(RpcError):
    """The database did not take the write. Whole batches fail before the commit or not at all."""

    def __init__(self, error: sqlite3.Error) -> None:
        full = getattr(error, "sqlite_errorname", "") in _NO_ROOM
        super().__init__(
            StatusCode.RESOURCE_EXHAUSTED if full else StatusCode.UNAVAILABLE,
            DISK_FULL if full else "STORE_UNAVAILABLE",
            "the center's disk is full" if full else "the center's database did not take the write",
            retry_after_ms=5000,
        )


class _Pending(NamedTuple, Generic[T]):
    unit: Unit[T]
    done: "asyncio.Future[T]"


class SqliteStore:
    """SQLite with group commit: units that wait together share one transaction and one fsync.

    Each unit has its own savepoint; callers are answered only after the commit, with
    synchronous=FULL. `hop` takes a batch to the writer. Reads run in place on a second connection
    (WAL): a point read takes microseconds, far less than handing it to a thread. `another` opens one
    more connection to what is committed now, for long reads; `aside` runs them out of the way.
    """

    def __init__(
        self,
        hop: Hop,
        reader: sqlite3.Connection,
        another: Callable[[], sqlite3.Connection],
        aside: Aside,
        close_writer: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._hop = hop
        self._reader = reader
        self._another = another
        self._aside = aside
        self._close_writer = close_writer
        self._pending: deque[_Pending[Any]] = deque()
        self._draining: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[], None]] = []
        self._takes_writes = True

    @property
    def takes_writes(self) -> bool:
        return self._takes_writes

    @classmethod
    async def open(cls, path: Path, schema: str) -> "SqliteStore":
        """Opens or creates the database and brings it to `schema` (idempotent statements)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = await aiosqlite.connect(path, isolation_level=None)

        def read_only() -> sqlite3.Connection:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA schema_version")  # opens the file now, not at the first read
            return connection

        try:
            for pragma in (
                "journal_mode=WAL",
                "synchronous=FULL",
                "foreign_keys=ON",
                # What is deleted is overwritten: an erased account must not be legible in the file.
                "secure_delete=ON",
                "busy_timeout=5000",
                # SQLite's own 2 MB are too few for the leaves that a long catch-up writes again and again.
                f"cache_size=-{CACHE_KIB}",
            ):
                await writer.execute(f"PRAGMA {pragma}")
            await writer.executescript(schema)
            reader = read_only()
        except BaseException:
            await writer.close()  # or its thread would keep the process from ending
            raise
        # aiosqlite's one hop to its thread; its public calls would hop once per statement.
        execute: Any = writer._execute  # noqa: SLF001
        return cls(
            lambda units: execute(run_batch, writer._conn, units),  # noqa: SLF001 - as above
            reader,
            read_only,
            asyncio.to_thread,
            writer.close,
        )

    async def close(self) -> None:
        """Finishes what is pending and closes the database."""
        while self._draining is not None:
            await asyncio.wait([self._draining])
        if self._close_writer is not None:
            await self._close_writer()
        # Last, and read-only: so the log and its index stay, and the next start needs no room for them.
        self._reader.close()

    def on_commit(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    async def write(self, name: str, unit: Unit[T]) -> T:
        if len(self._pending) >= PENDING_UNITS_MAX:
            raise RpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "STORE_BUSY",
                "too many writes are waiting at this center",
                retry_after_ms=200,
            )
        with telemetry.span(f"store {name}", {"db.system.name": "sqlite"}):
            done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._pending.append(_Pending(unit, done))
            if self._draining is None:
                self._draining = asyncio.create_task(self._drain())
            return await done

    async def read(self, unit: Unit[T]) -> T:
        self._reader.execute("BEGIN")
        try:
            return drive(self._reader, unit)
        finally:
            self._reader.execute("ROLLBACK")

    @contextmanager
    def frozen(self) -> Iterator[Reader]:
        connection = self._another()
        try:
            connection.execute("BEGIN")
            # In WAL mode a transaction sees what was committed at its first read.
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
            yield _Frozen(connection, self._aside)
        finally:
            connection.close()

    async def _drain(self) -> None:
        try:
            while self._pending:
                count = min(len(self._pending), BATCH_UNITS_MAX)
                batch = [self._pending.popleft() for _ in range(count)]
                await self._commit(batch)
        finally:
            self._draining = None

    async def _commit(self, batch: list[_Pending[Any]]) -> None:
        units = [pending.unit for pending in batch]
        try:
            outcomes = await self._hop(units)
            self._takes_writes = True
        except sqlite3.Error as error:
            self._takes_writes = False
            outcomes = [StoreFault(error)] * len(batch)
        except Exception as bug:  # noqa: BLE001 - those who wait must hear of it
            outcomes = [_Raised(bug)] * len(batch)
        for pending, outcome in zip(batch, outcomes, strict=True):
            if pending.done.done():
                continue  # the caller stopped waiting
            if isinstance(outcome, _Raised):
                pending.done.set_exception(outcome.error)
            elif isinstance(outcome, StoreFault):
                pending.done.set_exception(outcome)
            else:
                pending.done.set_result(outcome)
        for listener in self._listeners:
            listener()


@dataclass(frozen=True, slots=True)
class _Frozen:
    connection: sqlite3.Connection
    aside: Aside

    async def read(self, unit: Unit[T]) -> T:
        reading = asyncio.ensure_future(self.aside(drive, self.connection, unit))
        try:
            result: T = await asyncio.shield(reading)
        except asyncio.CancelledError:
            # The connection must not be closed under whoever reads from it.
            self.connection.interrupt()
            await asyncio.wait([reading])
            raise
        return result


@dataclass(slots=True)
class _Raised:
    error: Exception


async def in_place(function: Callable[..., Any], *arguments: Any) -> Any:
    """The `Aside` of those who have one thread only."""
    return function(*arguments)


def run_batch(connection: sqlite3.Connection, units: list[Unit[Any]]) -> list[Any]:
    """In the writer thread: all units in one transaction, each undone by itself if it raises."""
    outcomes: list[Any] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for unit in units:
            connection.execute("SAVEPOINT unit")
            try:
                outcome: Any = drive(connection, unit)
            except sqlite3.OperationalError:
                raise  # the disk, not the unit: nothing of this batch may be acknowledged
            except Exception as error:  # noqa: BLE001 - handed to the unit's caller
                connection.execute("ROLLBACK TO unit")
                outcome = _Raised(error)
            connection.execute("RELEASE unit")
            outcomes.append(outcome)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return outcomes


def drive(connection: sqlite3.Connection, unit: Unit[T]) -> T:
    """Runs a unit in the transaction that is open, and returns its result."""
    cursor = connection.cursor()
    try:
        sql, values = next(unit)
        while True:
            try:
                rows = cursor.execute(sql, values).fetchall()
            except sqlite3.IntegrityError as error:
                sql, values = unit.throw(error)
            else:
                sql, values = unit.send(rows)
    except StopIteration as finished:
        result: T = finished.value
        return result
