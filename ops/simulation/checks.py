"""The guarantees by name, checked against what is on the disks and what the users were told."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_EXPIRED,
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_SUCCEEDED,
    TRANSFER_STATE_CREDITED,
    Application,
)
from ops.simulation.history import History, Operation, Outcome
from ops.simulation.stage import Stage
from ops.simulation.workload import User
from runtime.ids import account_slot
from session_svc.store import token_hash

DEPOSIT, DEBIT, CREDIT, REFUND = 1, 3, 4, 5
_ENDS = {
    APPLICATION_STATE_SUCCEEDED,
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_EXPIRED,
}

_OPEN = (
    ("transfer", "applications open", "SELECT 1 FROM application WHERE state IN (1, 2, 7)"),
    # A log forgets what every other center has applied.
    ("session", "revocations not yet everywhere", "SELECT 1 FROM log"),
)


def during(stage: Stage) -> Iterator[str]:
    """What must hold at every instant, faults or not."""
    claims: dict[str, set[str]] = defaultdict(set)
    debited: dict[tuple[str, str], int] = {}
    credited: dict[tuple[str, str], int] = {}
    whole = [name for name in stage.names if stage.has_all(name)]
    for name in whole:
        for identifier, account in stage.disk(name).rows(
            "account", "SELECT identifier, account_id FROM account"
        ):
            claims[identifier].add(account)
        for currency, total in stage.disk(name).rows(
            "transfer",
            "SELECT currency, sum(balance) FROM ledger_account WHERE center = ? GROUP BY currency",
            name,
        ):
            if total:
                yield f"CONSERVE: the books of {name} are off by {total} {currency}"
        for account, balance in stage.disk(name).rows(
            "transfer",
            "SELECT account_id, balance_after FROM entry"
            " WHERE balance_after < 0 AND account_id NOT LIKE '%.%'",
        ):
            yield f"NO-OVERDRAFT: {account} had {balance} at {name}"
        for kind, found in ((DEBIT, debited), (CREDIT, credited)):
            rows = stage.disk(name).rows(
                "transfer",
                "SELECT transfer_id, account_id, minor_units FROM entry WHERE kind = ?"
                " AND center = ? AND account_id LIKE 'transit.%'",
                kind,
                name,
            )
            for transfer, account, amount in rows:
                key = transfer, account
                if key in found:
                    yield f"ONCE: transfer {transfer} was booked twice at {account}"
                found[key] = abs(amount)
    for identifier, accounts in claims.items():
        if len(accounts) > 1:
            yield f"UNIQUE: {len(accounts)} accounts have the identifier of {identifier}"
    if len(whole) < len(stage.names):
        return  # a credit's debit may be on a disk that is being restored
    debits = {transfer: amount for (transfer, _), amount in debited.items()}
    for (transfer, account), amount in credited.items():
        if debits.get(transfer) != amount:
            yield f"CONSERVE: {account} credited transfer {transfer} without its debit"


def still_open(stage: Stage) -> list[str]:
    """What must end before `after` can be asked; `verify` knows nothing of it."""
    found = []
    for name in stage.names:
        for role, what, sql in _OPEN:
            count = len(stage.disk(name).rows(role, sql))
            if count:
                found.append(f"{count} {what} at {name}")
    return found


def after(stage: Stage, users: Sequence[User], history: History) -> Iterator[str]:
    """What must hold once everything has healed and settled."""
    yield from during(stage)
    yield from _money(stage, users, history)
    yield from _accounts(stage, users, history)
    yield from _sessions(stage, history)
    yield from _balances_read(stage, users, history)


def _money(stage: Stage, users: Sequence[User], history: History) -> Iterator[str]:
    """ONCE, DURABLE, CONSERVE, FENCE on every transfer, application and deposit."""
    outcome: dict[str, int] = {}
    moved: dict[str, list[tuple[int, int]]] = defaultdict(list)
    transit_total = users_total = 0
    own = {user.account_id for user in users if user.account_id}
    for name in stage.names:
        for account, kind, transfer, amount in stage.disk(name).rows(
            "transfer",
            "SELECT account_id, kind, transfer_id, minor_units FROM entry WHERE center = ?",
            name,
        ):
            slot = account_slot(account)
            if slot is None:
                continue
            if stage.placement.home(slot) != name:
                yield f"FENCE: {name}, not home of {account}, booked {transfer}"
            if kind != DEPOSIT:
                moved[transfer].append((kind, amount))
        outcome |= dict(
            stage.disk(name).rows("transfer", "SELECT transfer_id, state FROM transfer")
        )
        for account, balance in stage.disk(name).rows(
            "transfer", "SELECT account_id, balance FROM ledger_account WHERE center = ?", name
        ):
            transit_total += balance if account.startswith("transit.") else 0
            users_total += balance if account in own else 0
    deposited = sum(one.facts["amount"] for one in history.of("deposit", Outcome.OK))
    if (transit_total, users_total) != (0, deposited):
        yield (
            f"CONSERVE: users hold {users_total} of {deposited} deposited,"
            f" {transit_total} still in transit"
        )
    for transfer, entries in moved.items():
        if sum(amount for _, amount in entries) != 0:
            yield f"ONCE: transfer {transfer} moved {sorted(entries)}"
    for one in history.of("transfer"):
        yield from _told(one, outcome.get(one.facts["id"]), moved.get(one.facts["id"], []))
    yield from _applications(stage, users, history, moved)


def _told(one: Operation, state: int | None, entries: list[tuple[int, int]]) -> Iterator[str]:
    """Was a user told the truth about a real-time transfer?"""
    effective = state == TRANSFER_STATE_CREDITED
    if one.outcome is Outcome.OK and state is None:
        yield f"DURABLE: {one} left no trace"
    if one.outcome is Outcome.OK and not effective and one.result.state == TRANSFER_STATE_CREDITED:
        yield f"DURABLE: {one} did not stay"
    if one.outcome is Outcome.REFUSED and entries and effective:
        yield f"CLEAR: {one} but it moved {entries}"


def _applications(
    stage: Stage,
    users: Sequence[User],
    history: History,
    moved: dict[str, list[tuple[int, int]]],
) -> Iterator[str]:
    ends: dict[str, set[int]] = defaultdict(set)
    transfers: dict[str, str] = {}
    for name in stage.names:
        for identifier, transfer, message in stage.disk(name).rows(
            "transfer", "SELECT application_id, transfer_id, message FROM application"
        ):
            application = Application.FromString(message)
            ends[identifier].add(application.state)
            if application.reason != "IDEMPOTENCY_CONFLICT":
                transfers[identifier] = transfer
    for identifier, states in ends.items():
        if len(states) > 1 or not states <= _ENDS:
            yield f"ONCE: application {identifier} is in states {sorted(states)}"
        if identifier not in transfers:
            continue  # its id names another transfer; nothing can be said of this one
        took_effect = any(amount < 0 for _, amount in moved.get(transfers[identifier], [])) and (
            not any(kind == REFUND for kind, _ in moved[transfers[identifier]])
        )
        if took_effect is not (states == {APPLICATION_STATE_SUCCEEDED}):
            yield f"ONCE: application {identifier} ended as {sorted(states)}, moved: {took_effect}"
    for user in users:
        for identifier in user.applications:
            if identifier not in ends:
                yield f"DURABLE: the accepted application {identifier} is gone"
    # A cancel that was answered CANCELLING may end in any one of the ends, and above it had to.
    for one in history.of("cancel"):
        cancelled = ends[one.facts["application"]] == {APPLICATION_STATE_CANCELLED}
        told_cancelled = (
            one.outcome is Outcome.OK and one.result.state == APPLICATION_STATE_CANCELLED
        )
        told_decided = one.outcome is Outcome.REFUSED and one.reason == "APPLICATION_DECIDED"
        if (told_cancelled and not cancelled) or (told_decided and cancelled):
            yield f"ONCE: {one} but it ended as {ends[one.facts['application']]}"


def _accounts(stage: Stage, users: Sequence[User], history: History) -> Iterator[str]:
    """DURABLE and MONOTONE on accounts, profiles and passwords."""
    for user in users:
        registered = [one for one in history.of("register", Outcome.OK) if one.user == user.number]
        if not registered:
            continue
        edits = [one for one in history.of("edit") if one.user == user.number]
        changes = [one for one in history.of("change password") if one.user == user.number]
        for name in stage.names:
            rows = stage.disk(name).rows(
                "account",
                "SELECT a.account_id, password_hash, value FROM account a"
                " JOIN credential c USING (account_id)"
                " JOIN profile_field p ON p.account_id = a.account_id AND p.name = 'display_name'"
                " WHERE identifier = ?",
                user.identifier,
            )
            if not rows or rows[0][0] != registered[0].result.account_id:
                yield f"DURABLE: {name} does not have the account of user {user.number}"
                continue
            possible = _last_writes(edits, "value", "0")
            if rows[0][2] not in possible:
                yield f"MONOTONE: user {user.number} has profile {rows[0][2]} at {name}, not {possible}"
            possible = _last_writes(changes, "new", "0")
            if not any(stage.fits(rows[0][1], user.passwords[int(one)]) for one in possible):
                yield f"MONOTONE: user {user.number} has an old password at {name}"


def _sessions(stage: Stage, history: History) -> Iterator[str]:
    """DURABLE: a session that its user ended stays so, wherever it was kept at that time."""
    stored = {
        hashed
        for name in stage.names
        for (hashed,) in stage.disk(name).rows("session", "SELECT token_hash FROM session")
    }
    for one in history.of("logout", Outcome.OK):
        if token_hash(one.facts["token"]) in stored:
            yield f"DURABLE: {one} but its session is there"
    logins = history.of("login", Outcome.OK)
    for one in history.of("revoke", Outcome.OK):
        for login in logins:
            before = login.user == one.user and login.end_s < one.start_s
            if before and token_hash(login.result.token) in stored:
                yield f"DURABLE: {one} but the session of {login} is there"


def _last_writes(writes: list[Operation], fact: str, initial: str) -> set[str]:
    """What one client's own writes, one after another, may have left.

    A write of unknown outcome was not read by those after it, so it may win over them.
    """
    last, unknown = initial, set()
    for write in writes:
        if write.outcome is Outcome.OK:
            last = write.facts[fact]
        elif write.outcome is Outcome.UNKNOWN:
            unknown.add(write.facts[fact])
    return {last, *unknown}


def _balances_read(stage: Stage, users: Sequence[User], history: History) -> Iterator[str]:
    """Each account's ledger is linearizable: a read at home shows a state between what was finished
    before it began and what was begun before it ended. The ledger's own numbers are the order."""
    for user in users:
        if not user.account_id:
            continue
        home = stage.placement.home(account_slot(user.account_id) or 0)
        rows = stage.disk(home).rows(
            "transfer",
            "SELECT number, transfer_id, balance_after FROM entry WHERE account_id = ?"
            " ORDER BY number",
            user.account_id,
        )
        balances = [0, *(row[2] for row in rows)]
        number_of = {row[1]: row[0] for row in reversed(rows)}
        finished = sorted(
            (one.end_s, number_of[one.facts["id"]])
            for one in history.operations
            if one.user == user.number
            and one.outcome is Outcome.OK
            and one.kind in ("transfer", "deposit")
            if one.facts["id"] in number_of
        )
        for read in history.of("balance", Outcome.OK):
            if read.user != user.number or read.result.stale:
                continue
            position = bisect_left(finished, (read.start_s, 0))
            earliest = max((number for _, number in finished[:position]), default=0)
            if read.result.balance.minor_units not in balances[earliest:]:
                yield f"LINEAR: {read} read {read.result.balance.minor_units}"
