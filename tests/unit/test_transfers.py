"""Each step of a transfer happens once, moves exactly its amount, and overdraws nobody."""

from collections.abc import AsyncIterator

import pytest

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_DEBIT,
    Leg,
    LogRecord,
    Posting,
    TransferSettled,
)
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
)
from runtime.store import query
from sync_bus import log
from sync_bus.inbox import Outcome
from tests.fakes import NOON_MS, FakeClock, account, see, stamp
from tests.unit.bank import Bank, bank
from transfer_svc import ledger, transfers
from transfer_svc.app import TOPICS
from transfer_svc.audit import OVERDUE_AFTER_MS, Audit
from transfer_svc.ledger import NotCovered
from transfer_svc.rules import BALANCE_MINOR_UNITS_MAX
from transfer_svc.states import IllegalTransition, TransferEvent

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""


@pytest.fixture
async def two() -> AsyncIterator[Bank]:
    async with bank("a", "b") as opened:
        yield opened


async def balances(two: Bank, *accounts: str) -> list[int]:
    return [await two.home(one).balance(one) for one in accounts]


async def test_at_one_home_a_transfer_is_one_step(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    row = await two.pay(ALICE, ALAN, 30, "transfer-1")
    assert (row.state, row.reason) == (TRANSFER_STATE_CREDITED, "")
    assert await balances(two, ALICE, ALAN) == [70, 30]
    assert await two.transit() == {}


async def test_between_homes_money_is_in_transit_until_it_is_credited(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    row = await two.pay(ALICE, BOB, 30, "transfer-1")
    assert row.state == TRANSFER_STATE_DEBITED
    assert await balances(two, ALICE, BOB) == [70, 0]
    assert await two.transit() == {"CNY": 30}
    await two.deliver("a", "b")
    assert await balances(two, ALICE, BOB) == [70, 30]
    await two.deliver("b", "a")
    settled = await two.centers["a"].transfer(ALICE, "transfer-1")
    assert settled is not None
    assert settled.state == TRANSFER_STATE_CREDITED
    assert await two.transit() == {"CNY": 0}


@pytest.mark.parametrize("payee", [ALAN, BOB], ids=["same home", "other home"])
@pytest.mark.parametrize(
    ("amount", "state"), [(100, None), (101, TRANSFER_STATE_FAILED)], ids=["all", "too much"]
)
async def test_an_account_pays_what_it_has_and_no_more(
    two: Bank, payee: str, amount: int, state: int | None
) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    row = await two.pay(ALICE, payee, amount, "transfer-1")
    await two.settle()
    assert await balances(two, ALICE, payee) == ([0, 100] if state is None else [100, 0])
    assert row.reason == ("" if state is None else "INSUFFICIENT_FUNDS")


async def test_who_never_had_money_cannot_pay(two: Bank) -> None:
    assert (await two.pay(ALICE, BOB, 1, "transfer-1")).reason == "INSUFFICIENT_FUNDS"


async def test_deciding_twice_is_deciding_once(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    first = await two.pay(ALICE, BOB, 60, "transfer-1")
    assert await two.pay(ALICE, BOB, 60, "transfer-1") == first
    assert await balances(two, ALICE) == [40]


async def test_a_refusal_stands_even_when_there_is_money_later(two: Bank) -> None:
    await two.pay(ALICE, BOB, 60, "transfer-1")
    await two.deposit(ALICE, 100, "deposit-1")
    again = await two.pay(ALICE, BOB, 60, "transfer-1")
    assert (again.state, again.reason) == (TRANSFER_STATE_FAILED, "INSUFFICIENT_FUNDS")
    assert await balances(two, ALICE) == [100]


async def test_a_cancelled_transfer_never_executes(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 60, "transfer-1", refused="CANCELLED")
    assert (await two.pay(ALICE, BOB, 60, "transfer-1")).reason == "CANCELLED"
    assert await balances(two, ALICE) == [100]


async def test_the_first_body_of_an_id_stands_and_a_second_can_be_told_apart(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 60, "transfer-1", body=b"first")
    again = await two.pay(ALICE, BOB, 30, "transfer-1", body=b"second")
    assert (again.body_hash, again.minor_units) == (b"first", 60)
    assert await balances(two, ALICE) == [40]


async def test_a_transfer_id_counts_among_its_payers_alone(two: Bank) -> None:
    for payer in (ALICE, ALAN):
        await two.deposit(payer, 100, f"deposit-{payer}")
        await two.pay(payer, BOB, 10, "transfer-1")
    await two.settle()
    assert await balances(two, ALICE, ALAN, BOB) == [90, 90, 20]


async def test_a_deposit_happens_once_and_comes_from_outside(two: Bank) -> None:
    for _ in range(2):
        row = await two.deposit(ALICE, 100, "deposit-1")
        assert row.state == TRANSFER_STATE_CREDITED
    assert await balances(two, ALICE) == [100]
    assert await two.centers["a"].balance("external.a.CNY") == -100
    assert await two.centers["a"].books() == {"CNY": 0}


async def test_crediting_twice_is_crediting_once(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 60, "transfer-1")
    entries = await two.centers["a"].store.read(log.read_after("ledger", 0, 10))
    debit = LogRecord.FromString(entries[-1].record).posting
    assert debit.kind == POSTING_KIND_DEBIT
    for number in range(2):
        unit = transfers.credit("b", "a", debit, stamp(number))
        await two.centers["b"].store.write("credit", unit)
    assert await balances(two, BOB) == [60]
    assert await two.centers["b"].kinds() == ["posting"]


async def test_settling_twice_is_settling_once(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 60, "transfer-1")
    for number in range(2):
        unit = transfers.settle(
            "a", ALICE, "transfer-1", TransferEvent.REFUSED, "BALANCE_LIMIT", stamp(number)
        )
        row = await two.centers["a"].store.write("settle", unit)
        assert (row.state, row.reason) == (TRANSFER_STATE_REFUNDED, "BALANCE_LIMIT")
    assert await balances(two, ALICE) == [100]


async def test_a_settled_transfer_is_not_settled_otherwise(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 60, "transfer-1")
    await two.settle()
    refuse = transfers.settle("a", ALICE, "transfer-1", TransferEvent.REFUSED, "", stamp(0))
    with pytest.raises(IllegalTransition):
        await two.centers["a"].store.write("settle", refuse)
    assert await balances(two, ALICE, BOB) == [40, 60]


async def test_nothing_is_settled_that_was_never_debited(two: Bank) -> None:
    settle = transfers.settle("a", ALICE, "transfer-9", TransferEvent.REFUSED, "", stamp(0))
    with pytest.raises(ValueError, match="no such transfer"):
        await two.centers["a"].store.write("settle", settle)


@pytest.mark.parametrize(
    ("has", "currency", "reason"),
    [(5, "USD", "CURRENCY_MISMATCH"), (BALANCE_MINOR_UNITS_MAX, "CNY", "BALANCE_LIMIT")],
)
async def test_what_the_payee_cannot_take_goes_back_to_the_payer(
    two: Bank, has: int, currency: str, reason: str
) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.fill(BOB, has, currency)
    assert (await two.pay(ALICE, BOB, 60, "transfer-1")).state == TRANSFER_STATE_DEBITED
    await two.settle()
    row = await two.centers["a"].transfer(ALICE, "transfer-1")
    assert row is not None
    assert (row.state, row.reason) == (TRANSFER_STATE_REFUNDED, reason)
    assert await balances(two, ALICE, BOB) == [100, has]
    assert set((await two.transit()).values()) == {0}
    statement = await two.centers["a"].store.read(ledger.entries_before(ALICE, None, 10))
    assert [entry.minor_units for entry in statement] == [60, -60, 100]


@pytest.mark.parametrize(
    ("has", "currency", "reason"),
    [(5, "USD", "CURRENCY_MISMATCH"), (BALANCE_MINOR_UNITS_MAX, "CNY", "BALANCE_LIMIT")],
)
async def test_at_one_home_what_the_payee_cannot_take_is_refused_at_once(
    two: Bank, has: int, currency: str, reason: str
) -> None:
    # Hers comes from elsewhere: his is all that may come from outside at this center.
    await two.deposit(BOB, 100, "deposit-1")
    await two.pay(BOB, ALICE, 100, "transfer-0")
    await two.settle()
    await two.fill(ALAN, has, currency)
    assert (await two.pay(ALICE, ALAN, 60, "transfer-1")).reason == reason
    assert await balances(two, ALICE, ALAN) == [100, has]


@pytest.mark.parametrize(
    ("payee", "application", "told"),
    [
        (ALAN, "", ["posting"]),
        (BOB, "", ["posting"]),
        (ALAN, "q-b-000-x", ["posting", "transfer_settled"]),
        (BOB, "q-b-000-x", ["posting"]),
    ],
    ids=["same home", "other home", "applied, same home", "applied, other home"],
)
async def test_an_applications_origin_is_told_when_its_transfer_has_ended(
    two: Bank, payee: str, application: str, told: list[str]
) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, payee, 10, "transfer-1", application=application)
    assert (await two.centers["a"].kinds())[1:] == told
    await two.settle()
    assert (await two.centers["a"].kinds())[-1] == (
        "transfer_settled" if payee == BOB else told[-1]
    )


async def test_a_refused_application_is_told_to_its_origin(two: Bank) -> None:
    await two.pay(ALICE, BOB, 10, "transfer-1", application="q-b-000-x")
    assert await two.centers["a"].kinds() == ["transfer_settled"]


async def test_the_other_centers_hold_the_same_statement(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 30, "transfer-1")
    await two.settle()
    for one in (ALICE, BOB):
        copies = [
            await center.store.read(ledger.entries_before(one, None, 10))
            for center in two.centers.values()
        ]
        assert copies[0] == copies[1] != []


async def test_a_statement_is_read_from_the_newest_and_page_by_page(two: Bank) -> None:
    for number in range(1, 6):
        await two.deposit(ALICE, number, f"deposit-{number}")
    store = two.centers["a"].store
    first = await store.read(ledger.entries_before(ALICE, None, 2))
    rest = await store.read(ledger.entries_before(ALICE, first[-1].number, 10))
    assert [entry.number for entry in first + rest] == [5, 4, 3, 2, 1]
    assert [entry.balance_after for entry in first + rest] == [15, 10, 6, 3, 1]


async def test_a_copy_whose_legs_do_not_sum_to_zero_is_not_taken(two: Bank) -> None:
    legs = [Leg(account_id=ALICE, minor_units=5), Leg(account_id="external.a.CNY", minor_units=-4)]
    forged = Posting(transfer_id="deposit-1", currency_code="CNY", legs=legs)
    with pytest.raises(ValueError, match="sum to zero"):
        await two.centers["b"].store.write("copy", ledger.copy("a", forged, 0))


@pytest.mark.parametrize("currency", ["CNY", "USD"])
async def test_a_posting_that_is_not_covered_leaves_nothing_behind(
    two: Bank, currency: str
) -> None:
    """The conditional update alone stands in its way: nobody has asked `cannot_pay`."""
    await two.deposit(ALICE, 4, "deposit-1", "CNY")
    posting = Posting(
        transfer_id="t", currency_code=currency, minor_units=5 if currency == "CNY" else 1
    )
    with pytest.raises(NotCovered):
        await two.centers["a"].store.write("post", ledger.post("a", posting, ALICE, ALAN, stamp(0)))
    assert await two.centers["a"].user_balances() == {ALICE: 4}
    assert await two.centers["a"].kinds() == ["posting"]


async def test_the_database_itself_refuses_a_negative_balance(two: Bank) -> None:
    store = two.centers["a"].store
    insert = "INSERT INTO ledger_account VALUES (?, 'CNY', -1, 0, 'a', 0, 0, x'')"
    with pytest.raises(Exception, match="CHECK"):
        await store.write("overdraw", query(insert, ALICE))
    await store.write("outside", query(insert, "external.a.CNY"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE ledger_account SET balance = balance + 1 WHERE account_id LIKE 'u%'", "CONSERVE"),
        ("UPDATE ledger_account SET last_number = 7 WHERE account_id LIKE 'u%'", "CHAIN"),
        ("UPDATE entry SET minor_units = 99 WHERE account_id LIKE 'u%'", "CHAIN"),
        ("DELETE FROM entry WHERE account_id LIKE 'external%'", "CHAIN"),
    ],
)
async def test_the_audit_names_what_is_damaged(two: Bank, damage: str, named: str) -> None:
    home = two.centers["a"]
    await two.deposit(ALICE, 100, "deposit-1")
    audit = Audit(home.site, home.store, TOPICS)
    assert not (await audit.facts()).violations
    await home.store.write("damage", query(damage))
    found = (await audit.facts()).violations
    assert named in {one.invariant for one in found}
    assert {one.center for one in found} == {"a"}


async def test_the_audit_sums_each_centers_own_books_and_lists_what_is_on_its_way(
    two: Bank,
) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 30, "transfer-1")
    home = two.centers["a"]
    facts = await Audit(home.site, home.store, TOPICS).facts()
    (sums,) = facts.ledger_sums
    assert (sums.users, sums.transit, sums.external) == (70, 30, -100)
    (transit,) = facts.transits
    assert (transit.transfer_id, transit.payee_home) == ("transfer-1", "b")
    counts = await Audit(home.site, home.store, TOPICS).counts()
    assert (counts["transfers_in_transit"], counts["money_in_transit"]) == (1, 30)
    await two.deliver("a", "b")
    other = two.centers["b"]
    (sums,) = (await Audit(other.site, other.store, TOPICS).facts()).ledger_sums
    assert (sums.users, sums.transit, sums.external) == (30, -30, 0)


async def test_what_is_on_its_way_for_too_long_is_listed_with_what_it_waits_for(two: Bank) -> None:
    home = two.centers["a"]
    audit = Audit(home.site, home.store, TOPICS)
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 30, "transfer-1")
    clock = home.site.clock
    assert isinstance(clock, FakeClock)
    clock.advance(OVERDUE_AFTER_MS)
    await two.pay(ALICE, BOB, 1, "transfer-2")
    assert not await audit.overdue()
    clock.advance(1)
    (late,) = await audit.overdue()
    assert (late.transfer_id, late.payer_account_id, late.payee_home) == ("transfer-1", ALICE, "b")
    assert (late.amount.minor_units, late.waiting_ms) == (30, OVERDUE_AFTER_MS + 1)
    assert late.debit_time.ToMilliseconds() == NOON_MS
    waits = [late.waits_for]
    for statement in (
        "UPDATE confirmed SET seq = (SELECT seq FROM log_head WHERE topic = confirmed.topic)",
        "UPDATE cursor SET installing = 1",
        "INSERT INTO parked VALUES ('b', 'ledger', 1, x'', 'ValueError', 0)",
    ):
        await home.store.write("meanwhile", query(statement))
        waits += [one.waits_for for one in await audit.overdue()]
    see(home.site.mesh, "b", answering=False)
    waits += [one.waits_for for one in await audit.overdue()]
    assert waits == [
        "center b, which is 3 entries behind",
        "the answer of center b",
        "a snapshot of center b, which is being installed",
        "1 parked entries of center b (duohuo parked list a)",
        "center b, which does not answer",
    ]


