"""What must hold in one center's ledger at any moment, checked on a frozen database.

A database is a consistent cut of the whole mesh: what its center did, and of each other center what that
had done up to the cursor, with all that it caused here. So whether a debit was answered, and whether a
credit had a debit, shows in one database. Whether copies are what their owners have is for `facts`.

A million entries must take seconds. So everything is read once, in pages, and what two tables must say
alike is compared by sums of keyed hashes, which differ if any row does; only then is it looked for which.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import (
    POSTING_KIND_CREDIT,
    POSTING_KIND_DEBIT,
    POSTING_KIND_DEPOSIT,
    POSTING_KIND_MOVE_IN,
    POSTING_KIND_MOVE_OUT,
    POSTING_KIND_REFUND,
    POSTING_KIND_TRANSFER,
    PostingKind,
)
from duohuo.v1.operator_service_pb2 import Violation
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    TransferState,
)
from runtime.store import Row, Unit, query
from sync_bus import homes, inbox
from transfer_svc.chain import START, EntryFields, beginning, link_on

PAGE_ROWS = 2000
VIOLATIONS_MAX = 100
"""So many of each kind are named."""
_NUMBER_MAX = 2**63 - 1
_MOVES = (POSTING_KIND_MOVE_OUT, POSTING_KIND_MOVE_IN)
_ENTRY = ", ".join(EntryFields._fields)
_PAYEE_SLOT = homes.SLOT_OF.format("t.payee_account_id")
_NEVER_MOVED = f"NOT EXISTS (SELECT 1 FROM handover WHERE slot = {_PAYEE_SLOT})"  # noqa: S608 - constant names
_WAS_HOME = (
    "EXISTS (SELECT 1 FROM slot_home LEFT JOIN handover USING (slot)"  # noqa: S608 - constant names
    f" WHERE slot = {_PAYEE_SLOT} AND r.center IN (slot_home.home, handover.home, handover.source))"
)
_IS_HOME = f"EXISTS (SELECT 1 FROM slot_home WHERE slot = {_PAYEE_SLOT} AND home = ?1 AND acts)"  # noqa: S608 - as above
_USER = "account_id NOT LIKE '%.%'"


class Account(NamedTuple):
    """An account's row, as the table has it."""

    account_id: str
    currency: str
    balance: int
    last_number: int
    center: str
    head: bytes


def violations(here: str, peers: Sequence[str]) -> Unit[list[Violation]]:
    """Everything that is broken in the database of a center.

    While a snapshot of another center is being installed, nothing is said of its rows, nor of what
    must fit them: copies that are incomplete pass no `verify`.
    """
    incomplete = set()
    for peer in peers:
        if (yield from inbox.incomplete(peer)):
            incomplete.add(peer)
    ledger = _Ledger(here, incomplete)
    yield from ledger.read()
    found = ledger.found
    if ledger.unbalanced:
        found += yield from _unbalanced(here, incomplete)
    if not incomplete and ledger.booked != (yield from _ordered(here)):
        found += yield from _not_as_ordered(here)
    found += yield from _answers(here, incomplete)
    if not incomplete:
        found += yield from _left_behind(here)
        found += yield from _not_given_back(here)
    return found


def _not_given_back(here: str) -> Unit[list[Violation]]:
    """Refunds that this center has decided, as home of the payer ever since, and not booked."""
    rows = yield from query(
        "SELECT payer_account_id, transfer_id, t.minor_units FROM transfer t"  # noqa: S608 - constant names
        " LEFT JOIN refunded r USING (payer_account_id, transfer_id)"
        f" WHERE t.center = ? AND t.state = {TRANSFER_STATE_REFUNDED} AND r.center IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM handover"
        f" WHERE slot = {homes.SLOT_OF.format('t.payer_account_id')}) LIMIT ?",
        here,
        VIOLATIONS_MAX,
    )
    return [
        Violation(
            invariant="CONSERVE",
            center=here,
            account_id=payer,
            transfer_id=transfer_id,
            what=f"refund of {minor_units}: 0 booked, 1 ordered",
        )
        for payer, transfer_id, minor_units in rows
    ]


def _left_behind(here: str) -> Unit[list[Violation]]:
    """Money of an account that has gone on at another center."""
    rows = yield from query(
        "SELECT account_id, center, balance FROM ledger_account WHERE balance <> 0 AND EXISTS ("
        "SELECT 1 FROM ledger_account later WHERE later.account_id = ledger_account.account_id"
        " AND later.last_number > ledger_account.last_number) LIMIT ?",
        VIOLATIONS_MAX,
    )
    return [
        Violation(
            invariant="FENCE",
            center=here,
            account_id=account_id,
            what=f"center {center} still has {balance} of an account that went on elsewhere",
        )
        for account_id, center, balance in rows
    ]


