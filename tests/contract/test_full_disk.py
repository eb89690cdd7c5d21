"""A really full disk: a small file system of its own, filled to the last byte. Needs root."""

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from grpc import StatusCode
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from runtime.hlc import HybridClock
from runtime.span_store import SpanStore
from runtime.store import SqliteStore, StoreFault, Unit, query
from session_svc import store as units
from session_svc.sessions import Lifetimes, Sessions
from session_svc.store import NewSession, SessionRow, token_hash
from sync_bus import log, node
from sync_bus.log import Stamps
from tests.contract.backends import SCHEMA
from tests.fakes import GENERATION, SEAL, FakeClock, SeededIds, account, stamp

ALICE = account(1)
SIZE = "8m"
PAGES = 10
"""More than fits into what a partly used page of the log has left."""


class SmallDisk:
    """A file system of a few MiB."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / "filler"

    def fill(self) -> None:
        """Leaves not one byte of room."""
        with self._filler.open("ab", buffering=0) as filler:
            for block_bytes in (65536, 4096, 1):
                try:
                    while filler.write(b"\0" * block_bytes) == block_bytes:
                        pass
                except OSError:
                    continue  # a smaller block may still fit

    def free(self) -> None:
        """Makes room again."""
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    directory = tmp_path / "disk"
    directory.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no small file system can be mounted here: there is no mount command")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=700", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(directory)
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def put(name: str) -> Unit[None]:
    yield from query("INSERT INTO item VALUES (?, 1)", name * 4096 * PAGES)


async def names(store: SqliteStore) -> set[str]:
    return {row[0][0] for row in await store.read(query("SELECT name FROM item"))}


async def refused(store: SqliteStore, name: str) -> None:
    """The disk does not take it, and that is said."""
    with pytest.raises(StoreFault) as fault:
        await store.write("put", put(name))
    assert (fault.value.code, fault.value.reason) == (StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert not fault.value.ran


async def test_a_store_refuses_writes_goes_on_reading_and_recovers_by_itself(
    disk: SmallDisk,
) -> None:
    path = disk.directory / "store.db"
    store = await SqliteStore.open(path, SCHEMA)
    await store.write("put", put("a"))
    disk.fill()
    await refused(store, "b")
    await refused(store, "c")
    assert await names(store) == {"a"}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as other:
        assert other.execute("SELECT count(*) FROM item").fetchall() == [(1,)]
    disk.free()
    await store.write("put", put("d"))
    assert await names(store) == {"a", "d"}
    await store.close()


async def test_a_store_that_was_closed_is_opened_again_on_a_full_disk(disk: SmallDisk) -> None:
    path = disk.directory / "store.db"
    store = await SqliteStore.open(path, SCHEMA)
    await store.write("put", put("a"))
    await store.close()
    disk.fill()
    store = await SqliteStore.open(path, SCHEMA)
    assert await names(store) == {"a"}
    await refused(store, "b")
    disk.free()
    await store.write("put", put("c"))
    assert await names(store) == {"a", "c"}
    await store.close()


async def test_a_login_counts_while_the_disk_is_full_and_is_stored_afterwards(
    disk: SmallDisk,
) -> None:
    store = await SqliteStore.open(disk.directory / "session.db", node.SCHEMA + units.SCHEMA)
    await store.write("prepare", node.prepare(units.TOPICS, ["b"]))
    await store.write("begin life", log.begin_life(GENERATION, {}))
    clock, ids, made = FakeClock(), SeededIds(), stamp(0)
    sessions = Sessions("a", store, Stamps(clock, HybridClock(clock)), Lifetimes())

    async def login(device: str) -> bytes:
        row = SessionRow(
            ids.unique(), ALICE, device, made.time_ms, made.time_ms + 1000, made.time_ms
        )
        hashed = token_hash(SEAL.token("a", ids.secret()))
        await sessions.add(NewSession(hashed, row, made))
        return hashed

    async def stored() -> set[str]:
        return {row[0] for row in await store.read(query("SELECT device FROM session"))}

    await login("before")
    disk.fill()
    kept, ended = await login("kept"), await login("ended")
    assert await stored() == {"before"}
    listed = await sessions.of_account(ALICE)
    assert {one.device for one in listed} == {"before", "kept", "ended"}
    await sessions.remove(ended)
    await sessions.store_waiting()
    assert await sessions.find(kept) is not None
    assert await sessions.find(ended) is None
    with pytest.raises(StoreFault):
        await sessions.revoke_all(ALICE, stamp(1))
    disk.free()
    await sessions.store_waiting()
    assert await stored() == {"before", "kept"}
    assert await sessions.revoke_all(ALICE, stamp(1)) == 2
    assert await stored() == set()
    await store.close()


@pytest.mark.parametrize("opened_before", [False, True])
def test_spans_are_lost_while_the_disk_is_full_and_kept_again_afterwards(
    disk: SmallDisk, *, opened_before: bool
) -> None:
    recorded = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(recorded))
    tracer = provider.get_tracer("test")
    for name in ("before", "x" * 4096 * PAGES, "after"):
        tracer.start_span(name).end()
    before, lost, after = recorded.get_finished_spans()
    if opened_before:
        earlier = SpanStore(disk.directory / "spans.db")
        earlier.export([before])
        earlier.shutdown()
    disk.fill()
    spans = SpanStore(disk.directory / "spans.db")
    assert spans.export([lost]) is SpanExportResult.FAILURE
    assert spans.find("anything") == []
    disk.free()
    assert spans.export([after]) is SpanExportResult.SUCCESS
    context = after.get_span_context()
    assert context is not None
    assert [span.name for span in spans.find(f"{context.trace_id:032x}")] == ["after"]
    spans.shutdown()
