"""What only SQLite's store can be asked: power loss, its bounds, and its faults."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

import runtime.store
from runtime.errors import RpcError
from runtime.store import SqliteStore, StoreFault, Unit, in_place, query
from tests.contract.backends import SqliteBackend


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[SqliteBackend]:
    opened = SqliteBackend(tmp_path)
    yield opened
    await opened.close()


@pytest.fixture
async def store(backend: SqliteBackend) -> SqliteStore:
    return await backend.open()


def put(name: str) -> Unit[str]:
    yield from query("INSERT INTO item VALUES (?, 1)", name)
    return name


def asked(sql: str) -> Unit[object]:
    rows = yield from query(sql)
    return rows[0][0]


@pytest.mark.parametrize(
    ("pragma", "value"), [("synchronous", 2), ("journal_mode", "wal"), ("foreign_keys", 1)]
)
async def test_a_commit_is_on_disk_when_it_returns(
    store: SqliteStore, pragma: str, value: object
) -> None:
    """2 is FULL: the log is synced at every commit, so that power loss costs nothing."""
    assert await store.write("ask", asked(f"PRAGMA {pragma}")) == value


async def test_units_beyond_the_bound_are_refused_and_did_not_run(
    store: SqliteStore, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.store, "PENDING_UNITS_MAX", 3)
    outcomes = await asyncio.gather(
        *(store.write("put", put(f"{n}")) for n in range(10)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, RpcError)]
    done = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert {(e.code, e.reason, e.ran) for e in refused} == {
        (StatusCode.RESOURCE_EXHAUSTED, "STORE_BUSY", False)
    }
    assert (len(done), len(refused)) == (3, 7)
    assert sorted(done) == [row[0] for row in backend.committed("SELECT name FROM item")]
    assert await store.write("put", put("later")) == "later"


async def test_a_caller_cancelled_in_mid_transaction_leaves_a_whole_unit(
    store: SqliteStore, backend: SqliteBackend
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> Unit[None]:
        yield from put("first")
        entered.set()
        go_on.wait()
        yield from put("second")

    writing = asyncio.ensure_future(store.write("slow", slow()))
    await asyncio.to_thread(entered.wait)
    behind = asyncio.ensure_future(store.write("put", put("behind")))
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    go_on.set()
    assert await behind == "behind"
    assert backend.committed("SELECT count(*) FROM item") == [(3,)]


async def test_reading_does_not_wait_for_writing(store: SqliteStore) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow() -> Unit[None]:
        yield from put("x")
        entered.set()
        go_on.wait()

    writing = asyncio.ensure_future(store.write("slow", slow()))
    await asyncio.to_thread(entered.wait)
    assert await store.read(asked("SELECT count(*) FROM item")) == 0
    go_on.set()
    await writing
    assert await store.read(asked("SELECT count(*) FROM item")) == 1


async def test_a_fault_of_the_database_fails_the_whole_batch_and_nothing_is_there(
    store: SqliteStore, backend: SqliteBackend
) -> None:
    outcomes = await asyncio.gather(
        store.write("put", put("before")),
        store.write("fault", query("SELECT * FROM no_such_table")),
        store.write("put", put("after")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [StoreFault] * 3
    assert backend.committed("SELECT count(*) FROM item") == [(0,)]
    assert await store.write("put", put("later")) == "later"


async def test_a_fault_of_our_own_reaches_those_who_wait(tmp_path: Path) -> None:
    """Nobody is left waiting for ever."""

    async def broken(_units: list[Unit[Any]]) -> list[Any]:
        raise KeyError("hop")

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(tmp_path / "store.db")

    store = SqliteStore(broken, connect(), connect, in_place)
    outcomes = await asyncio.gather(
        *(store.write("put", put(f"{n}")) for n in range(2)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [KeyError] * 2
    await store.close()


async def test_a_full_disk_is_called_that_and_the_store_goes_on_when_there_is_room(
    store: SqliteStore, backend: SqliteBackend
) -> None:
    """The file may not grow beyond its size now, as on a full disk."""
    pages = await store.write("ask", asked("PRAGMA page_count"))
    await store.write("limit", query(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(StoreFault) as fault:
        await store.write("put", put("x" * 100_000))
    assert (fault.value.code, fault.value.reason) == (StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert not fault.value.ran
    assert backend.committed("SELECT count(*) FROM item") == [(0,)]
    await store.write("limit", query("PRAGMA max_page_count = 1000000"))
    assert await store.write("put", put("x" * 100_000))


async def test_a_locked_database_is_a_fault_and_did_not_run(
    store: SqliteStore, backend: SqliteBackend
) -> None:
    await store.write("impatient", query("PRAGMA busy_timeout = 0"))
    other = sqlite3.connect(backend.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreFault) as fault:
        await store.write("put", put("x"))
    assert (fault.value.reason, fault.value.ran) == ("STORE_UNAVAILABLE", False)
    other.execute("ROLLBACK")
    other.close()
    assert await store.write("put", put("x")) == "x"


async def test_a_database_that_cannot_be_opened_does_not_keep_its_process_from_ending(
    tmp_path: Path,
) -> None:
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    threads = set(threading.enumerate())
    with pytest.raises(sqlite3.DatabaseError):
        await SqliteStore.open(tmp_path / "store.db", "")
    for thread in set(threading.enumerate()) - threads:
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive()