class _Ledger:
    """Reads all accounts and entries once, in order, and notes what does not fit.

    `booked` is a sum of hashes of all entries of users that this center has made. `unbalanced` is zero if
    all legs with the same center, transfer and kind sum to zero.
    """

    def __init__(self, here: str, incomplete: set[str]) -> None:
        self.found: list[Violation] = []
        self.booked = 0
        self.unbalanced = 0
        self._here = here
        self._incomplete = incomplete
        self._counts: dict[str, int] = {}

    def read(self) -> Unit[None]:
        after = ""
        while True:
            rows = yield from query(
                # Of an account's rows, max() has SQLite take the one with the latest entry.
                "SELECT account_id, currency, balance, max(last_number), center, head"
                " FROM ledger_account WHERE account_id > ? GROUP BY account_id"
                " ORDER BY account_id LIMIT ?",
                after,
                PAGE_ROWS,
            )
            end = rows[-1][0] if len(rows) == PAGE_ROWS else "\U0010ffff"
            yield from self._read_entries(
                {row[0]: Account(*row) for row in rows}, (after, _NUMBER_MAX), end
            )
            if len(rows) < PAGE_ROWS:
                break
            after = end
        self.booked %= 1 << 64

    def _read_entries(
        self, accounts: dict[str, Account], after: tuple[str, int], end: str
    ) -> Unit[None]:
        chain: _Chain | None = None
        while rows := (
            yield from query(
                f"SELECT {_ENTRY}, hash FROM entry WHERE (account_id, number) > (?, ?)"  # noqa: S608 - constant names
                " AND account_id <= ? ORDER BY account_id, number LIMIT ?",
                *after,
                end,
                PAGE_ROWS,
            )
        ):
            after = rows[-1][:2]
            begin = 0
            while begin < len(rows):
                account_id = rows[begin][0]
                count = _length_of_run(rows, begin)
                if chain is None or chain.account.account_id != account_id:
                    if chain is not None:
                        self._note(chain.account, chain.end())
                    known = accounts.pop(account_id, None)
                    home = rows[begin][2]
                    chain = _Chain(known or Account(account_id, "", 0, 0, home, START))
                    if known is None:
                        alone = Wrong("CHAIN", account_id, "", 0, "its entries have no account")
                        self._note(chain.account, [alone])
                run = rows[begin : begin + count]
                self._note(chain.account, chain.follow(run))
                self._sum(run, user="." not in account_id)
                begin += count
        if chain is not None:
            self._note(chain.account, chain.end())
        for account in accounts.values():
            self._note(account, _Chain(account).end())

    def _sum(self, rows: Sequence[Row], *, user: bool) -> None:
        here, booked, unbalanced = self._here, self.booked, self.unbalanced
        for row in rows:
            account_id, _, center, kind, transfer_id, minor_units, _, _, _, _, _ = row
            unbalanced += hash((center, transfer_id, kind)) * minor_units
            if user and center == here and kind not in _MOVES:
                booked += _fingerprint(account_id, transfer_id, kind, minor_units)
        self.booked, self.unbalanced = booked, unbalanced

    def _note(self, account: Account, wrong: "Iterator[Wrong] | Sequence[Wrong]") -> None:
        for one in wrong:
            if account.center in self._incomplete:
                continue
            count = self._counts[one.invariant] = self._counts.get(one.invariant, 0) + 1
            if count <= VIOLATIONS_MAX:
                self.found.append(one.at(self._here))


class Wrong(NamedTuple):
    """A violation, before it is known where."""

    invariant: str
    account_id: str
    transfer_id: str
    number: int
    what: str

    def at(self, center: str) -> Violation:
        return Violation(
            invariant=self.invariant,
            center=center,
            account_id=self.account_id,
            transfer_id=self.transfer_id,
            number=self.number,
            what=self.what,
        )


