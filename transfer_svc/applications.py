"""Applications: queued transfers, at the center that accepted them and as copies everywhere else.

The origin alone moves an application through its states, by what home decided; each change of state
goes to the other centers over the log. Cancelled and expired are decisions of home's too: the same
transfer may be queued at two centers, and only home can promise that it never runs. While the origin is
away, the others show what they know of the transfer itself (`as_known`).

The stored message is the same at all centers: attempts are the origin's own, in columns beside it.

What home has not decided yet stands in the origin's `queue`, in one line per payer. Home is asked for the
first of a line (NEXT) only; those BEHIND it wait, so that a payer's applications are decided in the order
in which this center accepted them. Two kinds step ASIDE and hold nobody up: those that home has answered
but cannot decide, because a third party is away, and those that their user has withdrawn.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import ApplicationChanged, LogRecord
from duohuo.v1.transfer_service_pb2 import (
    Application,
    TransferState,
)
from runtime.clock import timestamp
from runtime.store import Row, Unit, query
from sync_bus import log
from sync_bus.copies import CopiedTable, columns
from sync_bus.log import Road, Stamp, Topic
from transfer_svc import transfers
from transfer_svc.states import (
    APPLICATION_OPEN,
    APPLICATION_UNDECIDED,
    Decision,
    IllegalTransition,
    Wish,
    decision_of,
    follows,
    next_application_state,
    progress,
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS application (
  application_id TEXT NOT NULL PRIMARY KEY, payer_account_id TEXT NOT NULL,
  transfer_id TEXT NOT NULL, origin TEXT NOT NULL, body_hash BLOB NOT NULL, state INTEGER NOT NULL,
  create_ms INTEGER NOT NULL, message BLOB NOT NULL,
  attempts INTEGER NOT NULL, last_attempt_error TEXT NOT NULL,
  change_number INTEGER NOT NULL UNIQUE, traceparent TEXT NOT NULL,
  UNIQUE (payer_account_id, transfer_id, origin)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS application_open ON application (payer_account_id, transfer_id)
  WHERE state IN (1, 2, 7);
CREATE INDEX IF NOT EXISTS application_by_payer ON application (payer_account_id, change_number);
CREATE TABLE IF NOT EXISTS queue (
  number INTEGER NOT NULL PRIMARY KEY, application_id TEXT NOT NULL UNIQUE,
  payer_account_id TEXT NOT NULL, home TEXT NOT NULL, place INTEGER NOT NULL,
  due_ms INTEGER NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS queue_due ON queue (home, place, due_ms);
CREATE UNIQUE INDEX IF NOT EXISTS queue_next ON queue (payer_account_id) WHERE place = 1;
CREATE INDEX IF NOT EXISTS queue_behind ON queue (payer_account_id) WHERE place = 0;
"""
NEXT, ASIDE = 1, 2
"""Places in the queue at which home is asked. Place 0 is behind another of the same payer."""


class ApplicationRow(NamedTuple):
    """An application as stored: the public message and what its origin must remember."""

    message: Application
    body_hash: bytes
    change_number: int
    traceparent: str


_SELECT = (
    "SELECT message, body_hash, change_number, traceparent, attempts, last_attempt_error"
    " FROM application"
)


def find(application_id: str) -> Unit[ApplicationRow | None]:
    return next(iter((yield from find_all(application_id))), None)


def find_all(application_id: str) -> Unit[list[ApplicationRow]]:
    """The application of this id, or none."""
    rows = yield from query(f"{_SELECT} WHERE application_id = ?", application_id)
    return [_row(row) for row in rows]


def applied_for(
    payer_account_id: str, transfer_id: str, origin: str
) -> Unit[ApplicationRow | None]:
    """The application for a transfer id that this origin has accepted."""
    rows = yield from query(
        f"{_SELECT} WHERE payer_account_id = ? AND transfer_id = ? AND origin = ?",
        payer_account_id,
        transfer_id,
        origin,
    )
    return _row(rows[0]) if rows else None


