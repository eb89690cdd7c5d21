"""`duohuo verify` names what is planted in a real database: invariant, center, account, transfer."""

from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from grpc import StatusCode

from account_svc import store as accounts
from account_svc.registry import AccountRow
from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_DEBIT,
    POSTING_KIND_TRANSFER,
    Posting,
)
from duohuo.v1.operator_service_pb2 import CopyName
from ops.verify import Report, Violation, judge
from runtime.errors import RpcError
from runtime.placement import slot_of
from runtime.store import query
from sync_bus import inbox
from tests.fakes import account
from tests.unit.centers import Centers, centers
from transfer_svc import chain, ledger, transfers
from transfer_svc.chain import EntryFields

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""


@pytest.fixture
async def two() -> AsyncIterator[Centers]:
    """a and b, at rest: deposits, payments at home and across, and one that was refunded."""
    async with centers("a", "b") as made:
        await made.deposit(ALICE, 100, "deposit-alice")
        await made.deposit(BOB, 100, "deposit-bob")
        await made.deposit(account(3), 1, "deposit-usd", "USD")
        for number in range(3):
            await made.pay(ALICE, BOB, 10, f"there-{number}")
            await made.pay(BOB, ALICE, 5, f"back-{number}")
            await made.pay(ALICE, ALAN, 1, f"local-{number}")
        await made.pay(ALICE, account(3), 7, "refunded")
        await made.settle()
        await made.check_same()
        yield made


async def look(two: Centers, *compare: tuple[str, str]) -> Report:
    """What `duohuo verify` says, also comparing the copy at a center of another's rows."""
    facts = await two.facts(
        {holder: [CopyName(source_center=owner, topic="ledger")] for holder, owner in compare}
    )
    return judge(facts, list(two.names))


async def by_hand(two: Centers, center: str, statement: str, *values: str | int | bytes) -> None:
    await two.service(center).store.write("by hand", query(statement, *values))


async def entries(two: Centers, center: str, account_id: str) -> list[EntryFields]:
    columns = ", ".join(EntryFields._fields)
    rows = await two.service(center).store.read(
        query(f"SELECT {columns} FROM entry WHERE account_id = ? ORDER BY number", account_id)  # noqa: S608 - constant names
    )
    return [EntryFields(*row) for row in rows]


async def rechain(two: Centers, center: str, account_id: str) -> None:
    """What a patient attacker does: makes all hashes of an account anew."""
    previous = chain.START
    for entry in await entries(two, center, account_id):
        previous = chain.link(previous, "CNY", entry)
        await by_hand(
            two,
            center,
            "UPDATE entry SET hash = ? WHERE account_id = ? AND number = ?",
            previous,
            account_id,
            entry.number,
        )
    await by_hand(
        two, center, "UPDATE ledger_account SET head = ? WHERE account_id = ?", previous, account_id
    )


async def balance_changed(two: Centers) -> None:
    await by_hand(
        two, "a", "UPDATE ledger_account SET balance = balance + 1 WHERE account_id = ?", ALICE
    )


async def amount_changed(two: Centers) -> None:
    await by_hand(
        two,
        "a",
        "UPDATE entry SET minor_units = -1 WHERE transfer_id = 'there-1' AND kind = 3"
        " AND account_id = ?",
        ALICE,
    )


async def amount_and_balances_changed(two: Centers) -> None:
    """The attacker knows of balances, but not of hashes."""
    for account_id, sign in ((ALICE, 1), ("transit.a.b.CNY", -1)):
        (number,) = [
            one.number
            for one in await entries(two, "a", account_id)
            if one.transfer_id == "there-1"
        ]
        values = sign * 9, account_id, number
        await by_hand(
            two,
            "a",
            "UPDATE entry SET minor_units = minor_units + ? WHERE account_id = ? AND number = ?",
            *values,
        )
        await by_hand(
            two,
            "a",
            "UPDATE entry SET balance_after = balance_after + ? WHERE account_id = ?"
            " AND number >= ?",
            *values,
        )
        await by_hand(
            two,
            "a",
            "UPDATE ledger_account SET balance = balance + ? WHERE account_id = ?",
            *values[:2],
        )


async def memo_changed(two: Centers) -> None:
    await by_hand(
        two,
        "a",
        "UPDATE entry SET memo = 'x' WHERE transfer_id = 'there-1' AND account_id = ?",
        ALICE,
    )


async def entry_deleted(two: Centers) -> None:
    await by_hand(
        two, "a", "DELETE FROM entry WHERE transfer_id = 'local-0' AND account_id = ?", ALICE
    )


