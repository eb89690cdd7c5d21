"""Slots go from one home to the next: money, holds and decisions with them, and two never act at a time."""

from collections.abc import AsyncIterator
from unittest.mock import patch

import pytest

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_MOVE_IN,
    POSTING_KIND_MOVE_OUT,
    LogRecord,
    SlotHandedOver,
)
from duohuo.internal.v1.peer_services_pb2 import (
    BookDepositRequest,
    BookDepositResponse,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import ACCOUNT_STATUS_FROZEN, ACCOUNT_STATUS_OPEN
from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_HELD,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_REFUNDED,
)
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.ids import account_slot
from runtime.methods import peer_method
from runtime.store import Unit, query
from sync_bus import homes, inbox, log
from tests.fakes import account
from tests.unit.centers import Centers, centers
from transfer_svc import holds, ledger

ALICE, ALAN = account(0), account(3)
"""At home at a."""
BOB = account(1)
CAROL = account(2)


@pytest.fixture
async def three() -> AsyncIterator[Centers]:
    async with centers("a", "b", "c") as made:
        yield made


async def hand_over(made: Centers, who: str, source: str, to: str) -> None:
    """The home's part of a move, of which nobody has heard yet."""
    center = made.service(source)
    slot = account_slot(who) or 0
    unit = center.slots.hand_over(slot, to, "operator", center.site.stamps.now())
    await center.store.write("hand over", unit)


async def catch_up(made: Centers) -> None:
    """What each service does by itself every second."""
    for name in made.names:
        await made.service(name).slots.catch_up()


async def settle(made: Centers) -> None:
    """All have followed all, and done what was left to them."""
    for _ in range(3):
        await made.settle()
        await catch_up(made)
    await made.settle()


async def move(made: Centers, who: str, source: str, to: str) -> None:
    """A whole move, and everybody has heard of it."""
    await hand_over(made, who, source, to)
    await settle(made)


async def acting(made: Centers, who: str) -> list[str]:
    """Which centers would decide for this account."""
    slot = account_slot(who) or 0
    return [
        name
        for name in made.names
        if await made.service(name).store.read(homes.acts_for(name, slot))
    ]