def accept(
    application: Application, body_hash: bytes, home: str, stamp: Stamp
) -> Unit[ApplicationRow]:
    """Queues an application for its payer's home; if its transfer id was applied for here before,
    returns that one."""
    present = yield from applied_for(
        application.payer_account_id, application.transfer_id, application.origin_center
    )
    if present is not None:
        return present
    yield from _insert(application, body_hash, stamp.traceparent)
    waiting = Waiting(application.application_id, application.payer_account_id, home)
    yield from line_up([waiting], stamp.time_ms)
    yield from _tell(application, body_hash, stamp)
    found = yield from find(application.application_id)
    assert found is not None  # noqa: S101 - inserted above, in this transaction
    return found


class Waiting(NamedTuple):
    """An application that its payer's home has to decide."""

    application_id: str
    payer_account_id: str
    home: str


def line_up(waiting: Sequence[Waiting], now_ms: int) -> Unit[None]:
    """Puts applications at the ends of their payers' lines, or an old line before another home."""
    for one in waiting:
        yield from query(
            "INSERT INTO queue (application_id, payer_account_id, home, place, due_ms)"
            " VALUES (?, ?, ?, 0, ?) ON CONFLICT (application_id) DO UPDATE SET home = excluded.home",
            *one,
            now_ms,
        )
        yield from _advance(one.payer_account_id, now_ms)


def strays(origin: str, home_of: Callable[[str], str]) -> Unit[list[Waiting]]:
    """This origin's undecided applications that wait in no line, as after the loss of a disk, or for a
    center that is no longer their home; in the order in which they were accepted."""
    rows = yield from query(
        "SELECT application_id, a.payer_account_id, coalesce(home, '') FROM application a"
        " LEFT JOIN queue USING (application_id)"
        " WHERE state IN (1, 2, 7) AND state <> 2 AND origin = ? ORDER BY create_ms, application_id",
        origin,
    )
    homes = {payer: home_of(payer) for payer in {row[1] for row in rows}}
    return [Waiting(one, payer, homes[payer]) for one, payer, home in rows if homes[payer] != home]


def due(home: str, place: int, now_ms: int, delay_ms_max: int, limit: int) -> Unit[list[str]]:
    """Ids of applications that a home may be asked for now, the longest overdue first. One due later
    than the longest delay was scheduled before the clock jumped, and is due now."""
    found: list[str] = []
    for bound, bound_ms in (("due_ms <= ?", now_ms), ("due_ms > ?", now_ms + delay_ms_max)):
        rows = yield from query(
            f"SELECT application_id FROM queue WHERE home = ? AND place = ? AND {bound}"  # noqa: S608 - constant
            " ORDER BY due_ms LIMIT ?",
            home,
            place,
            bound_ms,
            limit - len(found),
        )
        found += [row[0] for row in rows]
    return found


def next_due_ms(home: str, now_ms: int) -> Unit[int | None]:
    """When something for a home that is not due yet will be; None if there is nothing."""
    moments = []
    for place in (NEXT, ASIDE):
        rows = yield from query(
            "SELECT min(due_ms) FROM queue WHERE home = ? AND place = ? AND due_ms > ?",
            home,
            place,
            now_ms,
        )
        moments += [row[0] for row in rows if row[0] is not None]
    return min(moments, default=None)


def attempted(
    application_id: str, error: str, now_ms: int, aside_ms: int | None = None
) -> Unit[None]:
    """Counts an attempt that brought no decision, with its reason.

    The application keeps its place and is asked for again after the other payers' first ones; or, with
    `aside_ms`, steps aside, and is asked for again so much later.
    """
    found = yield from find(application_id)
    if found is None or found.message.state not in APPLICATION_UNDECIDED:
        return
    found.message.attempts += 1
    found.message.last_attempt_error = error
    yield from _store(found.message)
    if aside_ms is None:
        yield from query(
            "UPDATE queue SET due_ms = ? WHERE application_id = ?", now_ms, application_id
        )
    else:
        yield from _step_aside(found.message, now_ms, aside_ms)


def withdraw(application_id: str, error: str, stamp: Stamp) -> Unit[Application | None]:
    """Moves an application of this origin to CANCELLING, with the reason why home does not say whether
    it has decided; one that is decided or delivered stays as it is."""
    found = yield from find(application_id)
    if found is None or found.message.state not in APPLICATION_UNDECIDED:
        return found.message if found else None
    message = found.message
    state = next_application_state(message.state, Wish.CANCEL)
    if state == message.state:
        return message
    message.state = state
    message.last_attempt_error = error
    yield from _store(message)
    yield from _tell(message, found.body_hash, stamp)
    yield from _step_aside(message, stamp.time_ms, 0)
    return message


