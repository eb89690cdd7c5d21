"""What is held can be spent by its capture alone, and comes back by itself."""

from collections.abc import AsyncIterator

import pytest

from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_CAPTURED,
    HOLD_STATE_EXPIRED,
    HOLD_STATE_HELD,
    HOLD_STATE_REFUSED,
    HOLD_STATE_RELEASED,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    HoldState,
)
from runtime.store import query
from sync_bus import log
from tests.fakes import account
from tests.unit.bank import Bank, bank
from transfer_svc import holds, ledger
from transfer_svc.app import TOPICS
from transfer_svc.audit import Audit
from transfer_svc.ledger import NotCovered
from transfer_svc.rules import HOLDS_OPEN_MAX

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""
RICH = account(4)
"""At home at a; takes euros."""


@pytest.fixture
async def two() -> AsyncIterator[Bank]:
    async with bank("a", "b") as opened:
        await opened.deposit(ALICE, 100, "deposit-1")
        yield opened


async def money(two: Bank, one: str) -> tuple[int, int]:
    """(booked, available) at home."""
    home = two.home(one)
    return await home.balance(one), await home.available(one)


async def state(two: Bank, hold_id: str = "hold-1") -> HoldState.ValueType:
    row = await two.centers["a"].store.read(holds.find(ALICE, hold_id))
    assert row is not None
    return row.state


async def test_what_is_held_is_booked_and_not_available(two: Bank) -> None:
    hold = await two.reserve(ALICE, BOB, 60, "hold-1")
    assert (hold.state, hold.reason) == (HOLD_STATE_HELD, "")
    assert await money(two, ALICE) == (100, 40)
    assert await two.centers["a"].kinds() == ["posting", "hold_changed"]


@pytest.mark.parametrize("payee", [ALAN, BOB], ids=["same home", "other home"])
async def test_what_is_held_can_be_spent_on_nothing_else(two: Bank, payee: str) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    assert (await two.pay(ALICE, payee, 41, "transfer-1")).reason == "INSUFFICIENT_FUNDS"
    assert (await two.reserve(ALICE, payee, 41, "hold-2")).reason == "INSUFFICIENT_FUNDS"
    assert (await two.pay(ALICE, payee, 40, "transfer-2")).reason == ""
    assert await money(two, ALICE) == (60, 0)


@pytest.mark.parametrize(
    ("payee", "first", "last"),
    [
        (ALAN, TRANSFER_STATE_CREDITED, TRANSFER_STATE_CREDITED),
        (BOB, TRANSFER_STATE_DEBITED, TRANSFER_STATE_CREDITED),
    ],
    ids=["same home", "other home"],
)
@pytest.mark.parametrize("minor_units", [None, 60, 25, 1])
async def test_a_capture_pays_from_what_is_held_and_gives_the_rest_back(
    two: Bank, payee: str, first: int, last: int, minor_units: int | None
) -> None:
    await two.reserve(ALICE, payee, 60, "hold-1")
    done = await two.capture(ALICE, "hold-1", "transfer-1", minor_units)
    assert done.hold is not None
    assert done.transfer is not None
    paid = minor_units or 60
    assert (done.hold.state, done.hold.captured) == (HOLD_STATE_CAPTURED, paid)
    assert (done.transfer.state, done.transfer.minor_units) == (first, paid)
    assert await money(two, ALICE) == (100 - paid, 100 - paid)
    await two.settle()
    assert await money(two, payee) == (paid, paid)
    settled = await two.centers["a"].transfer(ALICE, "transfer-1")
    assert settled is not None
    assert settled.state == last


async def test_all_there_is_can_be_held_and_captured(two: Bank) -> None:
    await two.reserve(ALICE, ALAN, 100, "hold-1")
    assert await money(two, ALICE) == (100, 0)
    await two.capture(ALICE, "hold-1", "transfer-1")
    assert await money(two, ALICE) == (0, 0)


async def test_reserving_twice_is_reserving_once(two: Bank) -> None:
    first = await two.reserve(ALICE, BOB, 60, "hold-1")
    assert await two.reserve(ALICE, BOB, 60, "hold-1") == first
    other = await two.reserve(ALICE, BOB, 30, "hold-1", body=b"other")
    assert (other.body_hash, other.minor_units) == (b"hold", 60)
    assert await money(two, ALICE) == (100, 40)


async def test_a_refusal_to_hold_stands_even_when_there_is_money_later(two: Bank) -> None:
    assert (await two.reserve(ALICE, BOB, 101, "hold-1")).reason == "INSUFFICIENT_FUNDS"
    await two.deposit(ALICE, 100, "deposit-2")
    again = await two.reserve(ALICE, BOB, 101, "hold-1")
    assert (again.state, again.reason) == (HOLD_STATE_REFUSED, "INSUFFICIENT_FUNDS")
    assert await money(two, ALICE) == (200, 200)
    assert (await two.capture(ALICE, "hold-1", "transfer-1")).refused == "HOLD_NOT_FOUND"


