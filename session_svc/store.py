"""The sessions this center made, and the units on them."""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import LogRecord, SessionsRevoked
from runtime.store import Row, Unit, query
from sync_bus import log
from sync_bus.copies import CopiedTable
from sync_bus.log import Road, Stamp, Topic

SCHEMA = """
CREATE TABLE IF NOT EXISTS session (
  token_hash BLOB NOT NULL PRIMARY KEY, session_id TEXT NOT NULL UNIQUE, account_id TEXT NOT NULL,
  device TEXT NOT NULL, hlc INTEGER NOT NULL, create_ms INTEGER NOT NULL, expire_ms INTEGER NOT NULL
  ) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS session_by_account ON session (account_id);
CREATE INDEX IF NOT EXISTS session_by_expiry ON session (expire_ms);
CREATE TABLE IF NOT EXISTS revocation (
  account_id TEXT NOT NULL, center TEXT NOT NULL, hlc INTEGER NOT NULL,
  PRIMARY KEY (account_id, center)) STRICT, WITHOUT ROWID;
"""
"""`revocation`: for each account, the last revocation by each center. All sessions of the account made
before are over, also one that is not stored yet."""

EXPIRED_AT_ONCE_MAX = 100
LISTED_MAX = 100


class SessionRow(NamedTuple):
    session_id: str
    account_id: str
    device: str
    create_ms: int
    expire_ms: int


def token_hash(token: str) -> bytes:
    """How a token is stored: it is 256 random bits, so a plain hash cannot be reversed or guessed."""
    return sha256(token.encode()).digest()


class NewSession(NamedTuple):
    """A session as it was made: what is stored of its token, what its user sees, and when."""

    hashed: bytes
    row: SessionRow
    stamp: Stamp


def add(hashed: bytes, session: SessionRow, stamp: Stamp) -> Unit[None]:
    """Stores a new session, unless it has been revoked, and forgets some that have expired."""
    if (yield from is_revoked(session.account_id, stamp.hlc)):
        return
    yield from query(
        "INSERT INTO session VALUES (?, ?, ?, ?, ?, ?, ?)",
        hashed,
        session.session_id,
        session.account_id,
        session.device,
        stamp.hlc,
        session.create_ms,
        session.expire_ms,
    )
    yield from query(
        "DELETE FROM session WHERE token_hash IN"
        " (SELECT token_hash FROM session WHERE expire_ms <= ? LIMIT ?)",
        stamp.time_ms,
        EXPIRED_AT_ONCE_MAX,
    )


def add_all(sessions: Sequence[NewSession]) -> Unit[None]:
    """The same for sessions that had to wait."""
    for session in sessions:
        yield from add(*session)


def find(hashed: bytes, now_ms: int) -> Unit[SessionRow | None]:
    rows = yield from query(
        "SELECT session_id, account_id, device, create_ms, expire_ms FROM session"
        " WHERE token_hash = ? AND expire_ms > ?",
        hashed,
        now_ms,
    )
    return SessionRow(*rows[0]) if rows else None


def of_account(account_id: str, now_ms: int) -> Unit[list[SessionRow]]:
    rows = yield from query(
        "SELECT session_id, account_id, device, create_ms, expire_ms FROM session"
        " WHERE account_id = ? AND expire_ms > ? ORDER BY create_ms DESC LIMIT ?",
        account_id,
        now_ms,
        LISTED_MAX,
    )
    return [SessionRow(*row) for row in rows]


def remove(hashed: bytes) -> Unit[None]:
    yield from query("DELETE FROM session WHERE token_hash = ?", hashed)


def is_revoked(account_id: str, hlc: int) -> Unit[bool]:
    """Has any center ended the account's sessions of that time?"""
    rows = yield from query(
        "SELECT 1 FROM revocation WHERE account_id = ? AND hlc > ? LIMIT 1", account_id, hlc
    )
    return bool(rows)


def revoke_all(here: str, account_id: str, stamp: Stamp) -> Unit[int]:
    """Ends the account's sessions here and tells the other centers; returns how many ended here."""
    revoked = yield from revoke(account_id, here, stamp.hlc)
    record = LogRecord(sessions_revoked=SessionsRevoked(account_id=account_id))
    yield from log.append(REVOCATIONS, stamp, record)
    return revoked


def apply(source: str, record: LogRecord, _stamp: Stamp) -> Unit[None]:
    """The effect of another center's log record."""
    if record.WhichOneof("body") != "sessions_revoked":
        raise ValueError("not a record of this service")
    yield from revoke(record.sessions_revoked.account_id, source, record.hlc)


def revoke(account_id: str, center: str, hlc: int) -> Unit[int]:
    """Ends the account's sessions made before a revocation by a center, stored or still to come.

    Returns how many were stored. Repeating it, or an older one after it, revokes nothing anew.
    """
    yield from query(
        "INSERT INTO revocation VALUES (?, ?, ?) ON CONFLICT (account_id, center)"
        " DO UPDATE SET hlc = excluded.hlc WHERE excluded.hlc > hlc",
        account_id,
        center,
        hlc,
    )
    rows = yield from query(
        "DELETE FROM session WHERE account_id = ? AND hlc < ? RETURNING 1", account_id, hlc
    )
    return len(rows)


def counts(now_ms: int) -> Unit[dict[str, int]]:
    rows = yield from query("SELECT count(*) FROM session WHERE expire_ms > ?", now_ms)
    return {"sessions": rows[0][0]}


def _put(row: Row) -> Unit[None]:
    yield from revoke(*row)


REVOCATIONS = Topic(
    "revocations",
    Road.JETSTREAM,
    (
        CopiedTable(
            "revocation",
            ("account_id", "center", "hlc"),
            keys=2,
            owner="center",
            version=lambda row: row[2],
            put=_put,
        ),
    ),
)
TOPICS = (REVOCATIONS,)