class _Chain:
    """Follows one account's entries."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._number = 0
        self._balance = 0
        self._hash = START
        self._broken = False
        self._is_user = "." not in account.account_id
        self._moved_out = 0
        self._overdrawn = not self._is_user  # system accounts may be below zero

    def follow(self, rows: Sequence[Row]) -> Iterator[Wrong]:
        """The first entry that is not what was posted, and the first overdraft."""
        begin = beginning(self.account.currency, self.account.account_id)
        number, balance, previous = self._number, self._balance, self._hash
        for row in rows:
            _, this_number, center, kind, transfer, amount, after, other, memo, time_ms, this = row
            number += 1
            balance += amount
            if not self._broken and (
                this_number != number
                or after != balance
                or this
                != link_on(
                    previous,
                    begin,
                    number,
                    center,
                    kind,
                    transfer,
                    amount,
                    after,
                    other,
                    memo,
                    time_ms,
                )
            ):
                self._broken = True
                yield self._first_bad(row, number, balance)
            number, balance, previous = this_number, after, this
            if kind == POSTING_KIND_MOVE_OUT and self._is_user:
                self._moved_out = -amount
            elif kind == POSTING_KIND_MOVE_IN and self._is_user and amount != self._moved_out:
                yield self._wrong("CONSERVE", row, f"{self._moved_out} left, {amount} came")
            if balance < 0 and not self._overdrawn:
                self._overdrawn = True
                yield self._wrong("NO-OVERDRAFT", row, f"entry {number} leaves {balance}")
        self._number, self._balance, self._hash = number, balance, previous

    def end(self) -> Iterator[Wrong]:
        """Does the account's row say what its entries say?"""
        account = self.account
        if account.balance < 0 and not self._overdrawn:
            yield self._wrong("NO-OVERDRAFT", None, f"its balance is {account.balance}")
        if account.balance != self._balance:
            yield self._wrong(
                "CONSERVE",
                None,
                f"its balance is {account.balance}, its entries say {self._balance}",
            )
        if self._broken:
            return
        if account.last_number > self._number:
            missing = f"the entries after {self._number} are missing, up to {account.last_number}"
            yield self._wrong("CHAIN", None, missing)
        elif account.last_number < self._number:
            extra = f"there are entries after its last one, {account.last_number}"
            yield self._wrong("CHAIN", None, extra)
        elif account.head != self._hash:
            yield self._wrong("CHAIN", None, f"entry {self._number}, its last, is not its head")

    def _first_bad(self, row: Row, number: int, balance: int) -> Wrong:
        if row[1] != number:
            return self._wrong("CHAIN", row, f"entry {number} is missing before entry {row[1]}")
        if row[6] != balance:
            what = f"entry {number} has {row[5]} and leaves {row[6]}, which should be {balance}"
            return self._wrong("CHAIN", row, what)
        return self._wrong("CHAIN", row, f"entry {number} is not what was posted")

    def _wrong(self, invariant: str, row: Row | None, what: str) -> Wrong:
        whose = "" if self.account.center == "" else f" (home {self.account.center})"
        transfer, number = (row[4], row[1]) if row else ("", self._number)
        return Wrong(invariant, self.account.account_id, transfer, number, what + whose)


def _length_of_run(rows: Sequence[Row], begin: int) -> int:
    """How many rows from `begin` on are of one account; rows are in the order of accounts."""
    account_id = rows[begin][0]
    if rows[-1][0] == account_id:
        return len(rows) - begin
    end = begin + 1
    while rows[end][0] == account_id:
        end += 1
    return end - begin


Movement = tuple[str, str, PostingKind.ValueType, int]
"""An entry of a user's account that a transfer stands for: account, transfer, kind, amount."""


def _fingerprint(
    account_id: str, transfer_id: str, kind: PostingKind.ValueType, minor_units: int
) -> int:
    """A movement's hash, with this process's key. Twice the amount: Python hashes -1 and -2 alike."""
    return hash((account_id, transfer_id, kind, 2 * minor_units))


def ordered(
    here: str,
    payer: str,
    transfer_id: str,
    payee: str,
    payee_home: str,
    minor_units: int,
    state: TransferState.ValueType,
) -> list[Movement]:
    """What a transfer that a center has decided must have moved there."""
    from_outside = "." in payer
    if state == TRANSFER_STATE_FAILED:
        return []
    if payee_home == here:
        kind = POSTING_KIND_DEPOSIT if from_outside else POSTING_KIND_TRANSFER
        moved: list[Movement] = [(payee, transfer_id, kind, minor_units)]
        if not from_outside:
            moved.append((payer, transfer_id, kind, -minor_units))
        return moved
    return [(payer, transfer_id, POSTING_KIND_DEBIT, -minor_units)]