async def test_a_delivery_again_is_a_duplicate(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 30, "transfer-1")
    assert await two.deliver("a", "b") == [Outcome.APPLIED] * 2
    assert await two.deliver("a", "b", again=2) == [Outcome.DUPLICATE] * 2
    assert await balances(two, BOB) == [30]


async def copied(two: Bank, table: str, center: str) -> list[list[tuple[object, ...]]]:
    """What each center has of one center's rows."""
    unit = f"SELECT * FROM {table} WHERE center = ? ORDER BY payer_account_id, transfer_id"  # noqa: S608 - constant names
    return [await one.store.read(query(unit, center)) for one in two.centers.values()]


async def test_decisions_and_credits_are_copied_as_they_are(two: Bank) -> None:
    """Deposits, at one home, between homes, refused at home, refused by the payee's, for applications."""
    await two.deposit(ALICE, 100, "deposit-1")
    await two.deposit(BOB, 100, "deposit-1")
    await two.pay(ALICE, ALAN, 10, "at one home")
    await two.pay(ALICE, ALAN, 10, "applied for at one home", application="application-1")
    await two.pay(ALICE, BOB, 10, "between homes")
    await two.pay(ALICE, BOB, 10, "applied for between homes", application="application-2")
    await two.pay(ALICE, BOB, 1000, "too much")
    await two.pay(ALICE, BOB, 10, "cancelled", refused="CANCELLED", application="application-3")
    await two.pay(BOB, ALICE, 10, "back")
    await two.deposit(account(4), 50, "deposit-2", "EUR")
    await two.pay(account(4), BOB, 10, "in euros", "EUR")
    for settled in (False, True):
        if settled:
            await two.settle()
        else:
            await two.deliver("a", "b")  # debited: not settled yet
        for table in ("transfer", "received") if settled else ("transfer",):
            at_a, at_b = await copied(two, table, "a")
            assert at_a == at_b
    assert len((await copied(two, "transfer", "a"))[0]) == 9
    at_a, at_b = await copied(two, "received", "b")
    assert at_a == at_b
    assert [row[3] for row in at_a] == ["", "", "CURRENCY_MISMATCH"]
    at_a, at_b = await copied(two, "transfer", "b")
    assert at_a == at_b


