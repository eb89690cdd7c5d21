"""The generic proofs of a transfer between two homes: whatever fails, repeats or stops at any step, it ends
the same way, once.

The steps are debit, credit (or refusal), settlement (or refund, the undo); each is a unit and the entries
that it sends. After oxidecomputer/omicron's saga tests: fail at every step, repeat every step and every
undo, stop between commit and send.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from duohuo.internal.v1.log_pb2 import POSTING_KIND_DEBIT, Posting
from duohuo.v1.operator_service_pb2 import ACCOUNT_STATUS_FROZEN
from duohuo.v1.transfer_service_pb2 import TRANSFER_STATE_CREDITED, TRANSFER_STATE_REFUNDED
from runtime.store import SqliteStore, Unit
from sync_bus.inbox import Outcome
from tests.fakes import account, stamp
from tests.unit.bank import Bank, bank
from transfer_svc import transfers
from transfer_svc.states import TransferEvent

ALICE, BOB = account(0), account(1)
"""At home at a and at b."""
PATHS = ("credited", "refunded")
Step = Callable[[], Awaitable[Any]]


class Stopped(Exception):
    """The process stops here."""


@pytest.fixture
async def two() -> AsyncIterator[Bank]:
    async with bank("a", "b") as opened:
        await opened.deposit(ALICE, 100, "deposit-1")
        yield opened


async def steps(two: Bank, path: str) -> list[tuple[str, Step]]:
    """The steps in order, each with the center whose store takes it."""
    if path == "refunded":
        await two.set_status(BOB, ACCOUNT_STATUS_FROZEN)
    return [
        ("a", lambda: two.pay(ALICE, BOB, 60, "transfer-1")),
        ("b", lambda: two.deliver("a", "b")),
        ("a", lambda: two.deliver("b", "a")),
    ]


async def check(two: Bank, path: str) -> None:
    """It has ended, as it should, with its effect once; both centers say the same."""
    await two.settle()
    paid = 60 if path == "credited" else 0
    state = TRANSFER_STATE_CREDITED if path == "credited" else TRANSFER_STATE_REFUNDED
    for center in two.centers.values():
        row = await center.transfer(ALICE, "transfer-1")
        assert row is not None
        assert (row.state, row.reason) == (state, "" if paid else "PAYEE_FROZEN")
        assert await center.balance(ALICE) == 100 - paid
        assert await center.balance(BOB) == paid
        assert set((await center.books()).values()) <= {0}
    assert set((await two.transit()).values()) <= {0}


def fail_once(store: SqliteStore, patch: pytest.MonkeyPatch) -> None:
    """The next unit does all that it does, and then fails."""
    write = store.write

    def failing(unit: Unit[Any]) -> Unit[Any]:
        yield from unit
        raise Stopped

    async def write_and_fail(name: str, unit: Unit[Any]) -> Any:
        patch.setattr(store, "write", write)
        return await write(name, failing(unit))

    patch.setattr(store, "write", write_and_fail)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("failing", range(3))
async def test_a_step_that_fails_has_done_nothing_and_is_done_again(
    two: Bank, path: str, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (center, step) in enumerate(await steps(two, path)):
        if number == failing:
            before = await two.centers[center].books(), await two.centers[center].user_balances()
            fail_once(two.centers[center].store, monkeypatch)
            with pytest.raises(Stopped):
                await step()
            after = await two.centers[center].books(), await two.centers[center].user_balances()
            assert after == before
        await step()
    await check(two, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("repeated", range(3))
async def test_a_step_or_undo_that_is_repeated_is_done_once(
    two: Bank, path: str, repeated: int
) -> None:
    """Not only are entries that come twice skipped by the cursor: each step knows that it was done. The
    last step of the second path is the undo."""

    async def write(center: str, unit: Unit[Any]) -> None:
        await two.centers[center].store.write("again", unit)

    def settle_again() -> Unit[Any]:
        event = TransferEvent.CREDITED if path == "credited" else TransferEvent.REFUSED
        reason = "" if path == "credited" else "PAYEE_FROZEN"
        return transfers.settle("a", ALICE, "transfer-1", event, reason, stamp(9))

    debit = Posting(
        kind=POSTING_KIND_DEBIT,
        transfer_id="transfer-1",
        payer_account_id=ALICE,
        payee_account_id=BOB,
        currency_code="CNY",
        minor_units=60,
        body_hash=b"body",
    )
    again: list[Step] = [
        lambda: two.pay(ALICE, BOB, 60, "transfer-1"),
        lambda: write("b", transfers.credit("b", "a", debit, stamp(9))),
        lambda: write("a", settle_again()),
    ]
    for number, (_, step) in enumerate(await steps(two, path)):
        await step()
        if number >= repeated:
            for repeat in again[repeated : number + 1]:
                await repeat()
    await two.settle()
    for source, target in (("a", "b"), ("b", "a")):
        assert set(await two.deliver(source, target, again=9)) <= {Outcome.DUPLICATE}
    await check(two, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stopped", range(3))
async def test_what_was_committed_is_sent_after_a_stop(two: Bank, path: str, stopped: int) -> None:
    """A process that stops between commit and send knows by its log what it has not sent."""
    for number, (_, step) in enumerate(await steps(two, path)):
        await step()
        if number == stopped:
            break
    await check(two, path)
