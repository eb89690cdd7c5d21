"""Who waits for a topic hears of its own entries, and of nothing else that is committed."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import account_svc.store as accounts
from account_svc import registry
from duohuo.internal.v1.log_pb2 import LogRecord
from runtime.store import SqliteStore, query
from sync_bus import log
from sync_bus.growth import Growth
from tests.fakes import stamp, temporary_store
from tests.unit.centers import until


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(accounts.SCHEMA, accounts.TOPICS, ["b"]) as opened:
        yield opened


async def test_only_who_waits_for_a_topic_that_has_grown_wakes(store: SqliteStore) -> None:
    growth = Growth(store)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(growth.run())
        mine, other = growth.of(registry.ACCOUNTS.name), growth.of(accounts.CHANGES.name)
        await until(lambda: mine.next() > 1 and other.next() > 1)
        before, of_other = mine.next(), other.next()
        await store.write("nothing that others need", query("SELECT 1"))
        await store.write("append", log.append(registry.ACCOUNTS, stamp(1), LogRecord()))
        assert await mine.wait(before)
        assert (mine.next(), other.next()) == (before + 1, of_other)
        running.cancel()
