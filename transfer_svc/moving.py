"""An account's money and holds when its slot goes from one home to another (`sync_bus.homes`).

The old home books what each account has to transit, as one leg of an entry of its chain; the new one books
it back. So each center's books stay closed, the chain shows who answered for the money when, and no row
ever has two owners. Open holds end at the old home, and go on in rows of their own at the new one. Whatever
else there is of an account never changes once it is written, or belongs to the center that began it: a
debit in transit is settled by whoever debited it.

What others sent to the account meanwhile, and nobody has answered, the new home answers when it takes over.
"""

from collections.abc import Iterable

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_MOVE_IN,
    POSTING_KIND_MOVE_OUT,
    Posting,
    PostingKind,
)
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import CountSlotsResponse
from duohuo.v1.transfer_service_pb2 import HOLD_STATE_HELD
from runtime.store import Unit, query
from sync_bus import homes
from sync_bus.log import Stamp
from transfer_svc import holds, ledger
from transfer_svc.states import HoldEvent


def move_out(center: str, slot: int, epoch: int, to: str, stamp: Stamp) -> Unit[int]:
    """At the home that gives a slot away. Returns how many accounts had money, or holds."""
    accounts = yield from query(
        "SELECT account_id, currency, balance FROM ledger_account"
        " WHERE account_id > ? AND account_id < ? AND center = ? AND balance > 0 ORDER BY account_id",
        *_accounts(slot),
        center,
    )
    for account_id, currency, balance in accounts:
        for row in (yield from holds.open_of(account_id, center)):
            yield from holds.end(row, HoldEvent.MOVE, stamp)
        posting = _posting(POSTING_KIND_MOVE_OUT, slot, epoch, account_id, currency, to)
        posting.minor_units = balance
        transit = ledger.transit(center, to, currency)
        yield from ledger.post(center, posting, account_id, transit, stamp)
    return len(accounts)


def move_in(center: str, slot: int, epoch: int, source: str, stamp: Stamp) -> Unit[int]:
    """At the new home, once it has everything that the old one did."""
    moved = yield from query(
        "SELECT entry.account_id, currency, -minor_units FROM entry JOIN ledger_account a"
        " ON a.account_id = entry.account_id AND a.center = entry.center"
        " WHERE entry.account_id > ? AND entry.account_id < ? AND entry.center = ?"
        " AND kind = ? AND transfer_id = ? AND number = last_number ORDER BY entry.account_id",
        *_accounts(slot),
        source,
        POSTING_KIND_MOVE_OUT,
        move_id(slot, epoch),
    )
    for account_id, currency, minor_units in moved:
        posting = _posting(POSTING_KIND_MOVE_IN, slot, epoch, account_id, currency, source)
        posting.minor_units = minor_units
        transit = ledger.transit(center, source, currency)
        yield from ledger.post(center, posting, transit, account_id, stamp)
    for row in (yield from holds.moved_from(f"{slot:03x}", epoch, source)):
        gone_on = row._replace(state=HOLD_STATE_HELD, center=center, epoch=epoch)
        yield from holds.add(gone_on, stamp)
    return len(moved)


def move_id(slot: int, epoch: int) -> str:
    """Stands for the transfer id in the entries of a move. No client can make one."""
    return f"move.{slot:03x}.{epoch}"


def count_in(slots: Iterable[int]) -> Unit[CountSlotsResponse]:
    """What the accounts of these slots have."""
    wanted = homes.listed(slots)
    in_slots = f"{homes.SLOT_OF.format('{}')} IN (SELECT value FROM json_each(?))"  # noqa: S608 - constant names
    balances = yield from query(
        "SELECT currency, sum(balance) FROM ledger_account"  # noqa: S608 - constant names
        f" WHERE {in_slots.format('account_id')} AND account_id NOT LIKE '%.%'"
        " GROUP BY currency ORDER BY currency",
        wanted,
    )
    applications = yield from query(
        "SELECT count(*) FROM application WHERE state IN (1, 2, 7)"  # noqa: S608 - constant names
        f" AND {in_slots.format('payer_account_id')}",
        wanted,
    )
    open_holds = yield from query(
        f"SELECT count(*) FROM hold WHERE state = 2 AND {in_slots.format('payer_account_id')}",  # noqa: S608 - constant names
        wanted,
    )
    return CountSlotsResponse(
        balances=[Money(currency_code=code, minor_units=units) for code, units in balances],
        applications_open=applications[0][0],
        holds_open=open_holds[0][0],
    )


def _accounts(slot: int) -> tuple[str, str]:
    """Between these are the ids of a slot's accounts."""
    return f"u{slot:03x}-", f"u{slot:03x}."


def _posting(
    kind: PostingKind.ValueType, slot: int, epoch: int, account_id: str, currency: str, other: str
) -> Posting:
    return Posting(
        kind=kind,
        transfer_id=move_id(slot, epoch),
        payer_account_id=account_id,
        payee_account_id=account_id,
        currency_code=currency,
        other_home=other,
    )
