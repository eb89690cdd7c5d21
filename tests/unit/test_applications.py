"""An application waits at its origin until home decides it, and ends exactly once."""

from collections.abc import AsyncIterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_DELIVERED,
    APPLICATION_STATE_QUEUED,
    Application,
    ApplicationState,
)
from runtime.clock import timestamp
from runtime.ids import application_id
from runtime.store import SqliteStore
from sync_bus import log
from tests.fakes import NOON_MS, account, stamp, temporary_store
from transfer_svc import app, applications
from transfer_svc.applications import ApplicationRow
from transfer_svc.dispatch import DELAY_MS_FIRST, DELAY_MS_MAX, delay_ms, transfer_of
from transfer_svc.states import APPLICATION_OPEN, Decision, IllegalTransition

ALICE, BOB = account(1), account(2)
BODY = b"body"


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(app.SCHEMA, app.TOPICS, ["b"]) as opened:
        yield opened


def made(number: int = 1, payer: str = ALICE, origin: str = "a", transfer: int = 0) -> Application:
    return Application(
        application_id=application_id(origin, 1, f"{number:032x}"),
        transfer_id=f"transfer-{transfer or number}",
        state=APPLICATION_STATE_QUEUED,
        payer_account_id=payer,
        payee_identifier="bob@example.com",
        amount=Money(currency_code="CNY", minor_units=5),
        memo="rent",
        origin_center=origin,
        create_time=timestamp(NOON_MS),
    )


async def accept(store: SqliteStore, application: Application, at_ms: int = 0) -> ApplicationRow:
    return await store.write("accept", applications.accept(application, BODY, stamp(at_ms)))


async def found(store: SqliteStore, application: Application) -> ApplicationRow:
    row = await store.read(applications.find(application.application_id))
    assert row is not None
    return row


async def decide(
    store: SqliteStore, application: Application, decision: Decision, reason: str = ""
) -> Application | None:
    unit = applications.decide(application.application_id, decision, reason, BOB, stamp(9))
    return await store.write("decide", unit)


async def fail(store: SqliteStore, application: Application) -> None:
    unit = applications.attempted(application.application_id, "CENTER_UNREACHABLE", NOON_MS + 700)
    await store.write("attempted", unit)


async def told(store: SqliteStore) -> list[ApplicationState.ValueType]:
    """The states that the other centers are told of, in order."""
    entries = await store.read(log.read_after("applications", 0, 100))
    records = [LogRecord.FromString(entry.record) for entry in entries]
    return [record.application_changed.application.state for record in records]


async def due(store: SqliteStore, at_ms: int, origin: str = "a") -> list[str]:
    rows = await store.read(applications.due(origin, NOON_MS + at_ms, DELAY_MS_MAX, 10))
    return [row.message.transfer_id for row in rows]


async def test_accepting_twice_is_accepting_once(store: SqliteStore) -> None:
    first = await accept(store, made(1))
    again = await accept(store, made(2, transfer=1))
    assert again == first
    assert first.message == made(1)
    assert first.body_hash == BODY
    assert await told(store) == [APPLICATION_STATE_QUEUED]


@pytest.mark.parametrize(
    "other", [made(2), made(2, transfer=1, payer=BOB), made(2, transfer=1, origin="b")]
)
async def test_another_transfer_or_payer_or_origin_is_another_application(
    store: SqliteStore, other: Application
) -> None:
    await accept(store, made(1))
    assert (await accept(store, other)).message == other


async def test_an_attempt_without_a_decision_counts_and_says_why(store: SqliteStore) -> None:
    await accept(store, made())
    await fail(store, made())
    message = (await found(store, made())).message
    assert (message.attempts, message.last_attempt_error) == (1, "CENTER_UNREACHABLE")
    assert await due(store, 699) == []
    assert await due(store, 700) == ["transfer-1"]


async def test_what_has_been_decided_is_attempted_no_more(store: SqliteStore) -> None:
    await accept(store, made())
    decided = await decide(store, made(), Decision.SUCCEEDED)
    await fail(store, made())
    assert (await found(store, made())).message == decided
    assert await due(store, 10**9) == []


@pytest.mark.parametrize(
    ("now_ms", "is_due"),
    [
        (699, False),
        (700, True),
        (701, True),
        (700 - DELAY_MS_MAX, False),
        (699 - DELAY_MS_MAX, True),
    ],
    ids=["early", "now", "late", "clock back a little", "clock back a lot"],
)
async def test_an_attempt_is_due_at_its_time_and_after_the_clock_has_jumped_back(
    store: SqliteStore, now_ms: int, is_due: bool
) -> None:
    await accept(store, made())
    await fail(store, made())
    assert await due(store, now_ms) == ["transfer-1"] * is_due


async def test_the_longest_overdue_comes_first_and_each_origin_has_its_own(
    store: SqliteStore,
) -> None:
    await accept(store, made(1), at_ms=2)
    await accept(store, made(2), at_ms=1)
    await accept(store, made(3, origin="b"), at_ms=0)
    assert await due(store, 5) == ["transfer-2", "transfer-1"]
    assert await due(store, 5, origin="b") == ["transfer-3"]
    assert await store.read(applications.next_due_ms("a")) == NOON_MS + 1
    assert await store.read(applications.next_due_ms("c")) is None