def _ordered(here: str) -> Unit[int]:
    """The sum of hashes of all movements that must be booked here."""
    total = 0
    after: Row = ("", "")
    while rows := (
        yield from query(
            "SELECT payer_account_id, transfer_id, payee_account_id, payee_home, minor_units, state"
            " FROM transfer WHERE (payer_account_id, transfer_id) > (?, ?) AND center = ?"
            " ORDER BY payer_account_id, transfer_id LIMIT ?",
            *after,
            here,
            PAGE_ROWS,
        )
    ):
        after = rows[-1][:2]
        for row in rows:
            for movement in ordered(here, *row):
                total += _fingerprint(*movement)
    after = ("", "")
    while rows := (
        yield from query(
            "SELECT r.payer_account_id, r.transfer_id, t.minor_units"
            " FROM refunded r JOIN transfer t USING (payer_account_id, transfer_id)"
            " WHERE (r.payer_account_id, r.transfer_id) > (?, ?) AND r.center = ?"
            " ORDER BY r.payer_account_id, r.transfer_id LIMIT ?",
            *after,
            here,
            PAGE_ROWS,
        )
    ):
        after = rows[-1][:2]
        for payer, transfer_id, minor_units in rows:
            total += _fingerprint(payer, transfer_id, POSTING_KIND_REFUND, minor_units)
    after = ("", "")
    while rows := (
        yield from query(
            "SELECT r.payer_account_id, r.transfer_id, t.payee_account_id, t.minor_units"
            " FROM received r JOIN transfer t USING (payer_account_id, transfer_id)"
            " WHERE (r.payer_account_id, r.transfer_id) > (?, ?) AND r.center = ? AND r.reason = ''"
            " ORDER BY r.payer_account_id, r.transfer_id LIMIT ?",
            *after,
            here,
            PAGE_ROWS,
        )
    ):
        after = rows[-1][:2]
        for _, transfer_id, payee, minor_units in rows:
            total += _fingerprint(payee, transfer_id, POSTING_KIND_CREDIT, minor_units)
    return total % (1 << 64)


def _not_as_ordered(here: str) -> Unit[list[Violation]]:
    """Which movements are booked that nobody ordered, are ordered and not booked, or booked again."""
    rows = yield from query(
        "WITH ordered (account_id, transfer_id, kind, minor_units) AS ("  # noqa: S608 - constant names
        " SELECT payee_account_id, transfer_id,"
        f" CASE WHEN payer_account_id LIKE '%.%' THEN {POSTING_KIND_DEPOSIT}"
        f" ELSE {POSTING_KIND_TRANSFER} END, minor_units FROM transfer"
        f" WHERE center = ?1 AND payee_home = ?1 AND state <> {TRANSFER_STATE_FAILED}"
        f" UNION ALL SELECT payer_account_id, transfer_id, CASE WHEN payee_home = ?1"
        f" THEN {POSTING_KIND_TRANSFER} ELSE {POSTING_KIND_DEBIT} END, -minor_units FROM transfer"
        f" WHERE center = ?1 AND state <> {TRANSFER_STATE_FAILED}"
        " AND payer_account_id NOT LIKE '%.%'"
        f" UNION ALL SELECT payer_account_id, transfer_id, {POSTING_KIND_REFUND}, t.minor_units"
        " FROM refunded r JOIN transfer t USING (payer_account_id, transfer_id) WHERE r.center = ?1"
        f" UNION ALL SELECT t.payee_account_id, transfer_id, {POSTING_KIND_CREDIT}, t.minor_units"
        " FROM received r JOIN transfer t USING (payer_account_id, transfer_id)"
        " WHERE r.center = ?1 AND r.reason = ''),"
        " compared AS (SELECT *, 1 AS wanted, 0 AS had FROM ordered UNION ALL"
        " SELECT account_id, transfer_id, kind, minor_units, 0, 1 FROM entry"
        f" WHERE center = ?1 AND {_USER} AND kind NOT IN {_MOVES})"
        " SELECT account_id, transfer_id, kind, minor_units, sum(wanted), sum(had) FROM compared"
        " GROUP BY account_id, transfer_id, kind, minor_units HAVING sum(wanted) <> sum(had)"
        " LIMIT ?2",
        here,
        VIOLATIONS_MAX,
    )
    return [
        Violation(
            invariant="ONCE" if had > 1 else "CONSERVE",
            center=here,
            account_id=account_id,
            transfer_id=transfer_id,
            what=f"{_name(kind)} of {minor_units}: {had} booked, {wanted} ordered",
        )
        for account_id, transfer_id, kind, minor_units, wanted, had in rows
    ]


