"""The origin of an application remembers when it asked home and what came of it."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from duohuo.internal.v1.peer_services_pb2 import DecideResponse
from duohuo.v1.transfer_service_pb2 import TRANSFER_STATE_CREDITED, TransferResult
from runtime.endpoint import Call, Reply
from runtime.errors import unreachable
from runtime.mesh import Mesh
from runtime.store import SqliteStore
from tests.fakes import (
    NOON_MS,
    FakeClock,
    RecordingEndpoint,
    fails,
    in_turn,
    says,
    site,
    temporary_store,
)
from tests.unit.test_applications import accept, made
from transfer_svc import app, attempts
from transfer_svc.attempts import KEPT_MAX, Attempt
from transfer_svc.dispatch import QueueWorker

APPLICATION = made().application_id


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(app.SCHEMA, app.TOPICS, ["b"]) as opened:
        yield opened


async def test_each_attempt_is_kept_with_its_time_and_reason(store: SqliteStore) -> None:
    clock = FakeClock()

    def slow(call: Call) -> Reply:
        clock.advance(300)
        return fails(unreachable("b", ran=True))(call)

    credited = TransferResult(state=TRANSFER_STATE_CREDITED)
    home = RecordingEndpoint(in_turn(slow, says(DecideResponse(result=credited))))
    here = site("a", "a", "b", clock=clock)
    worker = QueueWorker(replace(here, mesh=Mesh("a", {"a": home, "b": home}, clock)), store)
    await accept(store, made())
    lane = worker._lanes["b"]
    for pause_ms in (700, 0):
        lane.asked[APPLICATION] = None
        await worker._attempt(lane, APPLICATION)
        clock.advance(pause_ms)
    assert await store.read(attempts.of(APPLICATION)) == [
        Attempt(1, "b", NOON_MS, NOON_MS + 300, "CENTER_UNREACHABLE"),
        Attempt(2, "b", NOON_MS + 1000, NOON_MS + 1000, ""),
    ]


async def test_only_the_last_attempts_of_each_application_are_kept(store: SqliteStore) -> None:
    await store.write("attempt", attempts.record("another", "b", 0, 1, "WHY"))
    for number in range(KEPT_MAX + 5):
        await store.write("attempt", attempts.record(APPLICATION, "b", number, number, "WHY"))
    numbers = [one.number for one in await store.read(attempts.of(APPLICATION))]
    assert numbers == list(range(6, KEPT_MAX + 6))
    assert len(await store.read(attempts.of("another"))) == 1