async def test_a_returned_home_makes_everything_due(store: SqliteStore) -> None:
    await accept(store, made())
    await fail(store, made())
    await store.write("wake", applications.wake("b", NOON_MS + 5))
    assert await due(store, 5) == []
    await store.write("wake", applications.wake("a", NOON_MS + 5))
    assert await due(store, 5) == ["transfer-1"]


@pytest.mark.parametrize("decision", Decision)
async def test_a_decision_is_noted_told_and_repeatable(
    store: SqliteStore, decision: Decision
) -> None:
    await accept(store, made())
    await fail(store, made())
    decided = await decide(store, made(), decision, "WHY")
    assert decided is not None
    assert decided.HasField("decide_time") is (decided.state not in APPLICATION_OPEN)
    assert (decided.reason, decided.last_attempt_error) == ("WHY", "")
    assert decided.payee_account_id == BOB
    assert await decide(store, made(), decision, "WHY") == decided
    assert await told(store) == [APPLICATION_STATE_QUEUED, decided.state]


async def test_a_decision_that_contradicts_the_first_changes_nothing(store: SqliteStore) -> None:
    await accept(store, made())
    decided = await decide(store, made(), Decision.FAILED, "INSUFFICIENT_FUNDS")
    with pytest.raises(IllegalTransition):
        await decide(store, made(), Decision.SUCCEEDED)
    assert (await found(store, made())).message == decided


async def test_a_decision_on_nothing_is_nothing(store: SqliteStore) -> None:
    assert await decide(store, made(), Decision.SUCCEEDED) is None


async def test_only_open_applications_of_this_origin_wait_for_a_transfer(
    store: SqliteStore,
) -> None:
    here, there, ended = made(1), made(2, origin="b", transfer=1), made(3, payer=BOB, transfer=1)
    for application in (here, there, ended):
        await accept(store, application)
    await decide(store, ended, Decision.CANCELLED)
    await decide(store, here, Decision.DEBITED)
    waiting = [
        await store.read(applications.waiting_for(payer, "transfer-1", BODY, "a"))
        for payer in (ALICE, BOB)
    ]
    assert waiting == [[here.application_id], []]


async def test_a_copy_is_what_its_origin_last_said_and_is_told_to_nobody(
    store: SqliteStore,
) -> None:
    other = made(origin="b")
    await store.write("copy", applications.copy(other, BODY))
    other.state = APPLICATION_STATE_DELIVERED
    other.attempts = 3
    await store.write("copy", applications.copy(other, BODY))
    assert (await found(store, other)).message == other
    assert await told(store) == []
    assert await due(store, 10**9) == []


async def test_every_change_moves_an_application_to_the_end_of_the_changes(
    store: SqliteStore,
) -> None:
    for number in (1, 2, 3):
        await accept(store, made(number))
    before = (await found(store, made(3))).change_number
    await decide(store, made(1), Decision.DEBITED)
    changed = await store.read(applications.changed_since(ALICE, before, 10))
    assert [row.message.transfer_id for row in changed] == ["transfer-1"]
    newest_first = await store.read(applications.of_payer(ALICE, None, 10))
    numbers = [row.change_number for row in newest_first]
    assert [row.message.transfer_id for row in newest_first] == [
        "transfer-1",
        "transfer-3",
        "transfer-2",
    ]
    assert numbers == sorted(set(numbers), reverse=True)
    rest = await store.read(applications.of_payer(ALICE, numbers[0], 1))
    assert [row.message.transfer_id for row in rest] == ["transfer-3"]
    assert await store.read(applications.of_payer(BOB, None, 10)) == []


async def test_only_the_open_ones_are_counted_as_open(store: SqliteStore) -> None:
    for number, decision in enumerate(Decision):
        await accept(store, made(number + 1))
        await decide(store, made(number + 1), decision)
    await accept(store, made(10))
    assert await store.read(applications.open_count()) == 2


def test_home_is_asked_for_the_transfer_that_was_applied_for() -> None:
    transfer = transfer_of(made())
    assert transfer.transfer_id == "transfer-1"
    assert transfer.payer_account_id == ALICE
    assert transfer.payee_identifier == "bob@example.com"
    assert transfer.WhichOneof("payee") == "payee_identifier"
    assert (transfer.amount, transfer.memo) == (made().amount, "rent")


class Extreme(Random):
    """Randomness at one of its ends."""

    def __init__(self, *, highest: bool) -> None:
        super().__init__()
        self._highest = highest

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return (start if stop is None else stop) - step if self._highest else 0


@given(st.integers(0, 10**9))
def test_delays_double_up_to_a_minute_and_half_of_each_is_jitter(attempts: int) -> None:
    whole = min(DELAY_MS_FIRST * 2 ** min(attempts, 40), DELAY_MS_MAX)
    assert delay_ms(attempts, Extreme(highest=False)) == whole // 2
    assert delay_ms(attempts, Extreme(highest=True)) == whole - 1