async def test_copies_of_a_transfer_may_come_in_any_order(two: Bank) -> None:
    """As a parked entry does: how it ended may be known before that it was debited."""
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 10, "transfer-1")
    await two.settle()
    a, b = two.centers["a"], two.centers["b"]
    await b.store.write("forget", query("DELETE FROM transfer WHERE transfer_id = 'transfer-1'"))
    row = await a.transfer(ALICE, "transfer-1")
    assert row is not None
    settled = TransferSettled(
        transfer_id=row.transfer_id,
        payer_account_id=row.payer_account_id,
        payee_account_id=row.payee_account_id,
        payee_home=row.payee_home,
        state=row.state,
        body_hash=row.body_hash,
        currency_code=row.currency,
        minor_units=row.minor_units,
        create_time_ms=row.create_ms,
    )
    debit = Posting(
        kind=POSTING_KIND_DEBIT,
        transfer_id=row.transfer_id,
        payer_account_id=row.payer_account_id,
        payee_account_id=row.payee_account_id,
        other_home="b",
        currency_code=row.currency,
        minor_units=row.minor_units,
        body_hash=row.body_hash,
    )
    for _ in range(2):
        await b.store.write("settled", transfers.copy_settled("a", settled))
        await b.store.write("debit", transfers.copy_posting("a", debit, row.create_ms))
        assert await b.transfer(ALICE, "transfer-1") == row


