"""Notifications: what a user is told, once per end of an application, and how far each channel is with it.

The row is written in the same unit as the decision, at the application's origin alone, and what is said
is fixed in it: however often it is sent, it is the same text with the same id. Rows stay at the origin. One
that lost its disk makes them again from its applications (`of_restored`): at least once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from duohuo.v1.operator_service_pb2 import (
    CHANNEL_EMAIL,
    CHANNEL_WEBHOOK,
    DELIVERY_STATE_DEAD,
    DELIVERY_STATE_DELIVERED,
    DELIVERY_STATE_DROPPED,
    DELIVERY_STATE_UNWANTED,
    DELIVERY_STATE_WAITING,
    Channel,
    Delivery,
    DeliveryState,
)
from duohuo.v1.transfer_service_pb2 import Application, ApplicationState
from runtime.clock import iso, milliseconds, timestamp
from runtime.store import Row, Unit, query
from sync_bus.log import Stamp

SCHEMA = """
CREATE TABLE IF NOT EXISTS notification (
  notification_id TEXT NOT NULL PRIMARY KEY, kind TEXT NOT NULL, subject_id TEXT NOT NULL,
  account_id TEXT NOT NULL, body TEXT NOT NULL, create_ms INTEGER NOT NULL,
  traceparent TEXT NOT NULL, UNIQUE (kind, subject_id)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS delivery (
  notification_id TEXT NOT NULL REFERENCES notification, channel INTEGER NOT NULL,
  account_id TEXT NOT NULL, state INTEGER NOT NULL, attempts INTEGER NOT NULL,
  next_attempt_ms INTEGER NOT NULL, last_error TEXT NOT NULL, end_ms INTEGER,
  PRIMARY KEY (notification_id, channel)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS notification_by_subject ON notification (subject_id);
CREATE INDEX IF NOT EXISTS delivery_due ON delivery (channel, next_attempt_ms) WHERE state = 1;
CREATE INDEX IF NOT EXISTS delivery_dead ON delivery (notification_id) WHERE state = 4;
"""

APPLICATION_DECIDED = "application.decided"
CHANNELS = (CHANNEL_WEBHOOK, CHANNEL_EMAIL)
LISTED_MAX = 1000
RESTORED_AGE_MS_MAX = 7 * 86_400_000
"""How old an end may be to be told again by an origin that lost its disk. Longer than deliveries are
tried for (`notifier`), so that what had not arrived is among them; users are spared everything older."""

_W = DELIVERY_STATE_WAITING
FOLLOWS: Mapping[DeliveryState.ValueType, Sequence[DeliveryState.ValueType]] = {
    DELIVERY_STATE_DELIVERED: (_W,),
    DELIVERY_STATE_UNWANTED: (_W,),
    DELIVERY_STATE_DEAD: (_W,),
    DELIVERY_STATE_DROPPED: (_W, DELIVERY_STATE_DEAD),
    _W: (DELIVERY_STATE_DEAD,),
}
"""The one state machine of a delivery: each state, and those that it may follow."""


class Due(NamedTuple):
    """A delivery to be tried now."""

    notification_id: str
    channel: Channel.ValueType
    account_id: str
    attempts: int
    body: str
    traceparent: str


def notification_id(application_id: str) -> str:
    """What receivers deduplicate by: whoever tells of this application's end uses this id."""
    return f"decided-{application_id}"


def body(application: Application) -> str:
    """What is said: JSON, with nothing in it but what the payer may see."""
    return json.dumps(
        {
            "id": notification_id(application.application_id),
            "type": APPLICATION_DECIDED,
            "application_id": application.application_id,
            "transfer_id": application.transfer_id,
            "state": ApplicationState.Name(application.state).removeprefix("APPLICATION_STATE_"),
            "reason": application.reason,
            "amount": {
                "currency_code": application.amount.currency_code,
                "minor_units": application.amount.minor_units,
            },
            "time": iso(milliseconds(application.decide_time)),
        }
    )


def note(application: Application, stamp: Stamp) -> Unit[None]:
    """Notes that a user is to be told of this end of an application; noting it again changes nothing."""
    noted = notification_id(application.application_id)
    rows = yield from query(
        "INSERT INTO notification VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING 1",
        noted,
        APPLICATION_DECIDED,
        application.application_id,
        application.payer_account_id,
        body(application),
        stamp.time_ms,
        stamp.traceparent,
    )
    for channel in CHANNELS if rows else ():
        yield from query(
            "INSERT INTO delivery VALUES (?, ?, ?, ?, 0, ?, '', NULL)",
            noted,
            channel,
            application.payer_account_id,
            DELIVERY_STATE_WAITING,
            stamp.time_ms,
        )


def of_restored(origin: str, stamp: Stamp, limit: int) -> Unit[int]:
    """Notes the ends of applications of this origin that came back without their notifications."""
    rows = yield from query(
        "SELECT message FROM application WHERE origin = ? AND state NOT IN (1, 2, 7) AND NOT EXISTS"
        " (SELECT 1 FROM notification WHERE kind = ? AND subject_id = application_id) LIMIT ?",
        origin,
        APPLICATION_DECIDED,
        limit,
    )
    for row in rows:
        application = Application.FromString(row[0])
        yield from note(application, stamp)
        age_ms = stamp.time_ms - milliseconds(application.decide_time)
        if age_ms > RESTORED_AGE_MS_MAX:
            noted = notification_id(application.application_id)
            for channel in CHANNELS:
                yield from finish(noted, channel, DELIVERY_STATE_DROPPED, stamp.time_ms, "TOO_OLD")
    return len(rows)


def due(channel: Channel.ValueType, now_ms: int, limit: int) -> Unit[list[Due]]:
    """Deliveries of a channel that are due, one of each account, those that wait longest first."""
    rows = yield from query(
        "SELECT notification_id, channel, d.account_id, attempts, body, traceparent FROM"
        " (SELECT notification_id, channel, account_id, attempts, min(next_attempt_ms) AS since_ms"
        " FROM delivery WHERE state = 1 AND channel = ? AND next_attempt_ms <= ?"
        " GROUP BY account_id ORDER BY since_ms, notification_id LIMIT ?) d"
        " JOIN notification USING (notification_id) ORDER BY since_ms, notification_id",
        channel,
        now_ms,
        limit,
    )
    return [Due(*row) for row in rows]


def reschedule(now_ms: int, first_ms: int, longest_ms: int, postponed_ms: int) -> Unit[None]:
    """Makes due now what waits longer than any delay can be: it was scheduled before the clock was set
    back."""
    yield from query(
        "UPDATE delivery SET next_attempt_ms = ?1 WHERE state = 1"
        " AND next_attempt_ms > ?1 + max(?4, min(?2 << attempts, ?3))",
        now_ms,
        first_ms,
        longest_ms,
        postponed_ms,
    )


def next_due_ms(channel: Channel.ValueType, now_ms: int) -> Unit[int | None]:
    """When the next delivery of a channel will be due that is not due now."""
    rows = yield from query(
        "SELECT min(next_attempt_ms) FROM delivery WHERE state = 1 AND channel = ?"
        " AND next_attempt_ms > ?",
        channel,
        now_ms,
    )
    due_ms: int | None = rows[0][0]
    return due_ms


def finish(
    noted: str,
    channel: Channel.ValueType,
    state: DeliveryState.ValueType,
    end_ms: int | None,
    error: str = "",
) -> Unit[bool]:
    """Moves a delivery to a state, if the table allows it; says whether it did. It ends with that, but in
    WAITING."""
    allowed = FOLLOWS[state]
    rows = yield from query(
        "UPDATE delivery SET state = ?1, last_error = ?2, end_ms = ?7 WHERE notification_id = ?3"
        " AND channel = ?4 AND state IN (?5, ?6) RETURNING 1",
        state,
        error,
        noted,
        channel,
        allowed[0],
        allowed[-1],
        end_ms,
    )
    return bool(rows)


def failed(
    noted: str, channel: Channel.ValueType, attempts: int, error: str, next_attempt_ms: int
) -> Unit[None]:
    """Notes why a delivery did not succeed, and when it is tried again."""
    yield from query(
        "UPDATE delivery SET attempts = ?, last_error = ?, next_attempt_ms = ?"
        " WHERE notification_id = ? AND channel = ? AND state = 1",
        attempts,
        error,
        next_attempt_ms,
        noted,
        channel,
    )


def wake(error: str, now_ms: int) -> Unit[None]:
    """Makes what waits for this reason due now."""
    yield from query(
        "UPDATE delivery SET next_attempt_ms = ?1 WHERE state = 1 AND last_error = ?2"
        " AND next_attempt_ms > ?1",
        now_ms,
        error,
    )


def undelivered() -> Unit[list[Delivery]]:
    """Dead letters, then what waits after a failure; of each the oldest first."""
    dead = yield from _select("state = 4")
    waiting = yield from _select("state = 1 AND last_error <> ''")
    return dead + waiting


def retry(noted: str, now_ms: int) -> Unit[list[Delivery]]:
    """Dead letters of one notification, or of all if empty, wait again as if never tried."""
    done = []
    for one in (yield from _select("state = 4 AND (?1 = '' OR notification_id = ?1)", noted)):
        yield from finish(one.notification_id, one.channel, DELIVERY_STATE_WAITING, None)
        yield from failed(one.notification_id, one.channel, 0, "", now_ms)
        done += yield from _of(one.notification_id, one.channel)
    return done


def drop(noted: str, now_ms: int) -> Unit[list[Delivery]]:
    """Gives up what is not delivered of a notification."""
    done = []
    for one in (yield from _select("state IN (1, 4) AND notification_id = ?1", noted)):
        yield from finish(
            one.notification_id, one.channel, DELIVERY_STATE_DROPPED, now_ms, one.last_error
        )
        done += yield from _of(one.notification_id, one.channel)
    return done


def of_subject(subject_id: str) -> Unit[list[Delivery]]:
    """How each channel is with what is told of an application."""
    return (yield from _select("subject_id = ?1", subject_id))


def counts() -> Unit[dict[str, int]]:
    """For `duohuo status`."""
    rows = yield from query(
        "SELECT (SELECT count(*) FROM delivery WHERE state = 1),"
        " (SELECT count(*) FROM delivery WHERE state = 4)"
    )
    return {"notifications_waiting": rows[0][0], "notifications_dead": rows[0][1]}


def _of(noted: str, channel: Channel.ValueType) -> Unit[list[Delivery]]:
    return (yield from _select("notification_id = ?1 AND channel = ?2", noted, channel))


def _select(where: str, *values: str | int) -> Unit[list[Delivery]]:
    sql = (
        "SELECT notification_id, channel, state, d.account_id, subject_id, attempts, last_error,"  # noqa: S608 - constants
        " create_ms, next_attempt_ms, end_ms FROM delivery d JOIN notification n USING (notification_id)"
        f" WHERE {where} ORDER BY create_ms, 1, 2 LIMIT {LISTED_MAX}"
    )
    rows = yield from query(sql, *values)
    return [_delivery(row) for row in rows]


def _delivery(row: Row) -> Delivery:
    found = Delivery(
        notification_id=row[0],
        channel=row[1],
        state=row[2],
        account_id=row[3],
        subject_id=row[4],
        attempts=row[5],
        last_error=row[6],
        create_time=timestamp(row[7]),
    )
    if found.state == DELIVERY_STATE_WAITING:
        found.next_attempt_time.CopyFrom(timestamp(row[8]))
    if row[9] is not None:
        found.end_time.CopyFrom(timestamp(row[9]))
    return found