async def entries_reordered(two: Centers) -> None:
    for was, becomes in ((3, 1000), (4, 3), (1000, 4)):
        await by_hand(
            two,
            "a",
            "UPDATE entry SET number = ? WHERE account_id = ? AND number = ?",
            becomes,
            ALICE,
            was,
        )


async def entry_inserted(two: Centers) -> None:
    await by_hand(
        two,
        "a",
        "INSERT INTO entry SELECT account_id, last_number + 1, 'a', 2, 'planted', 1, balance, '', '',"
        " 0, head FROM ledger_account WHERE account_id = ?",
        ALICE,
    )


async def tail_truncated(two: Centers) -> None:
    await by_hand(
        two,
        "a",
        "DELETE FROM entry WHERE account_id = ?1"
        " AND number = (SELECT max(number) FROM entry WHERE account_id = ?1)",
        ALICE,
    )


async def tail_truncated_with_the_balance(two: Centers) -> None:
    await tail_truncated(two)
    await by_hand(
        two,
        "a",
        "UPDATE ledger_account SET (balance, last_number) = (SELECT balance_after, number FROM entry"
        " WHERE account_id = ?1 ORDER BY number DESC LIMIT 1) WHERE account_id = ?1",
        ALICE,
    )


async def head_changed(two: Centers) -> None:
    await by_hand(two, "a", "UPDATE ledger_account SET head = x'00' WHERE account_id = ?", ALAN)


async def account_row_deleted(two: Centers) -> None:
    await by_hand(two, "a", "DELETE FROM ledger_account WHERE account_id = ?", ALAN)


async def negative_balance(two: Centers) -> None:
    await by_hand(two, "a", "PRAGMA ignore_check_constraints = 1")
    await by_hand(two, "a", "UPDATE ledger_account SET balance = -5 WHERE account_id = ?", ALAN)


async def credit_without_debit(two: Centers) -> None:
    b = two.service("b")
    forged = Posting(
        kind=POSTING_KIND_DEBIT,
        transfer_id="forged",
        payer_account_id=ALICE,
        payee_account_id=BOB,
        currency_code="CNY",
        minor_units=50,
    )
    unit = transfers.credit("b", "a", forged, b.site.stamps.now())
    await b.store.write("forge", unit)


async def debit_credited_twice(two: Centers) -> None:
    """Its receipt is lost, so it is credited again."""
    b = two.service("b")
    await by_hand(two, "b", "DELETE FROM received WHERE transfer_id = 'there-1'")
    again = Posting(
        transfer_id="there-1",
        payer_account_id=ALICE,
        payee_account_id=BOB,
        currency_code="CNY",
        minor_units=10,
    )
    await b.store.write("again", transfers.credit("b", "a", again, b.site.stamps.now()))


async def credited_state_without_credit(two: Centers) -> None:
    await two.pay(ALICE, BOB, 2, "uncredited")
    await by_hand(two, "a", "UPDATE transfer SET state = 3 WHERE transfer_id = 'uncredited'")


async def refunded_state_although_credited(two: Centers) -> None:
    await by_hand(two, "a", "UPDATE transfer SET state = 4 WHERE transfer_id = 'there-1'")


async def transfer_twice(two: Centers) -> None:
    """Its idempotency record is lost, so the same id is booked again."""
    await by_hand(two, "a", "DELETE FROM transfer WHERE transfer_id = 'local-1'")
    await two.pay(ALICE, ALAN, 1, "local-1")


async def unknown_transit(two: Centers) -> None:
    a = two.service("a")
    posting = Posting(
        kind=POSTING_KIND_DEBIT, transfer_id="nobody-s", currency_code="CNY", minor_units=3
    )
    unit = ledger.post("a", posting, ALICE, "transit.a.b.CNY", a.site.stamps.now())
    await a.store.write("post", unit)


async def transfer_forgotten(two: Centers) -> None:
    await by_hand(two, "a", "DELETE FROM transfer WHERE transfer_id = 'there-2'")


async def debit_never_answered(two: Centers) -> None:
    """b has the debit, but neither its receipt nor the credit."""
    await by_hand(two, "b", "DELETE FROM received WHERE transfer_id = 'there-2'")


async def one_legged(two: Centers) -> None:
    """Money from nowhere, with right hashes, by somebody who knows how."""
    a = two.service("a")
    posting = Posting(
        kind=POSTING_KIND_TRANSFER, transfer_id="one-legged", currency_code="CNY", minor_units=5
    )
    await a.store.write(
        "post", ledger._move("a", posting, ALAN, 5, "external.a.CNY", a.site.stamps.now())
    )


