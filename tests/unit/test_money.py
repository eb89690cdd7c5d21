"""CONSERVE, NO-OVERDRAFT and ONCE, whatever is paid, lost, repeated and delayed."""

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from duohuo.v1.operator_service_pb2 import ACCOUNT_STATUS_CLOSED as CLOSED
from duohuo.v1.operator_service_pb2 import ACCOUNT_STATUS_FROZEN as FROZEN
from duohuo.v1.operator_service_pb2 import ACCOUNT_STATUS_OPEN as OPEN
from duohuo.v1.operator_service_pb2 import AccountStatus, CenterFacts
from duohuo.v1.transfer_service_pb2 import (
    HOLD_STATE_CAPTURED,
    HOLD_STATE_HELD,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
)
from ops.verify import judge
from runtime.store import query
from tests.fakes import account
from tests.unit.bank import Bank, bank
from transfer_svc import controls, holds
from transfer_svc.audit import Audit
from transfer_svc.ledger import LEDGER

USERS = [account(slot) for slot in range(4)]
"""At home at a, b, a and b. The last one's money is dollars, which nobody else takes."""


@dataclass(frozen=True)
class Deposit:
    to: str
    minor_units: int
    number: int
    currency: str


@dataclass(frozen=True)
class Pay:
    payer: str
    payee: str
    minor_units: int
    number: int
    refused: str


@dataclass(frozen=True)
class Deliver:
    source: str
    limit: int
    again: int


@dataclass(frozen=True)
class Reserve:
    payer: str
    payee: str
    minor_units: int
    number: int
    lasts_ms: int


@dataclass(frozen=True)
class Capture:
    payer: str
    hold: int
    number: int
    minor_units: int | None


@dataclass(frozen=True)
class Release:
    payer: str
    hold: int


@dataclass(frozen=True)
class Expire:
    after_ms: int
    noted: bool


@dataclass(frozen=True)
class SetStatus:
    user: str
    status: AccountStatus.ValueType


@dataclass(frozen=True)
class Limit:
    user: str
    per_transfer: int
    per_day: int


Step = Deposit | Pay | Deliver | Reserve | Capture | Release | Expire | SetStatus | Limit

FUNDS = [Deposit(user, 60, number, "CNY") for number, user in enumerate(USERS[:3], 100)]
FUNDS.append(Deposit(USERS[3], 60, 103, "USD"))
users = st.sampled_from(USERS)
steps = st.lists(
    st.one_of(
        st.builds(
            Deposit, users, st.integers(1, 100), st.integers(1, 6), st.sampled_from(["CNY", "USD"])
        ),
        st.builds(
            Pay,
            users,
            users,
            st.integers(1, 80),
            st.integers(1, 8),
            st.sampled_from(["", "", "", "CANCELLED"]),
        ),
        st.builds(Deliver, st.sampled_from("ab"), st.integers(1, 4), st.integers(0, 3)),
        st.builds(
            Reserve,
            users,
            users,
            st.integers(1, 80),
            st.integers(1, 4),
            st.integers(1, 3000),
        ),
        st.builds(
            Capture,
            users,
            st.integers(1, 4),
            st.integers(1, 8),
            st.none() | st.integers(1, 80),
        ),
        st.builds(Release, users, st.integers(1, 4)),
        st.builds(Expire, st.integers(0, 1500), st.booleans()),
        st.builds(SetStatus, users, st.sampled_from([OPEN, OPEN, FROZEN, CLOSED])),
        st.builds(Limit, users, st.sampled_from([0, 30]), st.sampled_from([0, 90])),
    ),
    min_size=10,
    max_size=40,
)


payers = st.sampled_from(USERS[:2])
# Few payers and few ids, so that holds meet their captures, and payments what is held.
hold_steps = st.lists(
    st.one_of(
        st.builds(Reserve, payers, users, st.integers(1, 60), st.integers(1, 3), st.just(2000)),
        st.builds(
            Capture, payers, st.integers(1, 3), st.integers(1, 9), st.none() | st.integers(1, 60)
        ),
        st.builds(Pay, payers, users, st.integers(1, 60), st.integers(11, 19), st.just("")),
        st.builds(Release, payers, st.integers(1, 3)),
        st.builds(Expire, st.integers(0, 900), st.booleans()),
        st.builds(Deposit, payers, st.integers(1, 60), st.integers(1, 6), st.just("CNY")),
        st.builds(Deliver, st.sampled_from("ab"), st.integers(1, 4), st.integers(0, 3)),
        st.builds(SetStatus, payers, st.sampled_from([OPEN, CLOSED])),
    ),
    min_size=20,
    max_size=40,
)


