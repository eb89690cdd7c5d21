"""What operators allow an account is obeyed at its home, in the same unit as the money."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duohuo.internal.v1.log_pb2 import ControlChanged
from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountStatus,
)
from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_HELD,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
)
from runtime.store import query
from tests.fakes import NOON_MS, account
from tests.unit.bank import Bank, bank
from transfer_svc import controls, holds, ledger, transfers
from transfer_svc.controls import Control, cannot_pay
from transfer_svc.rules import DAY_MS, Order

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""


@pytest.fixture
async def two() -> AsyncIterator[Bank]:
    async with bank("a", "b") as opened:
        await opened.deposit(ALICE, 100, "deposit-1")
        yield opened


async def left(two: Bank, one: str = ALICE) -> int:
    return await two.home(one).balance(one)


@pytest.mark.parametrize("payee", [ALAN, BOB], ids=["same home", "other home"])
async def test_a_frozen_account_neither_pays_nor_holds_until_it_is_unfrozen(
    two: Bank, payee: str
) -> None:
    await two.reserve(ALICE, payee, 10, "hold-0")
    await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    row = await two.pay(ALICE, payee, 10, "transfer-1")
    assert (row.state, row.reason) == (TRANSFER_STATE_FAILED, "ACCOUNT_FROZEN")
    assert (await two.reserve(ALICE, payee, 10, "hold-1")).reason == "ACCOUNT_FROZEN"
    captured = await two.capture(ALICE, "hold-0", "transfer-2")
    assert captured.transfer is not None
    assert captured.transfer.reason == "ACCOUNT_FROZEN"
    assert captured.hold is not None
    assert captured.hold.state == HOLD_STATE_HELD
    assert await left(two) == 100
    await two.set_status(ALICE, ACCOUNT_STATUS_OPEN)
    assert (await two.pay(ALICE, payee, 10, "transfer-3")).reason == ""
    assert (await two.capture(ALICE, "hold-0", "transfer-4")).refused == ""
    assert await left(two) == 80


@pytest.mark.parametrize(
    ("status", "reason"),
    [(ACCOUNT_STATUS_FROZEN, "PAYEE_FROZEN"), (ACCOUNT_STATUS_CLOSED, "PAYEE_CLOSED")],
)
async def test_a_payee_that_may_not_receive_leads_to_a_refusal_or_a_refund(
    two: Bank, status: AccountStatus.ValueType, reason: str
) -> None:
    under_way = await two.pay(ALICE, BOB, 10, "transfer-1")
    assert under_way.state == TRANSFER_STATE_DEBITED
    for payee in (ALAN, BOB):
        assert (await two.set_status(payee, status)).refused == ""
    at_home = await two.pay(ALICE, ALAN, 10, "transfer-2")
    assert (at_home.state, at_home.reason) == (TRANSFER_STATE_FAILED, reason)
    assert (await two.reserve(ALICE, ALAN, 10, "hold-1")).reason == reason
    await two.pay(ALICE, BOB, 10, "transfer-3", application="application-1")
    await two.settle()
    for transfer in ("transfer-1", "transfer-3"):
        row = await two.centers["a"].transfer(ALICE, transfer)
        assert row is not None
        assert (row.state, row.reason) == (TRANSFER_STATE_REFUNDED, reason)
    assert (await left(two), await left(two, BOB)) == (100, 0)
    assert set((await two.transit()).values()) == {0}
    deposit = await two.deposit(BOB, 10, "deposit-2")
    assert deposit.reason == reason


async def test_a_refund_reaches_a_payer_who_was_frozen_meanwhile(two: Bank) -> None:
    await two.set_status(BOB, ACCOUNT_STATUS_FROZEN)
    await two.pay(ALICE, BOB, 10, "transfer-1")
    await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    await two.settle()
    assert await left(two) == 100


async def test_a_debit_for_what_is_no_account_is_refunded(two: Bank) -> None:
    """Nobody is its home, so who got it must answer; money is never left in between."""
    a = two.centers["a"]
    order = Order("transfer-1", ALICE, "nobody", "CNY", 10, "", b"body")
    unit = transfers.decide("a", order, "b", "", a.site.stamps.now())
    assert (await a.store.write("decide", unit)).state == TRANSFER_STATE_DEBITED
    await two.settle()
    row = await a.transfer(ALICE, "transfer-1")
    assert row is not None
    assert (row.state, row.reason) == (TRANSFER_STATE_REFUNDED, "PAYEE_NOT_FOUND")
    assert await left(two) == 100


async def test_an_account_is_closed_only_when_nothing_is_left_of_it(two: Bank) -> None:
    async def close() -> str:
        return (await two.set_status(ALICE, ACCOUNT_STATUS_CLOSED)).refused

    assert await close() == "ACCOUNT_NOT_EMPTY"
    await two.reserve(ALICE, BOB, 100, "hold-1")
    assert await close() == "ACCOUNT_HAS_HOLDS"
    two.clock.advance(1000)
    assert await close() == "ACCOUNT_NOT_EMPTY"  # the hold has expired
    await two.pay(ALICE, BOB, 100, "transfer-1")
    assert await close() == "ACCOUNT_HAS_TRANSIT"
    await two.settle()
    assert await close() == ""
    assert (await two.pay(ALICE, BOB, 1, "transfer-2")).reason == "ACCOUNT_CLOSED"
    assert (await two.pay(BOB, ALICE, 1, "transfer-3")).state == TRANSFER_STATE_DEBITED
    await two.settle()
    assert (await left(two, BOB), await left(two)) == (100, 0)


async def test_a_closed_account_stays_closed(two: Bank) -> None:
    await two.set_status(BOB, ACCOUNT_STATUS_CLOSED)
    for status in (ACCOUNT_STATUS_OPEN, ACCOUNT_STATUS_FROZEN):
        change = await two.set_status(BOB, status)
        assert (change.refused, change.after.status) == ("ACCOUNT_CLOSED", ACCOUNT_STATUS_CLOSED)


async def test_a_change_again_changes_and_tells_nothing(two: Bank) -> None:
    first = await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    assert (first.before.status, first.after.status) == (
        ACCOUNT_STATUS_OPEN,
        ACCOUNT_STATUS_FROZEN,
    )
    again = await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    assert again.before == again.after == first.after
    assert (await two.centers["a"].kinds()).count("control_changed") == 1


async def test_what_arrives_late_changes_nothing(two: Bank) -> None:
    """The freeze, sent twice, after the unfreeze that followed it."""
    frozen = await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN, version=0)
    assert (await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN, version=0)).after == frozen.after
    await two.set_status(ALICE, ACCOUNT_STATUS_OPEN, version=frozen.after.number)
    late = await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN, version=0)
    assert (late.refused, late.after.status) == ("CONTROL_CHANGED", ACCOUNT_STATUS_OPEN)


async def test_limits_are_set_one_by_one_and_taken_away(two: Bank) -> None:
    await two.limit(ALICE, per_transfer=30)
    change = await two.limit(ALICE, per_day=50)
    assert (change.before.per_transfer_max, change.before.per_day_max) == (30, 0)
    assert (change.after.per_transfer_max, change.after.per_day_max) == (30, 50)
    assert (await two.limit(ALICE, per_transfer=0)).after.per_transfer_max == 0


async def test_no_transfer_or_hold_is_larger_than_the_limit(two: Bank) -> None:
    await two.limit(ALICE, per_transfer=30)
    assert (await two.pay(ALICE, BOB, 31, "transfer-1")).reason == "LIMIT_PER_TRANSFER"
    assert (await two.reserve(ALICE, BOB, 31, "hold-1")).reason == "LIMIT_PER_TRANSFER"
    assert (await two.pay(ALICE, BOB, 30, "transfer-2")).reason == ""


async def test_a_days_limit_counts_what_has_left_on_that_day(two: Bank) -> None:
    two.clock.jump(-(NOON_MS % DAY_MS))  # the day begins
    await two.limit(ALICE, per_day=50)
    await two.reserve(ALICE, BOB, 40, "hold-1", 2 * DAY_MS)
    assert (await two.pay(ALICE, ALAN, 20, "transfer-1")).reason == ""
    assert (await two.pay(ALICE, BOB, 20, "transfer-2")).reason == ""
    assert (await two.pay(ALICE, ALAN, 11, "transfer-3")).reason == "LIMIT_PER_DAY"
    captured = await two.capture(ALICE, "hold-1", "transfer-4")
    assert captured.transfer is not None
    assert captured.transfer.reason == "LIMIT_PER_DAY"
    assert (await two.capture(ALICE, "hold-1", "transfer-5", 10)).refused == ""
    assert (await two.pay(ALICE, ALAN, 1, "transfer-6")).reason == "LIMIT_PER_DAY"
    two.clock.advance(DAY_MS - 1)
    assert (await two.pay(ALICE, ALAN, 1, "transfer-7")).reason == "LIMIT_PER_DAY"
    two.clock.advance(1)
    assert (await two.pay(ALICE, ALAN, 50, "transfer-8")).reason == ""
    assert (await two.pay(ALICE, ALAN, 1, "transfer-6")).reason == "LIMIT_PER_DAY"  # as before


async def test_what_came_back_has_not_left(two: Bank) -> None:
    await two.limit(ALICE, per_day=50)
    await two.set_status(BOB, ACCOUNT_STATUS_FROZEN)
    await two.pay(ALICE, BOB, 50, "transfer-1")
    assert (await two.pay(ALICE, ALAN, 1, "transfer-2")).reason == "LIMIT_PER_DAY"
    await two.settle()
    assert (await two.pay(ALICE, ALAN, 50, "transfer-3")).reason == ""


async def test_what_was_paid_in_a_day_may_be_more_than_64_bits_hold(two: Bank) -> None:
    store, count = two.centers["a"].store, 10_000
    await store.write(
        "many",
        query(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)"
            " INSERT INTO transfer SELECT ?2, 'many-' || i, x'', ?3, 'b', 'CNY', 999999999999999,"
            " '', 3, '', '', ?4, 'a', '' FROM n",
            count,
            ALICE,
            BOB,
            NOON_MS,
        ),
    )
    paid = await store.read(controls.paid_on_day(ALICE, NOON_MS))
    assert paid == count * 999999999999999 > 2**63


@given(
    st.builds(
        Control,
        st.just(ALICE),
        st.sampled_from([ACCOUNT_STATUS_OPEN, ACCOUNT_STATUS_FROZEN, ACCOUNT_STATUS_CLOSED]),
        st.integers(0, 50),
        st.integers(0, 50),
    ),
    st.integers(1, 100),
    st.integers(0, 100),
)
def test_only_an_open_account_pays_and_within_its_limits(
    control: Control, minor_units: int, paid: int
) -> None:
    may = (
        control.status == ACCOUNT_STATUS_OPEN
        and (not control.per_transfer_max or minor_units <= control.per_transfer_max)
        and (not control.per_day_max or paid + minor_units <= control.per_day_max)
    )
    assert (cannot_pay(control, minor_units, paid) == "") is may


async def test_controls_are_copied_and_a_late_copy_takes_nothing_back(two: Bank) -> None:
    await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    await two.limit(ALICE, 30, 50)
    await two.settle()
    at_a, at_b = [await center.store.read(controls.find(ALICE)) for center in two.centers.values()]
    assert at_a == at_b
    assert (at_a.number, at_a.center) == (2, "a")
    late = ControlChanged(account_id=ALICE, status=ACCOUNT_STATUS_OPEN, number=1)
    await two.centers["b"].store.write("late", controls.copy("a", late))
    assert await two.centers["b"].store.read(controls.find(ALICE)) == at_a


async def test_compensation_is_paid_from_an_account_of_its_own(two: Bank) -> None:
    a = two.centers["a"]
    order = Order("sorry-01", ledger.compensator("a"), ALICE, "CNY", 7, "", b"body")
    for _ in range(2):
        unit = transfers.decide("a", order, "a", "", a.site.stamps.now())
        await a.store.write("compensate", unit)
    assert await left(two) == 107
    assert await a.balance("compensation.a.CNY") == -7
    assert await a.balance("external.a.CNY") == -100
    assert set((await a.books()).values()) == {0}


@pytest.mark.parametrize("payer", ["external.a", "compensation.a", ALICE])
async def test_no_account_of_the_books_grows_without_bounds(
    two: Bank, payer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of all balances stays far from what 64 bits hold."""
    a = two.centers["a"]
    await two.deposit(ALICE, 1000, "deposit-of-a-thousand")

    async def reason(amount: int, payee: str) -> str:
        order = Order(f"transfer-{amount}", payer, payee, "CNY", amount, "", b"body")
        home = "b" if payer == ALICE else "a"
        unit = transfers.decide("a", order, home, "", a.site.stamps.now())
        return (await a.store.write("decide", unit)).reason

    assert await reason(100, BOB if payer == ALICE else ALAN) == ""
    full = {ALICE: "transit.a.b.CNY"}.get(payer, f"{payer}.CNY")
    account = await a.store.read(ledger.find(full))
    assert account is not None
    monkeypatch.setattr(ledger, "BALANCE_MINOR_UNITS_MAX", abs(account.balance) + 5)
    other = BOB if payer == ALICE else ALICE
    monkeypatch.setattr(ledger, "cannot_receive", lambda *_: "")
    assert [await reason(6, other), await reason(5, other)] == ["BOOKS_LIMIT", ""]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE entry SET minor_units = 0 WHERE account_id = ?",
        "UPDATE entry SET minor_units = 1000000000000001 WHERE account_id = ?",
        "UPDATE entry SET minor_units = -1000000000000001 WHERE account_id = ?",
        "UPDATE ledger_account SET balance = -1 WHERE account_id = ?",
        "UPDATE ledger_account SET balance = 4000000000000000001 WHERE account_id = ?",
    ],
)
async def test_the_database_itself_refuses_what_is_out_of_bounds(two: Bank, damage: str) -> None:
    with pytest.raises(Exception, match="CHECK"):
        await two.centers["a"].store.write("damage", query(damage, ALICE))


async def test_open_holds_of_a_frozen_account_end_as_others_do(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 10, "hold-1")
    await two.reserve(ALICE, BOB, 10, "hold-2")
    await two.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    await two.release(ALICE, "hold-1")
    two.clock.advance(1000)
    assert await two.expire() == 1
    assert await two.centers["a"].store.read(holds.open_count(ALICE)) == 0
