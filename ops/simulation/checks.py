"""The guarantees by name, checked against what is on the disks and what the users were told."""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_EXPIRED,
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_SUCCEEDED,
    HOLD_STATE_CAPTURED,
    HOLD_STATE_EXPIRED,
    HOLD_STATE_REFUSED,
    HOLD_STATE_RELEASED,
    TRANSFER_STATE_CREDITED,
    Application,
)
from gateway.router import FAILOVER_TIMEOUT_S
from ops.simulation import leavers
from ops.simulation.courier import Receivers
from ops.simulation.history import History, Operation, Outcome
from ops.simulation.stage import Stage, homes_of
from ops.simulation.workload import User
from runtime.ids import account_slot, place_of
from session_svc.store import token_hash
from transfer_svc.notifications import notification_id
from transfer_svc.states import HOLD_MOVED

_TIME = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.+]+")
DEPOSIT, TRANSFER, DEBIT, CREDIT, REFUND, MOVE_OUT, MOVE_IN = 1, 2, 3, 4, 5, 7, 8
_PAID = (TRANSFER, DEBIT)
SENT_ON_AFTER_S = 0.9 * FAILOVER_TIMEOUT_S
_HOLD_ENDS = (HOLD_STATE_CAPTURED, HOLD_STATE_RELEASED, HOLD_STATE_EXPIRED)
_ENDS = {
    APPLICATION_STATE_SUCCEEDED,
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_EXPIRED,
}