async def test_money_goes_to_the_new_home_which_decides_from_then_on(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await move(three, ALICE, "a", "c")
    assert await acting(three, ALICE) == ["c"]
    assert {name: await three.service(name).balance(ALICE) for name in three.names} == {
        "a": 100,
        "b": 100,
        "c": 100,
    }
    await three.pay(ALICE, BOB, 30, "transfer-1")
    await settle(three)
    assert await three.service("a").balance(ALICE) == 70
    assert await three.service("b").balance(BOB) == 30
    assert await three.transit() == {"CNY": 0}
    await three.check_same()


async def test_nobody_acts_between_the_two_homes(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await hand_over(three, ALICE, "a", "c")
    assert await acting(three, ALICE) == []
    for name in three.names:
        center = three.service(name)
        with pytest.raises(RpcError, match="WRONG_HOME"):
            await center.store.read(homes.require(name, account_slot(ALICE) or 0))


async def test_the_old_home_refuses_in_the_transaction_itself(three: Centers) -> None:
    """Whoever has asked before, and waited: what counts is who is home when it is written."""
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    a = three.service("a")
    late = a.slots.acting(account_slot(ALICE) or 0, query("DELETE FROM entry"))
    await hand_over(three, ALICE, "a", "c")
    with pytest.raises(RpcError, match="WRONG_HOME") as refused:
        await a.store.write("late", late)
    assert refused.value.details == {"home": "c", "epoch": "2", "slot": "0"}
    assert not refused.value.ran


async def test_a_copy_shows_the_money_while_it_is_on_its_way(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await hand_over(three, ALICE, "a", "c")
    a = three.service("a")
    found = await a.store.read(ledger.find(ALICE))
    assert found is not None
    assert found.balance == 0
    assert await a.store.read(ledger.booked(found)) == 100
    assert await a.books() == {"CNY": 0}


async def test_a_statement_tells_which_entries_are_of_moves(three: Centers) -> None:
    """All are in it, so that whoever reads it sees that none is missing; two of each move are nothing."""
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    for source, to in (("a", "c"), ("c", "b"), ("b", "a")):
        await move(three, ALICE, source, to)
    await three.pay(ALICE, ALAN, 40, "transfer-1")
    entries = await three.service("a").store.read(ledger.entries_before(ALICE, None, 10))
    assert [one.number for one in entries] == list(range(8, 0, -1))
    moves = [one for one in entries if one.kind in (POSTING_KIND_MOVE_OUT, POSTING_KIND_MOVE_IN)]
    assert [one.minor_units for one in moves] == [100, -100] * 3
    assert [one.transfer_id for one in entries if one not in moves] == ["transfer-1", "deposit-1"]
    await settle(three)
    await three.check_same()


async def test_an_account_without_money_keeps_its_currency(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await three.pay(ALICE, ALAN, 100, "transfer-1")
    await settle(three)
    await move(three, ALICE, "a", "c")
    refused = await three.deposit(ALICE, 5, "deposit-2", "EUR")
    assert refused.reason == "CURRENCY_MISMATCH"
    await three.deposit(ALICE, 5, "deposit-3")
    await settle(three)
    await three.check_same()


async def test_what_was_decided_stays_decided(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    first = await three.pay(ALICE, ALAN, 30, "transfer-1")
    refused = await three.pay(ALICE, ALAN, 900, "transfer-2")
    await settle(three)
    await move(three, ALICE, "a", "b")
    assert await three.pay(ALICE, ALAN, 30, "transfer-1") == first
    assert await three.pay(ALICE, ALAN, 900, "transfer-2") == refused
    assert await three.service("b").balance(ALICE) == 70


async def test_what_was_sent_while_nobody_was_home_comes_once(three: Centers) -> None:
    await three.deposit(BOB, 100, "deposit-1")
    await settle(three)
    await three.pay(BOB, ALICE, 40, "transfer-1")
    await hand_over(three, ALICE, "a", "c")  # before a has heard of it
    await settle(three)
    assert await three.service("c").balance(ALICE) == 40
    row = await three.service("b").transfer(BOB, "transfer-1")
    assert row is not None
    assert row.state == TRANSFER_STATE_CREDITED
    assert await three.transit() == {"CNY": 0}
    await three.check_same()


async def test_what_the_old_home_has_credited_is_not_credited_again(three: Centers) -> None:
    await three.deposit(BOB, 100, "deposit-1")
    await three.pay(BOB, ALICE, 40, "transfer-1")
    await three.service("a").follow("b")
    await hand_over(three, ALICE, "a", "c")
    await settle(three)
    assert await three.service("c").balance(ALICE) == 40
    await three.check_same()


async def test_a_new_home_answers_what_it_has_sent_itself(three: Centers) -> None:
    await three.deposit(CAROL, 100, "deposit-1")
    await settle(three)
    await three.pay(CAROL, ALICE, 40, "transfer-1")
    await hand_over(three, ALICE, "a", "c")
    await settle(three)
    row = await three.service("c").transfer(CAROL, "transfer-1")
    assert row is not None
    assert row.state == TRANSFER_STATE_CREDITED
    assert await three.service("c").balance(ALICE) == 40
    assert await three.transit() == {"CNY": 0}
    await three.check_same()


@pytest.mark.parametrize("to", ["b", "c"], ids=["who refused", "a third center"])
async def test_a_refund_finds_its_payer(three: Centers, to: str) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await three.set_status(BOB, ACCOUNT_STATUS_FROZEN)
    await three.pay(ALICE, BOB, 40, "transfer-1")
    await hand_over(three, ALICE, "a", to)  # before a has heard that b refuses
    await settle(three)
    row = await three.service("a").transfer(ALICE, "transfer-1")
    assert row is not None
    assert (row.state, row.reason) == (TRANSFER_STATE_REFUNDED, "PAYEE_FROZEN")
    assert await three.service(to).balance(ALICE) == 100
    assert await three.transit() == {"CNY": 0}
    await three.check_same()


async def test_a_refund_whose_payer_has_come_back_is_given_once(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await three.set_status(BOB, ACCOUNT_STATUS_FROZEN)
    await three.pay(ALICE, BOB, 40, "transfer-1")
    await hand_over(three, ALICE, "a", "c")
    await three.service("c").follow("a")
    await hand_over(three, ALICE, "c", "a")
    await settle(three)
    assert await three.service("a").balance(ALICE) == 100
    await three.check_same()


async def test_open_holds_go_on_at_the_new_home(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await three.reserve(ALICE, BOB, 60, "hold-1")
    await three.reserve(ALICE, BOB, 30, "hold-2")
    await settle(three)
    for source, to in (("a", "c"), ("c", "a"), ("a", "b")):
        await move(three, ALICE, source, to)
        assert await three.service(to).available(ALICE) == 10
        hold = await three.service(to).store.read(holds.find(ALICE, "hold-1"))
        assert hold is not None
        assert (hold.state, hold.center) == (HOLD_STATE_HELD, to)
    captured = await three.capture(ALICE, "hold-1", "transfer-1")
    assert captured.transfer is not None
    await three.release(ALICE, "hold-2")
    await settle(three)
    assert await three.service("a").balance(ALICE) == 40
    assert await three.service("c").available(ALICE) == 40
    await three.check_same()


async def test_what_operators_allow_an_account_goes_with_it(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await three.set_status(ALICE, ACCOUNT_STATUS_FROZEN)
    await settle(three)
    await move(three, ALICE, "a", "c")
    assert (await three.pay(ALICE, BOB, 1, "transfer-1")).reason == "ACCOUNT_FROZEN"
    await three.set_status(ALICE, ACCOUNT_STATUS_OPEN)
    assert (await three.pay(ALICE, BOB, 1, "transfer-2")).state == TRANSFER_STATE_DEBITED
    await settle(three)
    await three.check_same()


async def test_a_third_center_waits_for_both_to_say_so(three: Centers) -> None:
    """It takes nothing of the slot from the new home before the old one has given it away."""
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await hand_over(three, ALICE, "a", "c")
    await three.service("c").follow("a")
    await catch_up(three)
    await three.pay(ALICE, CAROL, 30, "transfer-1")
    b = three.service("b")
    before = await b.cursor("c", "ledger")
    await b.follow("c")
    assert await b.cursor("c", "ledger") == before
    assert (await b.copy_of("c", "ledger")).parked == 0
    assert await b.balance(ALICE) == 100
    await b.follow("a")
    await b.follow("c")
    assert await b.balance(ALICE) == 70
    await settle(three)
    await three.check_same()


async def test_who_is_not_home_cannot_give_a_slot_away(three: Centers) -> None:
    b = three.service("b")
    with pytest.raises(RpcError, match="WRONG_HOME"):
        await hand_over(three, ALICE, "b", "c")
    # One that does so all the same is not believed.
    lie = LogRecord(slot_handed_over=SlotHandedOver(slot=0, epoch=2, home="b"))
    unit = log.append(ledger.LEDGER, b.site.stamps.now(), lie)
    await b.store.write("lie", unit)
    await three.service("c").follow("b")
    assert (await three.service("c").copy_of("b", "ledger")).parked == 1
    assert await acting(three, ALICE) == ["a"]


async def test_handing_over_again_changes_nothing(three: Centers) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await hand_over(three, ALICE, "a", "c")
    heads = await three.service("a").store.read(log.heads())
    await hand_over(three, ALICE, "a", "c")
    assert await three.service("a").store.read(log.heads()) == heads


@pytest.mark.parametrize("loser", ["a", "b", "c"])
async def test_a_center_that_loses_its_disk_gets_its_slots_back(three: Centers, loser: str) -> None:
    await three.deposit(ALICE, 100, "deposit-1")
    await three.reserve(ALICE, BOB, 60, "hold-1")
    await settle(three)
    await move(three, ALICE, "a", "c")
    await three.pay(ALICE, BOB, 10, "transfer-1")
    await settle(three)
    await three.recover(loser)
    service = three.service(loser)
    assert loser not in await acting(three, ALICE)  # before it has what the other homes did
    await settle(three)
    await catch_up(three)
    assert await acting(three, ALICE) == ["c"]
    assert await service.balance(ALICE) == 90
    assert (await three.pay(ALICE, BOB, 10, "transfer-1")).state == TRANSFER_STATE_CREDITED
    await three.pay(ALICE, BOB, 10, "transfer-2")
    await settle(three)
    await three.check_same()


async def test_a_handover_that_came_with_a_snapshot_is_taken_over(three: Centers) -> None:
    """The new home was away for so long that it gets rows instead of entries."""
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await three.deposit(BOB, 50, "deposit-2")
    await three.pay(BOB, ALICE, 5, "transfer-1")
    await hand_over(three, ALICE, "a", "c")
    c = three.service("c")
    await c.store.write("install", inbox.begin_install("a", "ledger"))
    await three.settle()
    assert await acting(three, ALICE) == []
    await settle(three)
    assert await acting(three, ALICE) == ["c"]
    assert await c.balance(ALICE) == 105
    await three.check_same()


async def test_a_violation_of_the_fence_is_found(three: Centers) -> None:
    """Money of an account that is left behind at a former home."""
    await three.deposit(ALICE, 100, "deposit-1")
    await settle(three)
    await move(three, ALICE, "a", "c")
    a = three.service("a")
    damage = "UPDATE ledger_account SET balance = 1 WHERE account_id = ? AND center = 'a'"
    await a.store.write("damage", query(damage, ALICE))
    found = (await three.facts())["a"].violations
    assert {one.invariant for one in found} >= {"FENCE"}


async def test_a_deposit_that_is_asked_for_again_is_not_booked_by_the_next_home(
    three: Centers,
) -> None:
    deposit = BookDepositRequest(
        deposit_id="deposit-1",
        account_id=ALICE,
        amount=Money(currency_code="CNY", minor_units=100),
    )
    for home in ("a", "c"):
        answer = await ask(
            three.service(home).dispatcher,
            peer_method("transfer", "BookDeposit"),
            deposit,
            BookDepositResponse,
            1.0,
        )
        assert answer.balance.minor_units == 100
        if home == "a":
            await settle(three)
            await move(three, ALICE, "a", "c")
    deposit.amount.minor_units = 101
    with pytest.raises(RpcError, match="IDEMPOTENCY_CONFLICT"):
        await ask(
            three.service("c").dispatcher,
            peer_method("transfer", "BookDeposit"),
            deposit,
            BookDepositResponse,
            1.0,
        )
    await three.check_same()


async def test_a_transfer_to_a_slot_that_is_just_coming_here_waits(three: Centers) -> None:
    """It is neither a local transfer yet, nor one that anybody else would credit."""
    await three.deposit(CAROL, 100, "deposit-1")
    await settle(three)
    await hand_over(three, ALICE, "a", "c")
    c = three.service("c")
    with patch.object(homes, "_lacks", lacks):
        await c.follow("a")
    with pytest.raises(RpcError, match="SLOT_MOVING") as refused:
        await c.store.read(homes.payee_home(ALICE, "c"))
    assert not refused.value.ran


def lacks(*_: object) -> Unit[bool]:
    yield from query("SELECT 1")
    return True


async def test_ids_that_were_used_before_a_move_stay_used(three: Centers) -> None:
    """Holds, captures and cancels, as transfers: whoever asks again hears the first answer."""
    await three.deposit(ALICE, 100, "deposit-1")
    held = await three.reserve(ALICE, BOB, 30, "held")
    await three.reserve(ALICE, BOB, 20, "captured")
    captured = await three.capture(ALICE, "captured", "capture-1")
    await three.reserve(ALICE, BOB, 10, "released")
    released = await three.release(ALICE, "released")
    refused = await three.reserve(ALICE, BOB, 900, "refused")
    cancelled = await three.pay(ALICE, BOB, 5, "cancelled", refused="CANCELLED")
    await settle(three)
    await move(three, ALICE, "a", "c")
    again = await three.reserve(ALICE, BOB, 30, "held")
    assert again == held._replace(center="c", epoch=2)
    assert await three.reserve(ALICE, BOB, 900, "refused") == refused
    assert await three.reserve(ALICE, BOB, 10, "released") == released
    assert await three.release(ALICE, "released") == released
    recaptured = await three.capture(ALICE, "captured", "capture-1")
    assert recaptured.hold == captured.hold
    assert recaptured.transfer is not None
    assert recaptured.transfer.state == TRANSFER_STATE_CREDITED
    assert await three.pay(ALICE, BOB, 5, "cancelled") == cancelled
    assert await three.service("c").available(ALICE) == 50
    await settle(three)
    await three.check_same()
