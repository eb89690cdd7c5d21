"""CONSERVE, NO-OVERDRAFT and ONCE, whatever is paid, lost, repeated and delayed."""

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from duohuo.v1.operator_service_pb2 import CenterFacts
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
)
from ops.verify import judge
from runtime.store import query
from tests.fakes import account
from tests.unit.bank import Bank, bank
from transfer_svc.app import TOPICS
from transfer_svc.audit import Audit

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
    ),
    min_size=10,
    max_size=40,
)


async def take(two: Bank, step: Deposit | Pay | Deliver) -> None:
    match step:
        case Deposit():
            await two.deposit(step.to, step.minor_units, f"deposit-{step.number}", step.currency)
        case Pay() if step.payer != step.payee:
            payer = await two.home(step.payer).store.read(
                query("SELECT currency FROM ledger_account WHERE account_id = ?", step.payer)
            )
            currency = payer[0][0] if payer else "CNY"
            transfer_id = f"transfer-{step.number}"
            await two.pay(
                step.payer,
                step.payee,
                step.minor_units,
                transfer_id,
                currency,
                refused=step.refused,
            )
        case Deliver():
            target = "b" if step.source == "a" else "a"
            await two.deliver(step.source, target, step.limit, step.again)


async def check_always(two: Bank) -> None:
    for center in two.centers.values():
        assert set((await center.books()).values()) <= {0}
        assert all(balance >= 0 for balance in (await center.user_balances()).values())


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
        found = await Audit(center.site, center.store, TOPICS).facts()
        facts[name] = CenterFacts(
            ledger_sums=found.ledger_sums,
            digests=found.digests,
            violations=found.violations,
            transits=found.transits,
        )
    assert judge(facts, ["a", "b"]).passed


@settings(max_examples=120)
@given(steps)
def test_money_is_neither_made_nor_lost_nor_overdrawn(
    taken: list[Deposit | Pay | Deliver],
) -> None:
    async def run() -> None:
        async with bank("a", "b") as two:
            for step in [*FUNDS, *taken]:
                await take(two, step)
                await check_always(two)
            await two.settle()
            await check_always(two)
            await check_settled(two)

    asyncio.run(run())
