"""Applications: queued transfers, at the center that accepted them and as copies everywhere else.

The origin alone moves an application through its states, by what home decided; each change of state
goes to the other centers over the log. Cancelled and expired are decisions of home's too: the same
transfer may be queued at two centers, and only home can promise that it never runs.

The stored message is the same at all centers: attempts are the origin's own, in columns beside it.
"""

from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import ApplicationChanged, LogRecord
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_QUEUED,
    Application,
    TransferState,
)
from runtime.clock import timestamp
from runtime.store import Row, Unit, query
from sync_bus import log
from sync_bus.copies import CopiedTable, columns
from sync_bus.log import Road, Stamp, Topic
from transfer_svc import notifications
from transfer_svc.states import APPLICATION_OPEN, Decision, follows, next_application_state

SCHEMA = """
CREATE TABLE IF NOT EXISTS application (
  application_id TEXT NOT NULL PRIMARY KEY, payer_account_id TEXT NOT NULL,
  transfer_id TEXT NOT NULL, origin TEXT NOT NULL, body_hash BLOB NOT NULL, state INTEGER NOT NULL,
  create_ms INTEGER NOT NULL, message BLOB NOT NULL, next_attempt_ms INTEGER NOT NULL,
  attempts INTEGER NOT NULL, last_attempt_error TEXT NOT NULL,
  change_number INTEGER NOT NULL UNIQUE, traceparent TEXT NOT NULL,
  UNIQUE (payer_account_id, transfer_id, origin)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS application_due ON application (next_attempt_ms) WHERE state = 1;
CREATE INDEX IF NOT EXISTS application_open ON application (payer_account_id, transfer_id)
  WHERE state IN (1, 2);
CREATE INDEX IF NOT EXISTS application_by_payer ON application (payer_account_id, change_number);
"""


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
    rows = yield from query(f"{_SELECT} WHERE application_id = ?", application_id)
    return _row(rows[0]) if rows else None


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


def accept(application: Application, body_hash: bytes, stamp: Stamp) -> Unit[ApplicationRow]:
    """Queues an application; if its transfer id was applied for here before, returns that one."""
    present = yield from applied_for(
        application.payer_account_id, application.transfer_id, application.origin_center
    )
    if present is not None:
        return present
    yield from _insert(application, body_hash, stamp.time_ms, stamp.traceparent)
    yield from _tell(application, body_hash, stamp)
    found = yield from find(application.application_id)
    assert found is not None  # noqa: S101 - inserted above, in this transaction
    return found


def due(origin: str, now_ms: int, delay_ms_max: int, limit: int) -> Unit[list[ApplicationRow]]:
    """Queued applications whose next attempt is due. One due later than the longest delay was
    scheduled before the clock jumped, and is due now."""
    rows = yield from query(
        f"{_SELECT} WHERE state = 1 AND (next_attempt_ms <= ?1 OR next_attempt_ms > ?1 + ?2)"
        " AND origin = ?3 ORDER BY next_attempt_ms LIMIT ?4",
        now_ms,
        delay_ms_max,
        origin,
        limit,
    )
    return [_row(row) for row in rows]


def next_due_ms(origin: str) -> Unit[int | None]:
    """When the earliest next attempt is due; None if nothing is queued."""
    rows = yield from query(
        "SELECT min(next_attempt_ms) FROM application WHERE state = 1 AND origin = ?", origin
    )
    due_ms: int | None = rows[0][0]
    return due_ms


def wake(origin: str, now_ms: int) -> Unit[None]:
    """Makes everything queued due now: a home center is back."""
    yield from query(
        "UPDATE application SET next_attempt_ms = ?1 WHERE state = 1 AND origin = ?2"
        " AND next_attempt_ms > ?1",
        now_ms,
        origin,
    )


def attempted(application_id: str, error: str, next_attempt_ms: int) -> Unit[None]:
    """Counts an attempt that brought no decision, with its reason, and sets when the next is due."""
    found = yield from find(application_id)
    if found is None or found.message.state != APPLICATION_STATE_QUEUED:
        return
    found.message.attempts += 1
    found.message.last_attempt_error = error
    yield from _store(found.message)
    yield from query(
        "UPDATE application SET next_attempt_ms = ? WHERE application_id = ?",
        next_attempt_ms,
        application_id,
    )


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
    if message.state == APPLICATION_STATE_QUEUED:
        message.attempts += 1  # the one that brought the decision
    message.state = state
    message.reason = reason
    message.last_attempt_error = ""
    if payee_account_id:
        message.payee_account_id = payee_account_id
    if state not in APPLICATION_OPEN:
        message.decide_time.CopyFrom(timestamp(stamp.time_ms))
        yield from notifications.note(message, stamp)
    yield from _store(message)
    yield from _tell(message, found.body_hash, stamp)
    return message


def waiting_for(
    payer_account_id: str, transfer_id: str, body_hash: bytes, origin: str
) -> Unit[list[str]]:
    """Ids of this origin's open applications for a transfer of this body."""
    rows = yield from query(
        "SELECT application_id FROM application WHERE payer_account_id = ? AND transfer_id = ?"
        " AND body_hash = ? AND origin = ? AND state IN (1, 2)",
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
        " WHERE application.state IN (1, 2) AND origin = ? AND transfer.state <> 2 LIMIT ?",
        origin,
        limit,
    )
    return [(row[0], row[1], row[2]) for row in rows]


def copy(application: Application, body_hash: bytes) -> Unit[None]:
    """Stores another center's application, unless its later state is here already."""
    present = yield from find(application.application_id)
    if present is None:
        yield from _insert(application, body_hash, 0, "")
    elif follows(application.state, present.message.state):
        yield from _store(application)


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
    rows = yield from query("SELECT count(*) FROM application WHERE state IN (1, 2)")
    return int(rows[0][0])


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


def _insert(
    application: Application, body_hash: bytes, next_attempt_ms: int, traceparent: str
) -> Unit[None]:
    yield from query(
        "INSERT INTO application VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?,"
        " (SELECT coalesce(max(change_number), 0) + 1 FROM application), ?)",
        application.application_id,
        application.payer_account_id,
        application.transfer_id,
        application.origin_center,
        body_hash,
        application.state,
        application.create_time.ToMilliseconds(),
        _shared(application),
        next_attempt_ms,
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
            version=lambda row: row[5],
            put=_put,
        ),
    ),
)