async def test_what_is_to_be_credited_or_settled_is_found_from_rows(two: Bank) -> None:
    await two.deposit(ALICE, 100, "deposit-1")
    for number in range(3):
        await two.pay(ALICE, BOB, 10, f"transfer-{number}")
    await two.pay(ALICE, ALAN, 10, "at one home")
    a, b = two.centers["a"].store, two.centers["b"].store
    assert [one.transfer_id for one in await a.read(transfers.uncredited("a", "b", 2))] == [
        "transfer-0",
        "transfer-1",
    ]
    assert await a.read(transfers.uncredited("b", "a", 9)) == []
    assert await a.read(transfers.uncredited("a", "a", 9)) == []
    await two.deliver("a", "b", limit=3)  # the deposit and two debits
    assert await b.read(transfers.uncredited("a", "b", 9)) == []
    assert await a.read(transfers.unsettled("b", "a", 9)) == []
    await two.centers["a"].store.write(
        "copied",
        query(
            "INSERT INTO received VALUES (?, 'transfer-0', 'a', '', 'b'),"
            " (?, 'transfer-1', 'a', 'BALANCE_LIMIT', 'b'), (?, 'at one home', 'a', '', 'b')",
            *(ALICE, ALICE, ALICE),
        ),
    )
    assert await a.read(transfers.unsettled("b", "a", 9)) == [
        (ALICE, "transfer-0", ""),
        (ALICE, "transfer-1", "BALANCE_LIMIT"),
    ]
    assert len(await a.read(transfers.unsettled("b", "a", 1))) == 1
    assert await a.read(transfers.unsettled("c", "a", 9)) == []


async def test_a_center_credits_only_its_own_accounts(two: Bank) -> None:
    """Reconciling with everything reconciled, and with what is none of its business, does nothing."""
    await two.deposit(ALICE, 100, "deposit-1")
    await two.pay(ALICE, BOB, 10, "transfer-1")
    await two.settle()
    for name, other in (("a", "b"), ("b", "a")):
        center = two.centers[name]
        heads = await center.store.read(log.heads())
        for source in (name, other):
            for topic in ("ledger", "applications"):
                unit = center.inbound.reconcile(source, topic)
                assert await center.store.write("reconcile", unit) == 0
        assert await center.store.read(log.heads()) == heads