_OPEN = (
    ("transfer", "applications open", "SELECT 1 FROM application WHERE state IN (1, 2, 7)"),
    ("account", "sessions to be ended", "SELECT 1 FROM revocation_due"),
    ("transfer", "notifications waiting", "SELECT 1 FROM delivery WHERE state = 1"),
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
            "account",
            "SELECT identifier, account_id FROM account WHERE source = ?1"
            " UNION ALL SELECT identifier, account_id FROM claim WHERE source = ?1",
            name,
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
        for account, balance, held, total in stage.disk(name).rows(
            "transfer",
            "SELECT account_id, balance, held, coalesce((SELECT sum(minor_units) FROM hold"
            " WHERE payer_account_id = account_id AND state = 2 AND hold.center = ledger_account.center),"
            " 0) FROM ledger_account WHERE center = ? AND account_id NOT LIKE '%.%'",
            name,
        ):
            if balance < held or held != total:
                yield f"NO-OVERDRAFT: {account} has {balance}, holds {total}, keeps {held} back"
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
    yield from _frozen(history)
    yield from _announced(stage, history)
    yield from leavers.left(stage, history)


def _money(stage: Stage, users: Sequence[User], history: History) -> Iterator[str]:
    """ONCE, DURABLE, CONSERVE, FENCE on every transfer, application and deposit."""
    outcome: dict[str, int] = {}
    moved: dict[str, list[tuple[int, int]]] = defaultdict(list)
    transit_total = users_total = 0
    own = {user.account_id for user in users if user.account_id}
    yield from _fence(stage)
    for name in stage.names:
        for account, kind, transfer, amount in stage.disk(name).rows(
            "transfer",
            "SELECT account_id, kind, transfer_id, minor_units FROM entry WHERE center = ?",
            name,
        ):
            if account_slot(account) is not None and kind not in (DEPOSIT, MOVE_OUT, MOVE_IN):
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
    for one in [*history.of("transfer"), *history.of("capture")]:
        yield from _told(one, outcome.get(one.facts["id"]), moved.get(one.facts["id"], []))
    yield from _applications(stage, users, history, moved)
    yield from _holds(stage, users, history, moved)


def _fence(stage: Stage) -> Iterator[str]:
    """FENCE: each account's entries were made by its homes, one after the other."""
    booked: dict[str, dict[int, str]] = defaultdict(dict)
    for name in stage.names:
        for account, number in stage.disk(name).rows(
            "transfer", "SELECT account_id, number FROM entry WHERE center = ?", name
        ):
            if account_slot(account) is None:
                continue
            if number in booked[account]:
                yield f"FENCE: {name} and {booked[account][number]} booked entry {number} of {account}"
            booked[account][number] = name
    for account, entries in booked.items():
        homes = homes_of(stage, account_slot(account) or 0)
        for number in sorted(entries):
            while homes and homes[0] != entries[number]:
                del homes[0]
            if not homes:
                yield f"FENCE: {entries[number]}, not home of {account}, booked entry {number}"
                break


def _told(one: Operation, state: int | None, entries: list[tuple[int, int]]) -> Iterator[str]:
    """Was a user told the truth about a real-time transfer?"""
    effective = state == TRANSFER_STATE_CREDITED
    if one.outcome is Outcome.OK and state is None:
        yield f"DURABLE: {one} left no trace"
    told = one.result.transfer if one.kind == "capture" and one.result else one.result
    if one.outcome is Outcome.OK and not effective and told.state == TRANSFER_STATE_CREDITED:
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
    yield from _noted(stage, ends)
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


def _noted(stage: Stage, decided: Iterable[str]) -> Iterator[str]:
    """NOTIFY: exactly one record of each application's end, at its origin."""
    noted: dict[str, list[str]] = defaultdict(list)
    for name in stage.names:
        for (identifier,) in stage.disk(name).rows(
            "transfer", "SELECT subject_id FROM notification"
        ):
            noted[identifier].append(name)
    for identifier in decided:
        place = place_of(identifier)
        if noted[identifier] != [place.origin if place else None]:
            yield f"NOTIFY: the end of {identifier} is noted at {noted[identifier]}"


def notified(
    stage: Stage, users: Sequence[User], history: History, receivers: Receivers
) -> Iterator[str]:
    """NOTIFY: whoever asked for it was told of each end at least once, and always the same."""
    for (identifier, channel), contents in receivers.contents.items():
        said = {_without_time(content) for content in contents}
        if len(said) > 1:
            yield f"NOTIFY: {channel} said different things of {identifier}: {sorted(said)}"
    if receivers.refused:
        yield f"NOTIFY: receivers do not believe {set(receivers.refused)}"
    for user in users:
        asked = _asked_at_home(stage, user, history)
        for one in history.of("apply", Outcome.OK):
            if asked is None or one.user != user.number or one.start_s < asked.end_s:
                continue
            for channel in ("webhook", "email"):
                wanted = notification_id(one.result.application_id), channel
                if wanted not in receivers.contents:
                    yield f"NOTIFY: user {user.number} was not told by {channel} of {one}"


def _asked_at_home(stage: Stage, user: User, history: History) -> Operation | None:
    """When a user asked for notifications, if home took that: what another center takes may come late."""
    home, *later = homes_of(stage, account_slot(user.account_id) or 0)
    if later:
        return None  # nobody knows which of them took it
    found = stage.disk(home).rows(
        "account",
        "SELECT center FROM notification_setting WHERE account_id = ?",
        user.account_id,
    )
    if found != [(home,)]:
        return None
    for one in history.of("notify", Outcome.OK):
        if one.user == user.number and one.facts["served_by"] == home:
            return one
    return None


def _without_time(content: str) -> str:
    """A center that lost the disk on which the decision's time stood decides at another time."""
    return _TIME.sub("", content)


def _holds(
    stage: Stage,
    users: Sequence[User],
    history: History,
    moved: dict[str, list[tuple[int, int]]],
) -> Iterator[str]:
    """What was held is spent once at most, by its capture; every hold has ended, and its user knows how."""
    made = {one.facts["id"] for one in history.of("reserve")}
    ends: dict[str, tuple[int, int, int, str]] = {}
    for name in stage.names:
        for hold, *end in stage.disk(name).rows(
            "transfer",
            "SELECT hold_id, state, minor_units, captured, transfer_id FROM hold WHERE center = ?",
            name,
        ):
            if hold in made and end[0] != HOLD_MOVED:
                if hold in ends:
                    yield f"ONCE: the hold {hold} ended at two centers"
                ends[hold] = (end[0], end[1], end[2], end[3])
    for user in users:
        for hold, _ in user.holds:
            if hold not in ends:
                yield f"DURABLE: the hold {hold} is gone"
    taken: dict[str, list[str]] = defaultdict(list)
    for one in history.of("capture"):
        if any(kind in (TRANSFER, DEBIT) for kind, _ in moved.get(one.facts["id"], [])):
            taken[one.facts["hold"]].append(one.facts["id"])
        if one.reason == "INSUFFICIENT_FUNDS":
            yield f"NO-OVERDRAFT: {one}: what was held is not there"
    for hold, (state, amount, captured, transfer) in ends.items():
        if state not in (HOLD_STATE_REFUSED, *_HOLD_ENDS):
            yield f"CONVERGE: the hold {hold} is in state {state}"
        wanted = [transfer] if state == HOLD_STATE_CAPTURED else []
        if taken.get(hold, []) != wanted:
            yield f"ONCE: the hold {hold} in state {state} was captured by {taken[hold]}"
        if wanted:
            paid = -sum(units for kind, units in moved[transfer] if kind in _PAID and units < 0)
            if not paid == captured <= amount:
                yield f"ONCE: of the hold {hold} over {amount}, {captured} was captured, {paid} paid"
    for one in history.of("release", Outcome.OK):
        released = ends.get(one.facts["hold"])
        if released is None or released[0] != HOLD_STATE_RELEASED:
            yield f"ONCE: {one} but it ended as {released}"


def _frozen(history: History) -> Iterator[str]:
    """Nobody pays from, or holds money of, an account while an operator has frozen it."""
    since: dict[int, float] = {}
    for one in history.operations:
        if one.kind == "freeze" and one.outcome is Outcome.OK:
            since[one.user] = one.end_s
        elif one.kind == "unfreeze":
            began_s = since.pop(one.user, one.start_s)
            for paid in history.operations:
                if (
                    paid.user == one.user
                    and paid.kind in ("transfer", "reserve", "capture")
                    and paid.outcome is Outcome.OK
                    and began_s < paid.start_s
                    and paid.end_s < one.start_s
                ):
                    yield f"FROZEN: {paid} although it was frozen from {began_s:.3f} s on"


def _announced(stage: Stage, history: History) -> Iterator[str]:
    """Every center tells users what operators have raised, and nothing that they have lifted."""
    lifted = {one.facts["id"] for one in history.of("lift", Outcome.OK)}
    raised = {one.facts["id"] for one in history.of("announce", Outcome.OK)}
    for name in stage.names:
        found = dict(
            stage.disk(name).rows("account", "SELECT announcement_id, lifted FROM announcement")
        )
        for announcement in raised:
            if found.get(announcement) != (announcement in lifted):
                yield f"ANNOUNCED: {announcement} is {found.get(announcement)} at {name}"


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
            yield from _identifiers(stage, user, history, name)


def _identifiers(stage: Stage, user: User, history: History, name: str) -> Iterator[str]:
    """DURABLE and MONOTONE on the identifiers that a user has added and removed."""
    rows = stage.disk(name).rows(
        "account",
        "SELECT claim.identifier, value FROM claim LEFT JOIN profile_field p"
        " ON p.account_id = claim.account_id AND p.name = 'identifier ' || claim.identifier"
        " WHERE claim.account_id = ?",
        user.account_id,
    )
    found = {identifier: state or "" for identifier, state in rows}
    writes = [one for one in history.of("identifier") if one.user == user.number]
    for identifier in {one.facts["identifier"] for one in writes}:
        own = [one for one in writes if one.facts["identifier"] == identifier]
        if any(one.outcome is Outcome.OK for one in own) and identifier not in found:
            yield f"DURABLE: {name} does not know that {identifier} is user {user.number}'s"
        possible = _last_writes(own, "state", "")
        if found.get(identifier, "") not in possible:
            yield f"MONOTONE: {identifier} of user {user.number} is {found} at {name}, not {possible}"


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
    for one in (*history.of("revoke", Outcome.OK), *history.of("change password", Outcome.OK)):
        for login in logins:
            hashed = token_hash(login.result.token)
            before = login.user == one.user and login.end_s < one.start_s
            if before and hashed in stored and hashed.hex() != one.facts.get("kept"):
                yield f"DURABLE: {one} but the session of {login} is there"


def _last_writes(writes: list[Operation], fact: str, initial: str) -> set[str]:
    """What one client's own writes, one after another, may have left.

    A write of unknown outcome was not read by those after it, so it may win over them. So may one that took
    so long that it was sent on to a second center: it may have run at the first one too, whose clock may be
    ahead, and the second one has not heard of that (a known limit, docs/simulation.md).
    """
    last, unknown = initial, set()
    for write in writes:
        if write.outcome is Outcome.OK:
            last = write.facts[fact]
            if write.end_s - write.start_s > SENT_ON_AFTER_S:
                unknown.add(last)
        elif write.outcome is Outcome.UNKNOWN:
            unknown.add(write.facts[fact])
    return {last, *unknown}


def _balances_read(stage: Stage, users: Sequence[User], history: History) -> Iterator[str]:
    """Each account's ledger is linearizable: a read at home shows a state between what was finished
    before it began and what was begun before it ended. The ledger's own numbers are the order."""
    placement = stage.placement
    for user in users:
        if not user.account_id:
            continue
        home = placement.home(account_slot(user.account_id) or 0)
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
            and one.kind in ("transfer", "capture", "deposit")
            if one.facts["id"] in number_of
        )
        for read in history.of("balance", Outcome.OK):
            if read.user != user.number or read.result.stale:
                continue
            position = bisect_left(finished, (read.start_s, 0))
            earliest = max((number for _, number in finished[:position]), default=0)
            if read.result.balance.minor_units not in balances[earliest:]:
                yield f"LINEAR: {read} read {read.result.balance.minor_units}"