def _name(kind: PostingKind.ValueType) -> str:
    known = PostingKind.DESCRIPTOR.values_by_number.get(kind)
    return known.name.removeprefix("POSTING_KIND_").lower() if known else f"kind {kind}"


def _unbalanced(here: str, incomplete: set[str]) -> Unit[list[Violation]]:
    rows = yield from query(
        "SELECT center, transfer_id, kind, sum(minor_units), min(account_id) FROM entry"
        " GROUP BY center, transfer_id, kind HAVING sum(minor_units) <> 0 LIMIT ?",
        VIOLATIONS_MAX,
    )
    return [
        Violation(
            invariant="CONSERVE",
            center=here,
            account_id=account_id,
            transfer_id=transfer_id,
            what=f"the entries of its {_name(kind)} at center {center} sum to {total}",
        )
        for center, transfer_id, kind, total, account_id in rows
        if center not in incomplete
    ]


def _answers(here: str, incomplete: set[str]) -> Unit[list[Violation]]:
    """Is what this center decided, and what it answered, what the other homes say?

    Not asked of centers whose rows are not all here: a snapshot of them is being installed.
    """
    debits = yield from query(
        "SELECT t.payer_account_id, transfer_id, t.payee_home, t.state, r.center, r.reason"  # noqa: S608 - constant names
        " FROM transfer t LEFT JOIN received r USING (payer_account_id, transfer_id)"
        f" WHERE t.center = ?1 AND t.payee_home <> ?1 AND t.state <> {TRANSFER_STATE_FAILED} AND"
        f" t.state <> CASE WHEN r.reason IS NULL THEN {TRANSFER_STATE_DEBITED}"
        f" WHEN r.center <> t.payee_home AND NOT {_WAS_HOME} THEN -1"
        f" WHEN r.reason = '' THEN {TRANSFER_STATE_CREDITED}"
        f" ELSE {TRANSFER_STATE_REFUNDED} END LIMIT ?2",
        here,
        VIOLATIONS_MAX,
    )
    unanswered = yield from query(
        "SELECT t.payer_account_id, transfer_id, t.center"  # noqa: S608 - constant names
        " FROM transfer t LEFT JOIN received r USING (payer_account_id, transfer_id)"
        f" WHERE t.center <> ?1 AND t.state <> {TRANSFER_STATE_FAILED}"
        f" AND CASE WHEN {_NEVER_MOVED} THEN t.payee_home = ?1 AND r.center IS NOT ?1"
        f" ELSE t.state = {TRANSFER_STATE_DEBITED} AND r.center IS NULL AND {_IS_HOME} END LIMIT ?2",
        here,
        VIOLATIONS_MAX,
    )
    unasked = yield from query(
        "SELECT r.payer_account_id, transfer_id, r.source, r.reason"  # noqa: S608 - constant names
        " FROM received r LEFT JOIN transfer t USING (payer_account_id, transfer_id)"
        " WHERE r.center = ?1 AND (t.center IS NULL OR t.center <> r.source"
        f" OR (t.payee_home <> ?1 AND NOT {_WAS_HOME}))"
        " LIMIT ?2",
        here,
        VIOLATIONS_MAX,
    )
    wrong: list[tuple[str, str, str, str]] = [
        (payer, transfer_id, peer, _contradiction(state, answered, reason))
        for payer, transfer_id, peer, state, answered, reason in debits
    ]
    wrong += [
        (payer, transfer_id, peer, f"debited by center {peer}, neither credited nor refused here")
        for payer, transfer_id, peer in unanswered
    ]
    wrong += [
        (
            payer,
            transfer_id,
            peer,
            f"{'refused' if reason else 'credited'} here without a debit of center {peer}",
        )
        for payer, transfer_id, peer, reason in unasked
    ]
    return [
        Violation(
            invariant="CONSERVE", center=here, account_id=payer, transfer_id=transfer_id, what=what
        )
        for payer, transfer_id, peer, what in wrong
        if peer not in incomplete
    ]


def _contradiction(state: TransferState.ValueType, answered: str | None, reason: str | None) -> str:
    known = TransferState.DESCRIPTOR.values_by_number.get(state)
    name = known.name.removeprefix("TRANSFER_STATE_") if known else f"in state {state}"
    if answered is None:
        return f"{name} although the payee's home has neither credited nor refused it"
    return f"{name} although center {answered} has {'refused' if reason else 'credited'} it"
