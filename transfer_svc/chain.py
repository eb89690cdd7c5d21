"""Tamper evidence: each account's entries form a hash chain, whose head stands in the account's row.

An entry's hash covers the hash of the entry before and every field of its own (Haber, Stornetta: "How to
Time-Stamp a Digital Document", 1991). It is made once, by the account's home, and travels with the
posting: whoever changes, removes or inserts an entry in one database has to make all later ones anew,
and then differs from every copy. A chain that does not fit is never repaired or continued here.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from grpc import StatusCode

from runtime.errors import RpcError
from runtime.store import Row, Unit, query

START = bytes(32)
"""Stands for the entry before an account's first one."""


class EntryFields(NamedTuple):
    """What an entry's hash covers, besides the currency of its account."""

    account_id: str
    number: int
    center: str
    kind: int
    transfer_id: str
    minor_units: int
    balance_after: int
    counterparty: str
    memo: str
    time_ms: int


class Last(NamedTuple):
    """Where an account's next entry begins."""

    balance: int
    number: int
    head: bytes


class LedgerDamaged(RpcError):
    """An account's last entries are not what was posted: until people know why, it stands still."""

    def __init__(self, account_id: str) -> None:
        super().__init__(
            StatusCode.DATA_LOSS,
            "LEDGER_DAMAGED",
            f"the last entries of account {account_id} do not fit its hash chain",
            advice="An operator must look: `duohuo verify` names the first entry that does not fit.",
        )


def link(previous: bytes, currency: str, entry: Sequence[Any]) -> bytes:
    """An entry's hash. `entry` has the fields of EntryFields, `previous` is the hash before it."""
    return link_on(previous, beginning(currency, entry[0]), *entry[1:])


def beginning(currency: str, account_id: str) -> str:
    """What the encodings of all entries of one account begin with, for `link_on`."""
    return f"{len(currency)}:{currency}{len(account_id)}:{account_id}"


def link_on(
    previous: bytes,
    begin: str,
    number: int,
    center: str,
    kind: int,
    transfer: str,
    amount: int,
    balance: int,
    other: str,
    memo: str,
    time_ms: int,
) -> bytes:
    """`link` for whoever hashes many entries of one account.

    Each text is preceded by its length in characters and each number ends with a comma, so that no two
    entries have the same encoding.
    """
    encoded = (
        f"{begin}{number},{len(center)}:{center}{kind},{len(transfer)}:{transfer}{amount},{balance},"
        f"{len(other)}:{other}{len(memo)}:{memo}{time_ms},"
    )
    return sha256(previous + encoded.encode()).digest()


_ENTRY = ", ".join(f"e.{name}" for name in EntryFields._fields)


def last(account_id: str, center: str) -> Unit[Last]:
    """The end of an account's chain, in a center's books. Raises LedgerDamaged if the last entry is not
    what was posted."""
    rows = yield from query(
        f"SELECT a.balance, a.last_number, a.head, a.currency, p.hash, {_ENTRY}"  # noqa: S608 - constant names
        " FROM ledger_account a"
        " LEFT JOIN entry e ON e.account_id = a.account_id AND e.number = a.last_number"
        " LEFT JOIN entry p ON p.account_id = a.account_id AND p.number = a.last_number - 1"
        " WHERE a.account_id = ?1 AND a.center = ?2 AND NOT EXISTS (SELECT 1 FROM entry"
        " WHERE entry.account_id = ?1 AND entry.number > a.last_number)",
        account_id,
        center,
    )
    if not rows:
        raise LedgerDamaged(account_id)
    balance, number, head, currency, before, *entry = rows[0]
    found = Last(balance, number, head)
    if number == 0:
        fits = found == Last(0, 0, START)
    else:
        previous = START if number == 1 else before
        fits = (
            previous is not None
            and EntryFields(*entry).balance_after == balance
            and link(previous, currency, entry) == head
        )
    if not fits:
        raise LedgerDamaged(account_id)
    return found


def entry_proven(row: Row) -> Unit[bool | None]:
    """Does an entry's row, with its hash, fit the entry before? None if that one is not here."""
    account_id, number = row[:2]
    rows = yield from query(
        "SELECT a.currency, p.hash FROM ledger_account a LEFT JOIN entry p"
        " ON p.account_id = a.account_id AND p.number = ? WHERE a.account_id = ?",
        number - 1,
        account_id,
    )
    currency, before = rows[0] if rows else (None, None)
    previous = START if number == 1 else before
    if currency is None or previous is None:
        return None
    return bool(link(previous, currency, row[:-1]) == row[-1])


def account_proven(row: Row) -> Unit[bool | None]:
    """Does an account's row fit the entry that it names as its last? None if that one is not here."""
    account_id, _, _, balance, last_number, *_, head = row
    rows = yield from query(
        "SELECT balance_after, hash FROM entry WHERE account_id = ? AND number = ?",
        account_id,
        last_number,
    )
    return rows[0] == (balance, head) if rows else None