def decide(
    application_id: str, decision: Decision, reason: str, payee_account_id: str, stamp: Stamp
) -> Unit[Application | None]:
    """Moves an application of this origin by what home decided. Deciding again changes nothing."""
    found = yield from find(application_id)
    if found is None:
        return None
    message = found.message
    state = next_application_state(message.state, decision)
    if state == message.state:
        return message
    if message.state in APPLICATION_UNDECIDED:
        message.attempts += 1  # the one that brought the decision
    message.state = state
    message.reason = reason
    message.last_attempt_error = ""
    if payee_account_id:
        message.payee_account_id = payee_account_id
    if state not in APPLICATION_OPEN:
        message.decide_time.CopyFrom(timestamp(stamp.time_ms))
    yield from _store(message)
    yield from query("DELETE FROM queue WHERE application_id = ?", application_id)
    yield from _advance(message.payer_account_id, stamp.time_ms)
    yield from _tell(message, found.body_hash, stamp)
    return message


def waiting_for(
    payer_account_id: str, transfer_id: str, body_hash: bytes, origin: str
) -> Unit[list[str]]:
    """Ids of this origin's open applications for a transfer of this body."""
    rows = yield from query(
        "SELECT application_id FROM application WHERE payer_account_id = ? AND transfer_id = ?"
        " AND body_hash = ? AND origin = ? AND state IN (1, 2, 7)",
        payer_account_id,
        transfer_id,
        body_hash,
        origin,
    )
    return [row[0] for row in rows]


def decided_elsewhere(
    origin: str, limit: int
) -> Unit[list[tuple[str, TransferState.ValueType, str]]]:
    """This origin's open applications whose transfer has ended: (id, transfer state, reason)."""
    rows = yield from query(
        "SELECT application.application_id, transfer.state, transfer.reason FROM application"
        " JOIN transfer USING (payer_account_id, transfer_id, body_hash)"
        " WHERE application.state IN (1, 2, 7) AND origin = ? AND transfer.state <> 2 LIMIT ?",
        origin,
        limit,
    )
    return [(row[0], row[1], row[2]) for row in rows]


def copy(application: Application, body_hash: bytes) -> Unit[None]:
    """Stores another center's application, unless its later state is here already."""
    present = yield from find(application.application_id)
    if present is None:
        yield from _insert(application, body_hash, "")
    elif follows(application.state, present.message.state):
        yield from _store(application)


def as_known(rows: Unit[list[ApplicationRow]], here: str) -> Unit[list[ApplicationRow]]:
    """Applications with what is known here of their transfers: another origin may be away, and would say
    the same."""
    known = []
    for row in (yield from rows):
        message = row.message
        if message.origin_center != here and message.state in APPLICATION_OPEN:
            yield from _learn(message, row.body_hash)
        known.append(row)
    return known


def touch(payer_account_id: str, transfer_id: str, body_hash: bytes, here: str) -> Unit[None]:
    """Shows the copies of other origins' open applications to their watchers again: their transfer has
    been decided."""
    rows = yield from query(
        "SELECT application_id FROM application WHERE payer_account_id = ? AND transfer_id = ?"
        " AND body_hash = ? AND origin <> ? AND state IN (1, 2, 7)",
        payer_account_id,
        transfer_id,
        body_hash,
        here,
    )
    for row in rows:
        yield from query(
            "UPDATE application SET change_number = (SELECT max(change_number) + 1 FROM application)"
            " WHERE application_id = ?",
            row[0],
        )


def of_payer(payer_account_id: str, before: int | None, limit: int) -> Unit[list[ApplicationRow]]:
    """The payer's applications, the last changed first, from below a change number."""
    rows = yield from query(
        f"{_SELECT} WHERE payer_account_id = ?1 AND (?2 IS NULL OR change_number < ?2)"
        " ORDER BY change_number DESC LIMIT ?3",
        payer_account_id,
        before,
        limit,
    )
    return [_row(row) for row in rows]


def changed_since(payer_account_id: str, number: int, limit: int) -> Unit[list[ApplicationRow]]:
    """The payer's applications that changed after a change number, in order of change."""
    rows = yield from query(
        f"{_SELECT} WHERE payer_account_id = ? AND change_number > ? ORDER BY change_number LIMIT ?",
        payer_account_id,
        number,
        limit,
    )
    return [_row(row) for row in rows]


