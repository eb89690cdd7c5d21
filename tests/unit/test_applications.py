"""An application waits at its origin until home decides it, and ends exactly once."""

from collections.abc import AsyncIterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_CANCELLING,
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
BODY, HOME = b"body", "b"


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
    return await store.write("accept", applications.accept(application, BODY, HOME, stamp(at_ms)))


async def found(store: SqliteStore, application: Application) -> ApplicationRow:
    row = await store.read(applications.find(application.application_id))
    assert row is not None
    return row


async def decide(
    store: SqliteStore, application: Application, decision: Decision, reason: str = ""
) -> Application | None:
    unit = applications.decide(application.application_id, decision, reason, BOB, stamp(9))
    return await store.write("decide", unit)


async def fail(store: SqliteStore, application: Application, aside_ms: int | None = None) -> None:
    unit = applications.attempted(
        application.application_id, "CENTER_UNREACHABLE", NOON_MS, aside_ms
    )
    await store.write("attempted", unit)


async def withdraw(store: SqliteStore, application: Application) -> Application | None:
    unit = applications.withdraw(application.application_id, "CENTER_UNREACHABLE", stamp(5))
    return await store.write("withdraw", unit)


async def told(store: SqliteStore) -> list[ApplicationState.ValueType]:
    """The states that the other centers are told of, in order."""
    entries = await store.read(log.read_after("applications", 0, 100))
    records = [LogRecord.FromString(entry.record) for entry in entries]
    return [record.application_changed.application.state for record in records]


async def due(
    store: SqliteStore, at_ms: int, place: int = applications.NEXT, home: str = HOME
) -> list[str]:
    """Transfer ids of what home may be asked for, in order."""
    unit = applications.due(home, place, NOON_MS + at_ms, DELAY_MS_MAX, 10)
    rows = [await store.read(applications.find(one)) for one in await store.read(unit)]
    return [row.message.transfer_id for row in rows if row]


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
    assert await told(store) == [APPLICATION_STATE_QUEUED]


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
    await fail(store, made(), aside_ms=700)
    assert await due(store, now_ms, applications.ASIDE) == ["transfer-1"] * is_due
    assert await due(store, now_ms, applications.NEXT) == []


async def test_the_longest_overdue_comes_first_and_each_home_has_its_own(
    store: SqliteStore,
) -> None:
    payers = [account(slot) for slot in (1, 3, 5)]
    for number, (payer, at_ms) in enumerate(zip(payers, (2, 1, 0), strict=True), start=1):
        await accept(store, made(number, payer), at_ms)
    elsewhere = applications.accept(made(4, account(2)), BODY, "c", stamp(9))
    await store.write("accept", elsewhere)
    assert await due(store, 2) == ["transfer-3", "transfer-2", "transfer-1"]
    assert await due(store, 1) == ["transfer-3", "transfer-2"]
    assert await due(store, 9, home="c") == ["transfer-4"]
    assert await store.read(applications.next_due_ms(HOME, NOON_MS)) == NOON_MS + 1
    assert await store.read(applications.next_due_ms(HOME, NOON_MS + 2)) is None
    await fail(store, made(1), aside_ms=500)
    assert await store.read(applications.next_due_ms(HOME, NOON_MS + 2)) == NOON_MS + 500