async def copied_entry_changed(two: Centers) -> None:
    await by_hand(
        two,
        "b",
        "UPDATE entry SET memo = 'x' WHERE transfer_id = 'there-1' AND account_id = ?",
        ALICE,
    )


@dataclass(frozen=True)
class Planted:
    """A fault, and what a line must name."""

    plant: Callable[[Centers], Coroutine[Any, Any, None]]
    invariant: str
    center: str = "a"
    account_id: str = ALICE
    transfer_id: str = ""
    what: str = ""


FAULTS = [
    Planted(balance_changed, "CONSERVE", what="its balance is"),
    Planted(amount_changed, "CHAIN", transfer_id="there-1"),
    Planted(
        amount_and_balances_changed, "CHAIN", transfer_id="there-1", what="not what was posted"
    ),
    Planted(
        amount_and_balances_changed,
        "CHAIN",
        account_id="transit.a.b.CNY",
        transfer_id="there-1",
    ),
    Planted(memo_changed, "CHAIN", transfer_id="there-1"),
    Planted(entry_deleted, "CHAIN", what="is missing before entry"),
    Planted(entry_deleted, "CONSERVE", transfer_id="local-0", what="0 booked, 1 ordered"),
    Planted(entries_reordered, "CHAIN"),
    Planted(entry_inserted, "CHAIN", transfer_id="planted"),
    Planted(entry_inserted, "CONSERVE", transfer_id="planted", what="1 booked, 0 ordered"),
    Planted(tail_truncated, "CHAIN", what="are missing, up to"),
    Planted(tail_truncated_with_the_balance, "CHAIN", what="is not its head"),
    Planted(head_changed, "CHAIN", account_id=ALAN, what="is not its head"),
    Planted(account_row_deleted, "CHAIN", account_id=ALAN, what="no account"),
    Planted(negative_balance, "NO-OVERDRAFT", account_id=ALAN, what="its balance is -5"),
    Planted(credit_without_debit, "CONSERVE", "b", transfer_id="forged", what="without a debit"),
    Planted(debit_credited_twice, "ONCE", "b", BOB, "there-1", "2 booked, 1 ordered"),
    Planted(
        credited_state_without_credit,
        "CONSERVE",
        transfer_id="uncredited",
        what="CREDITED although",
    ),
    Planted(
        refunded_state_although_credited, "CONSERVE", transfer_id="there-1", what="has credited it"
    ),
    Planted(
        refunded_state_although_credited,
        "CONSERVE",
        transfer_id="there-1",
        what="refund of 10: 0 booked, 1 ordered",
    ),
    Planted(transfer_twice, "ONCE", transfer_id="local-1", what="2 booked, 1 ordered"),
    Planted(unknown_transit, "CONSERVE", transfer_id="nobody-s", what="1 booked, 0 ordered"),
    Planted(transfer_forgotten, "CONSERVE", transfer_id="there-2", what="1 booked, 0 ordered"),
    Planted(
        debit_never_answered, "CONSERVE", "b", transfer_id="there-2", what="neither credited nor"
    ),
    Planted(one_legged, "CONSERVE", account_id=ALAN, transfer_id="one-legged", what="sum to 5"),
    Planted(copied_entry_changed, "CHAIN", "b", transfer_id="there-1", what="(home a)"),
]


def names(violation: Violation, fault: Planted) -> bool:
    return (
        violation.invariant == fault.invariant
        and violation.center == fault.center
        and violation.account_id == fault.account_id
        and (not fault.transfer_id or violation.transfer_id == fault.transfer_id)
        and fault.what in violation.what
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: f"{one.plant.__name__}-{one.invariant}")
async def test_a_planted_fault_is_named(two: Centers, fault: Planted) -> None:
    await fault.plant(two)
    report = await look(two)
    assert not report.passed
    (named,) = [one for one in report.violations if names(one, fault)]
    line = str(named)
    assert line.startswith(f"{fault.invariant}: center {fault.center}, account {fault.account_id}")
    assert "\n" not in line
    assert f"FAIL  {line}" in report.text()


async def test_of_several_bad_entries_the_first_is_named(two: Centers) -> None:
    await by_hand(
        two, "a", "UPDATE entry SET memo = 'x' WHERE account_id = ? AND number >= 3", ALICE
    )
    (named,) = [one for one in (await look(two)).violations if one.invariant == "CHAIN"]
    assert (named.account_id, named.number) == (ALICE, 3)