async def take(two: Bank, step: Step) -> None:
    match step:
        case Deposit():
            await two.deposit(step.to, step.minor_units, f"deposit-{step.number}", step.currency)
        case Pay() if step.payer != step.payee:
            await two.pay(
                step.payer,
                step.payee,
                step.minor_units,
                f"transfer-{step.number}",
                await currency_of(two, step.payer),
                refused=step.refused,
            )
        case Reserve() if step.payer != step.payee:
            currency = await currency_of(two, step.payer)
            hold = f"hold-{step.number}"
            await two.reserve(
                step.payer, step.payee, step.minor_units, hold, step.lasts_ms, currency=currency
            )
        case Capture():
            currency = await currency_of(two, step.payer)
            transfer, hold = f"transfer-{step.number}", f"hold-{step.hold}"
            before = await two.home(step.payer).transfer(step.payer, transfer)
            done = await two.capture(
                step.payer, hold, transfer, step.minor_units, currency=currency
            )
            if before is None and done.transfer is not None:
                assert done.transfer.reason != "INSUFFICIENT_FUNDS", "held money was spent"
        case Release():
            await two.release(step.payer, f"hold-{step.hold}")
        case Expire():
            two.clock.advance(step.after_ms)
            if step.noted:
                await two.expire()
        case SetStatus():
            await two.set_status(step.user, step.status)
        case Limit():
            await two.limit(step.user, step.per_transfer, step.per_day)
        case Deliver():
            target = "b" if step.source == "a" else "a"
            await two.deliver(step.source, target, step.limit, step.again)


async def currency_of(two: Bank, user: str) -> str:
    rows = await two.home(user).store.read(
        query("SELECT currency FROM ledger_account WHERE account_id = ?", user)
    )
    return str(rows[0][0]) if rows else "CNY"


async def check_always(two: Bank) -> None:
    for center in two.centers.values():
        assert set((await center.books()).values()) <= {0}
        assert await center.store.read(holds.unequal(1)) == []
        for user, balance in (await center.user_balances()).items():
            assert 0 <= await center.available(user) <= balance
            control = await center.store.read(controls.find(user))
            assert control.status != CLOSED or balance == 0


async def check_holds(two: Bank) -> None:
    """Every hold has ended, and the captured ones by exactly the one transfer that they name."""
    for name, center in two.centers.items():
        rows = await center.store.read(
            query(
                "SELECT h.state, captured, count(t.transfer_id), coalesce(sum(t.minor_units), 0)"
                " FROM hold h LEFT JOIN transfer t ON t.payer_account_id = h.payer_account_id"
                " AND t.transfer_id = h.transfer_id AND t.state <> 1"
                " WHERE h.center = ? GROUP BY h.payer_account_id, hold_id",
                name,
            )
        )
        for state, captured, transfers, minor_units in rows:
            assert state != HOLD_STATE_HELD
            assert transfers == (1 if state == HOLD_STATE_CAPTURED else 0)
            assert captured == minor_units


async def check_settled(two: Bank) -> None:
    """Balances are exactly what the ended transfers say, and both centers say the same."""
    expected = dict.fromkeys(USERS, 0)
    for name, center in two.centers.items():
        rows = await center.store.read(
            query(
                "SELECT payer_account_id, payee_account_id, minor_units, state FROM transfer"
                " WHERE center = ?",
                name,
            )
        )
        for payer, payee, minor_units, state in rows:
            assert state in (
                TRANSFER_STATE_CREDITED,
                TRANSFER_STATE_FAILED,
                TRANSFER_STATE_REFUNDED,
            )
            if state == TRANSFER_STATE_CREDITED:
                expected[payee] += minor_units
                if payer in expected:
                    expected[payer] -= minor_units
    for user in USERS:
        assert {await center.balance(user) for center in two.centers.values()} == {expected[user]}
    assert set((await two.transit()).values()) <= {0}
    facts = {}
    for name, center in two.centers.items():
        # The bank brings the ledger's entries alone.
        found = await Audit(center.site, center.store, (LEDGER,)).facts()
        facts[name] = CenterFacts(
            ledger_sums=found.ledger_sums,
            digests=found.digests,
            violations=found.violations,
            transits=found.transits,
        )
    assert judge(facts, ["a", "b"]).passed


@settings(max_examples=120)
@given(steps)
def test_money_is_neither_made_nor_lost_nor_overdrawn(taken: list[Step]) -> None:
    asyncio.run(run([*FUNDS, *taken]))


@settings(max_examples=120)
@given(hold_steps)
def test_what_is_held_is_spent_once_by_its_capture_or_comes_back(taken: list[Step]) -> None:
    asyncio.run(run([*FUNDS, *taken]))


async def run(taken: list[Step]) -> None:
    async with bank("a", "b") as two:
        for step in taken:
            await take(two, step)
            await check_always(two)
        two.clock.advance(3000)
        await two.expire()
        await two.settle()
        await check_always(two)
        await check_settled(two)
        await check_holds(two)