class TestOrderPerPayer:
    """Of each payer's line home is asked for the first only."""

    async def line(self, store: SqliteStore) -> None:
        for number in (1, 2, 3):
            await accept(store, made(number), at_ms=number)

    async def test_later_ones_wait_until_the_earlier_one_has_ended(
        self, store: SqliteStore
    ) -> None:
        await self.line(store)
        order = []
        while waiting := await due(store, 100):
            order.append(waiting)
            await decide(store, made(int(waiting[0][-1])), Decision.FAILED)
        assert order == [["transfer-1"], ["transfer-2"], ["transfer-3"]]

    async def test_one_that_home_has_debited_holds_nobody_up(self, store: SqliteStore) -> None:
        await self.line(store)
        await decide(store, made(1), Decision.DEBITED)
        assert await due(store, 100) == ["transfer-2"]

    async def test_a_failure_of_home_keeps_the_order(self, store: SqliteStore) -> None:
        await self.line(store)
        await fail(store, made(1))
        assert await due(store, 100) == ["transfer-1"]

    async def test_other_payers_go_before_one_that_was_tried(self, store: SqliteStore) -> None:
        await accept(store, made(1), at_ms=-2)
        await accept(store, made(2, BOB), at_ms=-1)
        await fail(store, made(1))
        assert await due(store, 100) == ["transfer-2", "transfer-1"]

    async def test_one_that_waits_for_a_third_party_steps_aside(self, store: SqliteStore) -> None:
        await self.line(store)
        await fail(store, made(1), aside_ms=50)
        assert await due(store, 100) == ["transfer-2"]
        assert await due(store, 100, applications.ASIDE) == ["transfer-1"]
        await decide(store, made(2), Decision.SUCCEEDED)
        await decide(store, made(1), Decision.SUCCEEDED)
        assert await due(store, 100) == ["transfer-3"]

    @pytest.mark.parametrize("number", [1, 2, 3])
    async def test_a_withdrawn_one_neither_waits_nor_holds_up(
        self, store: SqliteStore, number: int
    ) -> None:
        await self.line(store)
        await withdraw(store, made(number))
        assert await due(store, 5, applications.ASIDE) == [f"transfer-{number}"]
        assert await due(store, 100) == ["transfer-2" if number == 1 else "transfer-1"]

    async def test_it_is_kept_when_a_lost_disk_has_come_back(self, store: SqliteStore) -> None:
        """Copies are told in any order; what they say of their acceptance counts."""
        for number in (2, 1, 3):
            copied = made(number)
            copied.create_time.CopyFrom(timestamp(NOON_MS + number))
            await store.write("copy", applications.copy(copied, BODY))
        ended, cancelled = made(4), made(5)
        ended.state, cancelled.state = APPLICATION_STATE_DELIVERED, APPLICATION_STATE_CANCELLING
        for copied in (ended, cancelled, made(6, origin="b")):
            await store.write("copy", applications.copy(copied, BODY))
        strays = await store.read(applications.strays("a", lambda _payer: HOME))
        assert [one.application_id for one in strays] == [
            made(number).application_id for number in (5, 1, 2, 3)
        ]
        await store.write("line up", applications.line_up(strays, NOON_MS))
        assert await store.read(applications.strays("a", lambda _payer: HOME)) == []
        order = []
        while waiting := await due(store, 100):
            order += waiting
            await decide(store, made(int(waiting[0][-1])), Decision.FAILED)
        assert order == [f"transfer-{number}" for number in (5, 1, 2, 3)]

    async def test_a_new_home_is_asked_in_the_same_order(self, store: SqliteStore) -> None:
        await self.line(store)
        strays = await store.read(applications.strays("a", lambda _payer: "c"))
        await store.write("line up", applications.line_up(strays, NOON_MS))
        assert (await due(store, 100), await due(store, 100, home="c")) == ([], ["transfer-1"])
        await decide(store, made(1), Decision.FAILED)
        assert await due(store, 100, home="c") == ["transfer-2"]


async def test_a_withdrawn_application_is_cancelling_until_home_says_more(
    store: SqliteStore,
) -> None:
    await accept(store, made())
    for _ in range(2):
        withdrawn = await withdraw(store, made())
        assert withdrawn is not None
        assert withdrawn.state == APPLICATION_STATE_CANCELLING
        assert not withdrawn.HasField("decide_time")
    await decide(store, made(), Decision.CANCELLED, "CANCELLED")
    assert await told(store) == [
        APPLICATION_STATE_QUEUED,
        APPLICATION_STATE_CANCELLING,
        APPLICATION_STATE_CANCELLED,
    ]


@pytest.mark.parametrize("decision", Decision)
async def test_withdrawing_what_is_decided_changes_nothing(
    store: SqliteStore, decision: Decision
) -> None:
    await accept(store, made())
    decided = await decide(store, made(), decision)
    assert await withdraw(store, made()) == decided
    assert await due(store, 100) == await due(store, 100, applications.ASIDE) == []


async def test_withdrawing_nothing_is_nothing(store: SqliteStore) -> None:
    assert await withdraw(store, made()) is None


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