async def test_a_forger_who_makes_all_hashes_anew_differs_from_the_copies(two: Centers) -> None:
    """What the home has fits in itself: only that others have it otherwise shows it."""
    await by_hand(
        two,
        "a",
        "UPDATE entry SET memo = 'forged' WHERE transfer_id = 'local-1' AND account_id = ?",
        ALICE,
    )
    await rechain(two, "a", ALICE)
    report = await look(two, ("b", "a"))
    assert {one.invariant for one in report.violations} == {"CONVERGE"}
    named = [one for one in report.violations if one.account_id == ALICE]
    assert {one.transfer_id for one in named} >= {"local-1"}
    assert {one.center for one in named} == {"b"}


async def test_a_tail_that_was_truncated_with_its_head_differs_from_the_copies(
    two: Centers,
) -> None:
    await tail_truncated_with_the_balance(two)
    await rechain(two, "a", ALICE)
    report = await look(two, ("b", "a"))
    assert [
        one for one in report.violations if one.invariant == "CONVERGE" and one.account_id == ALICE
    ]


@pytest.mark.parametrize(
    ("statement", "account_id", "transfer_id"),
    [
        ("UPDATE transfer SET memo = 'x' WHERE transfer_id = 'there-1'", ALICE, "there-1"),
        ("DELETE FROM transfer WHERE transfer_id = 'local-1'", ALICE, "local-1"),
        ("DELETE FROM received WHERE transfer_id = 'back-1'", BOB, "back-1"),
        (
            "UPDATE ledger_account SET balance = balance + 1 WHERE balance = 3 AND center = 'a'",
            ALAN,
            "",
        ),
    ],
)
async def test_a_copy_that_differs_from_its_owner_is_named_row_by_row(
    two: Centers, statement: str, account_id: str, transfer_id: str
) -> None:
    await by_hand(two, "b", statement)
    report = await look(two, ("b", "a"))
    assert "ledger of center a differ between centers a, b at" in report.text()
    (named,) = [one for one in report.violations if one.invariant == "CONVERGE" and one.account_id]
    assert (named.center, named.account_id, named.transfer_id) == ("b", account_id, transfer_id)
    assert "of center a" in named.what


async def test_what_is_on_its_way_is_no_violation_at_any_cut(two: Centers) -> None:
    """Entry by entry: b's and a's books are right whatever has not arrived yet."""
    await two.pay(ALICE, BOB, 2, "going")
    await two.pay(BOB, ALICE, 2, "coming")
    await two.pay(ALICE, account(3), 2, "to be refunded")
    for _ in range(20):
        for source, target in (("a", "b"), ("b", "a")):
            report = await look(two)
            assert not report.violations, report.text()
            await two.deliver(source, target, limit=1)
    assert (await look(two)).passed


async def test_a_copy_that_is_being_installed_is_not_judged_and_not_passed(two: Centers) -> None:
    """Its rows come in pages, accounts before entries before transfers."""
    await two.service("b").store.write("begin", inbox.begin_install("a", "ledger"))
    for table in ("entry", "transfer"):
        await by_hand(two, "b", f"DELETE FROM {table} WHERE center = 'a'")  # noqa: S608 - constant names
    report = await look(two)
    assert not report.violations, report.text()
    assert not report.passed
    # What is b's own is judged all the same.
    await by_hand(
        two, "b", "UPDATE ledger_account SET balance = balance + 1 WHERE account_id = ?", BOB
    )
    assert (await look(two)).violations


@pytest.mark.parametrize(
    "plant", [amount_changed, tail_truncated, head_changed, entry_inserted, balance_changed]
)
async def test_an_account_whose_end_does_not_fit_takes_no_posting(
    two: Centers, plant: Callable[[Centers], Coroutine[Any, Any, None]]
) -> None:
    """Nothing is written; accounts that are whole go on."""
    await plant(two)
    damaged = ALAN if plant is head_changed else ALICE
    if plant is amount_changed:  # of an entry that is not the last one: only verify sees it
        await by_hand(
            two,
            "a",
            "DELETE FROM entry WHERE account_id = ?1 AND number >"
            " (SELECT number FROM entry WHERE account_id = ?1 AND transfer_id = 'there-1')",
            ALICE,
        )
    books = await two.home(ALICE).books()
    with pytest.raises(RpcError) as refused:
        await two.deposit(damaged, 1, "refused")
    assert (refused.value.code, refused.value.reason) == (StatusCode.DATA_LOSS, "LEDGER_DAMAGED")
    assert damaged in refused.value.message
    assert await two.home(ALICE).books() == books
    assert await two.home(damaged).transfer("external.a", "refused") is None
    await two.deposit(BOB, 1, "elsewhere")