def last_change(payer_account_id: str) -> Unit[int]:
    """The highest change number of the payer's applications."""
    rows = yield from query(
        "SELECT coalesce(max(change_number), 0) FROM application WHERE payer_account_id = ?",
        payer_account_id,
    )
    return int(rows[0][0])


def open_count() -> Unit[int]:
    rows = yield from query("SELECT count(*) FROM application WHERE state IN (1, 2, 7)")
    return int(rows[0][0])


def _learn(message: Application, body_hash: bytes) -> Unit[None]:
    """Moves a message, not the stored one, by its transfer if that is known here."""
    transfer = yield from transfers.find(message.payer_account_id, message.transfer_id)
    if transfer is None or transfer.body_hash != body_hash:
        return
    try:
        decision = decision_of(transfer.state, transfer.reason)
        message.state = next_application_state(message.state, decision)
    except IllegalTransition:
        return  # not to be explained here; the origin will say
    message.reason = transfer.reason
    message.payee_account_id = transfer.payee_account_id or message.payee_account_id
    if message.state not in APPLICATION_OPEN:
        message.decide_time.CopyFrom(timestamp(transfer.create_ms))


def _advance(payer_account_id: str, now_ms: int) -> Unit[None]:
    """The first of those behind is next, unless another one is."""
    yield from query(
        "UPDATE queue SET place = 1, due_ms = ?2 WHERE number ="
        " (SELECT min(number) FROM queue WHERE payer_account_id = ?1 AND place = 0)"
        " AND NOT EXISTS (SELECT 1 FROM queue WHERE payer_account_id = ?1 AND place = 1)",
        payer_account_id,
        now_ms,
    )


def _step_aside(application: Application, now_ms: int, aside_ms: int) -> Unit[None]:
    yield from query(
        "UPDATE queue SET place = 2, due_ms = ? WHERE application_id = ?",
        now_ms + aside_ms,
        application.application_id,
    )
    yield from _advance(application.payer_account_id, now_ms)


def _row(row: Row) -> ApplicationRow:
    message = Application.FromString(row[0])
    message.attempts, message.last_attempt_error = row[4:]
    return ApplicationRow(message, *row[1:4])


def _shared(application: Application) -> bytes:
    """What is the same of it at all centers."""
    shared = Application()
    shared.CopyFrom(application)
    shared.ClearField("attempts")
    shared.ClearField("last_attempt_error")
    return shared.SerializeToString(deterministic=True)


def _insert(application: Application, body_hash: bytes, traceparent: str) -> Unit[None]:
    yield from query(
        "INSERT INTO application VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?,"
        " (SELECT coalesce(max(change_number), 0) + 1 FROM application), ?)",
        application.application_id,
        application.payer_account_id,
        application.transfer_id,
        application.origin_center,
        body_hash,
        application.state,
        application.create_time.ToMilliseconds(),
        _shared(application),
        application.attempts,
        application.last_attempt_error,
        traceparent,
    )


def _store(application: Application) -> Unit[None]:
    yield from query(
        "UPDATE application SET state = ?, message = ?, attempts = ?, last_attempt_error = ?,"
        " change_number = (SELECT max(change_number) + 1 FROM application)"
        " WHERE application_id = ?",
        application.state,
        _shared(application),
        application.attempts,
        application.last_attempt_error,
        application.application_id,
    )


def _tell(application: Application, body_hash: bytes, stamp: Stamp) -> Unit[None]:
    changed = ApplicationChanged(application=application, body_hash=body_hash)
    yield from log.append(APPLICATIONS, stamp, LogRecord(application_changed=changed))


def _put(row: Row) -> Unit[None]:
    """A row of a snapshot. What only the origin needs begins anew."""
    yield from copy(Application.FromString(row[7]), row[4])


APPLICATIONS = Topic(
    "applications",
    Road.JETSTREAM,
    (
        CopiedTable(
            "application",
            columns(
                "application_id payer_account_id transfer_id origin body_hash state create_ms"
                " message"
            ),
            keys=1,
            owner="origin",
            version=lambda row: progress(row[5]),
            put=_put,
        ),
    ),
)