async def test_a_capture_again_is_the_same_capture(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    first = await two.capture(ALICE, "hold-1", "transfer-1", 20)
    assert await two.capture(ALICE, "hold-1", "transfer-1", 20) == first
    assert await money(two, ALICE) == (80, 80)


@pytest.mark.parametrize(
    ("end", "reason"),
    [("capture", "HOLD_CAPTURED"), ("release", "HOLD_RELEASED"), ("expire", "HOLD_EXPIRED")],
)
async def test_a_hold_that_has_ended_is_captured_no_more(two: Bank, end: str, reason: str) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    if end == "capture":
        await two.capture(ALICE, "hold-1", "transfer-1", 20)
    elif end == "release":
        await two.release(ALICE, "hold-1")
    else:
        two.clock.advance(1000)
    before = await money(two, ALICE)
    refused = await two.capture(ALICE, "hold-1", "transfer-2", 20)
    assert (refused.refused, refused.transfer) == (reason, None)
    assert await money(two, ALICE) == before
    assert await two.centers["a"].transfer(ALICE, "transfer-2") is None


@pytest.mark.parametrize(
    ("minor_units", "currency", "reason"),
    [(61, "CNY", "CAPTURE_TOO_LARGE"), (10, "EUR", "CURRENCY_MISMATCH")],
)
async def test_no_more_than_what_is_held_is_captured(
    two: Bank, minor_units: int, currency: str, reason: str
) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    refused = await two.capture(ALICE, "hold-1", "transfer-1", minor_units, currency=currency)
    assert refused.refused == reason
    assert await money(two, ALICE) == (100, 40)


async def test_a_hold_that_is_not_there_is_not_found(two: Bank) -> None:
    assert (await two.capture(ALICE, "hold-1", "transfer-1")).refused == "HOLD_NOT_FOUND"
    assert await two.release(ALICE, "hold-1") is None


async def test_releasing_twice_is_releasing_once(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    for _ in range(2):
        released = await two.release(ALICE, "hold-1")
        assert released is not None
        assert released.state == HOLD_STATE_RELEASED
        assert await money(two, ALICE) == (100, 100)
    assert (await two.centers["a"].kinds()).count("hold_changed") == 2


async def test_what_has_been_captured_is_not_released(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    await two.capture(ALICE, "hold-1", "transfer-1")
    kept = await two.release(ALICE, "hold-1")
    assert kept is not None
    assert kept.state == HOLD_STATE_CAPTURED
    assert await money(two, ALICE) == (40, 40)


async def test_a_hold_ends_when_its_time_is_over_and_not_before(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1", 1000)
    await two.reserve(ALICE, BOB, 30, "hold-2", 2000)
    two.clock.advance(999)
    assert await two.expire() == 0
    two.clock.advance(1)
    assert await two.expire() == 1
    assert (await state(two, "hold-1"), await state(two, "hold-2")) == (
        HOLD_STATE_EXPIRED,
        HOLD_STATE_HELD,
    )
    assert await money(two, ALICE) == (100, 70)
    assert await two.centers["a"].store.read(holds.next_due_ms("a")) == two.clock.wall_ms() + 1000
    assert await two.centers["a"].store.read(holds.next_due_ms("b")) is None


@pytest.mark.parametrize("decision", ["balance", "pay", "reserve", "release", "capture"])
async def test_an_expired_hold_does_not_count_although_nobody_has_noted_it(
    two: Bank, decision: str
) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    two.clock.advance(1000)
    assert await state(two) == HOLD_STATE_HELD
    match decision:
        case "balance":
            assert await money(two, ALICE) == (100, 100)
            return
        case "pay":
            assert (await two.pay(ALICE, BOB, 100, "transfer-1")).reason == ""
        case "reserve":
            assert (await two.reserve(ALICE, BOB, 100, "hold-2")).reason == ""
        case "release":
            await two.release(ALICE, "hold-1")
        case "capture":
            await two.capture(ALICE, "hold-1", "transfer-1")
    assert await state(two) == HOLD_STATE_EXPIRED
    assert await two.expire() == 0


async def test_a_batch_of_expiries_is_bounded(two: Bank) -> None:
    for number in range(5):
        await two.reserve(ALICE, BOB, 10, f"hold-{number}")
    two.clock.advance(1000)
    store, stamps = two.centers["a"].store, two.centers["a"].site.stamps
    ended = [
        await store.write("expire", holds.expire_all_due("a", stamps.now(), 2)) for _ in range(4)
    ]
    assert ended == [2, 2, 1, 0]


async def test_an_account_has_only_so_many_open_holds(two: Bank) -> None:
    for number in range(HOLDS_OPEN_MAX):
        assert (await two.reserve(ALICE, BOB, 1, f"hold-{number}")).reason == ""
    await two.deposit(ALICE, 100, "deposit-2")
    assert (await two.reserve(ALICE, BOB, 1, "one too many")).reason == "HOLDS_LIMIT"
    await two.release(ALICE, "hold-0")
    assert (await two.reserve(ALICE, BOB, 1, "another")).reason == ""


async def test_a_refused_capture_leaves_the_hold_as_it_was(two: Bank) -> None:
    await two.reserve(ALICE, ALAN, 60, "hold-1")
    await two.deposit(ALAN, 5, "in-euros", "EUR")
    refused = await two.capture(ALICE, "hold-1", "transfer-1")
    assert refused.transfer is not None
    assert (refused.transfer.state, refused.transfer.reason) == (
        TRANSFER_STATE_FAILED,
        "CURRENCY_MISMATCH",
    )
    assert await state(two) == HOLD_STATE_HELD
    assert await money(two, ALICE) == (100, 40)
    assert await two.capture(ALICE, "hold-1", "transfer-1") == refused


async def test_what_the_payees_home_refuses_comes_back_and_is_available(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    await two.deposit(BOB, 5, "in-euros", "EUR")
    await two.capture(ALICE, "hold-1", "transfer-1")
    await two.settle()
    refunded = await two.centers["a"].transfer(ALICE, "transfer-1")
    assert refunded is not None
    assert (refunded.state, refunded.reason) == (TRANSFER_STATE_REFUNDED, "CURRENCY_MISMATCH")
    assert await state(two) == HOLD_STATE_CAPTURED
    assert await money(two, ALICE) == (100, 100)


async def test_copies_show_what_is_available(two: Bank) -> None:
    b = two.centers["b"]
    await two.reserve(ALICE, BOB, 60, "hold-1")
    await two.reserve(ALICE, BOB, 30, "hold-2", 5000)
    await two.reserve(ALICE, BOB, 100, "too much")
    await two.settle()
    assert (await b.balance(ALICE), await b.available(ALICE)) == (100, 10)
    two.clock.advance(1000)
    assert await b.available(ALICE) == 70
    await two.capture(ALICE, "hold-2", "transfer-1", 20)
    await two.expire()
    await two.settle()
    assert (await b.balance(ALICE), await b.available(ALICE)) == (80, 80)
    copies = [
        await center.store.read(query("SELECT * FROM hold ORDER BY hold_id"))
        for center in two.centers.values()
    ]
    assert copies[0] == copies[1]
    assert len(copies[0]) == 3
    accounts = [
        await center.store.read(query("SELECT * FROM ledger_account WHERE account_id = ?", ALICE))
        for center in two.centers.values()
    ]
    assert accounts[0] == accounts[1]


async def test_copies_of_a_hold_may_come_late(two: Bank) -> None:
    """As a parked entry does: that it was held is heard after that it has ended."""
    await two.reserve(ALICE, BOB, 60, "hold-1")
    await two.capture(ALICE, "hold-1", "transfer-1", 20)
    a, b = two.centers["a"], two.centers["b"]
    entries = await a.store.read(log.read_after("ledger", 0, 100))
    records = [LogRecord.FromString(entry.record) for entry in entries]
    deposit, held, captured, paid = records
    for record in (paid, captured, held, deposit):
        if record.HasField("posting"):
            unit = ledger.copy("a", record.posting, record.time_ms)
        else:
            unit = holds.copy("a", record.hold_changed)
        await b.store.write("late", unit)
        assert (await b.balance(ALICE), await b.available(ALICE)) == (80, 80)
    assert await b.store.read(holds.find(ALICE, "hold-1")) == await a.store.read(
        holds.find(ALICE, "hold-1")
    )


async def test_the_ledger_itself_holds_no_more_than_there_is(two: Bank) -> None:
    """The conditional updates, and behind them the CHECKs, when nobody has asked before."""
    store = two.centers["a"].store
    for minor_units in (101, -1):
        with pytest.raises(NotCovered):
            await store.write("hold", ledger.hold_back("a", ALICE, minor_units))
    await two.reserve(ALICE, BOB, 60, "hold-1")
    for damage in (
        "UPDATE ledger_account SET held = 101 WHERE account_id = ?",
        "UPDATE ledger_account SET balance = 59 WHERE account_id = ?",
        "UPDATE ledger_account SET held = -1 WHERE account_id = ?",
        "UPDATE hold SET minor_units = 0 WHERE payer_account_id = ?",
        "UPDATE hold SET captured = 1 WHERE payer_account_id = ?",
    ):
        with pytest.raises(Exception, match="CHECK"):
            await store.write("damage", query(damage, ALICE))


async def test_the_audit_names_an_account_whose_holds_do_not_add_up(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1")
    home = two.centers["a"]
    audit = Audit(home.site, home.store, TOPICS)
    assert not (await audit.facts()).violations
    await home.store.write("damage", query("UPDATE ledger_account SET held = 59 WHERE held = 60"))
    (found,) = (await audit.facts()).violations
    assert (found.invariant, found.account_id) == ("NO-OVERDRAFT", ALICE)
    assert found.what == "keeps 59 back, its holds 60"