def test_no_two_entries_have_the_same_encoding() -> None:
    """Moving characters or digits from one field to the next changes the hash."""
    first = EntryFields("u1", 1, "a", 2, "t1", 5, 5, "u2", "m", 9)
    others = [
        first._replace(account_id="u11", number=1),
        first._replace(account_id="u", number=11),
        first._replace(center="a2", kind=2),
        first._replace(transfer_id="t", minor_units=15),
        first._replace(minor_units=55, balance_after=5),
        first._replace(minor_units=-5),
        first._replace(counterparty="u2m", memo=""),
        first._replace(memo="m9", time_ms=9),
        first._replace(memo="\x00m"),
        first._replace(memo="é"),
        first._replace(memo="e\u0301"),
    ]
    hashes = [chain.link(chain.START, "CNY", one) for one in (first, *others)]
    hashes += [chain.link(chain.START, "USD", first), chain.link(hashes[0], "CNY", first)]
    assert len(set(hashes)) == len(hashes)


def test_the_encoding_stays_what_it_is() -> None:
    """Hashes are kept for ever: a change here would break every chain."""
    entry = EntryFields("u000-1", 7, "a", 3, "t-1", -250, 750, "transit.a.b.CNY", "für 多活", 1900)
    assert chain.link(chain.START, "CNY", entry).hex() == (
        "e110925fda2402ee556b56876877946d7f26235f4a63293b65e8e17f0bd77599"
    )


async def test_each_leg_travels_with_its_hash(two: Centers) -> None:
    for statement in ("SELECT * FROM entry", "SELECT * FROM ledger_account"):
        hashes = [await two.service(name).store.read(query(statement)) for name in two.names]
        assert hashes[0] == hashes[1]
        assert hashes[0]


async def test_an_identifier_claimed_twice_and_an_account_at_the_wrong_slot_are_named() -> None:
    async with centers("a", "b", role="account") as two:

        async def register(center: str, account_id: str, identifier: str) -> None:
            site = two.service(center).site
            now = site.stamps.now()
            row = AccountRow(account_id, identifier, f"request {account_id}", center, now.time_ms)
            unit = accounts.register(row, "hash", {"display_name": ""}, now)
            await two.service(center).store.write("register", unit)

        ben = next(one for n in count() if slot_of(one := f"ben{n}@example.com") % 2 == 0)
        slot = slot_of("ann@example.com")
        await register("a", account(slot, 1), "ann@example.com")
        await register("b", account(slot, 2), "ann@example.com")
        await register("a", account((slot_of(ben) + 2) % 4096), ben)
        for source, target in (("a", "b"), ("b", "a")):
            await two.service(target).follow(source)
        facts = await two.facts()
        violations = judge(facts, ["a", "b"]).violations
    twice = {(one.center, one.account_id) for one in violations if "same identifier" in one.what}
    assert twice == {("a", account(slot, 1)), ("b", account(slot, 2))}
    wrong = {(one.center, one.account_id) for one in violations if "slot" in one.what}
    misplaced = account((slot_of(ben) + 2) % 4096)
    assert wrong == {("a", misplaced), ("b", misplaced)}
    parked = {
        (one.center, one.account_id)
        for one in violations
        if "IntegrityError" in one.what or "ValueError" in one.what
    }
    assert parked == {("a", account(slot, 2)), ("b", account(slot, 1))}
    assert not any("example.com" in str(one) for one in violations)


async def test_a_parked_entry_is_named(two: Centers) -> None:
    await by_hand(
        two,
        "b",
        "CREATE TRIGGER poison BEFORE INSERT ON received WHEN new.transfer_id = 'poisoned'"
        " BEGIN SELECT RAISE(ABORT, 'poisoned'); END",
    )
    await two.pay(ALICE, BOB, 4, "poisoned")
    await two.service("b").follow("a")
    named = [one for one in (await look(two)).violations if "could not be applied" in one.what]
    assert [(one.invariant, one.center, one.account_id, one.transfer_id) for one in named] == [
        ("CONVERGE", "b", ALICE, "poisoned")
    ]


async def test_a_payer_gets_nothing_back_of_what_the_payee_has_got(two: Centers) -> None:
    """Although the transfer's state was changed by hand to say so: `verify` names that, and that is all."""
    statement = "UPDATE transfer SET state = 4 WHERE payer_account_id = ? AND transfer_id = ?"
    await by_hand(two, "a", statement, ALICE, "there-0")
    assert await two.service("a").store.read(transfers.unrefunded("a", "a", 10)) == []
