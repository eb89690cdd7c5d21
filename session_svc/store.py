"""The sessions this center made, and the units on them."""

from hashlib import sha256
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import LogRecord, SessionsRevoked
from runtime.store import Unit, query
from sync_bus import log
from sync_bus.log import Road, Stamp, Topic

REVOCATIONS = Topic("revocations", Road.JETSTREAM)
TOPICS = (REVOCATIONS,)

SCHEMA = """
CREATE TABLE IF NOT EXISTS session (
  token_hash BLOB NOT NULL PRIMARY KEY, session_id TEXT NOT NULL UNIQUE, account_id TEXT NOT NULL,
  device TEXT NOT NULL, hlc INTEGER NOT NULL, create_ms INTEGER NOT NULL, expire_ms INTEGER NOT NULL
  ) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS session_by_account ON session (account_id);
CREATE INDEX IF NOT EXISTS session_by_expiry ON session (expire_ms);
"""

EXPIRED_AT_ONCE_MAX = 100


class SessionRow(NamedTuple):
    session_id: str
    account_id: str
    device: str
    create_ms: int
    expire_ms: int


def token_hash(token: str) -> bytes:
    """How a token is stored: it is 256 random bits, so a plain hash cannot be reversed or guessed."""
    return sha256(token.encode()).digest()


def add(hashed: bytes, session: SessionRow, stamp: Stamp) -> Unit[None]:
    """Stores a new session, and forgets some that have expired."""
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
        " WHERE account_id = ? AND expire_ms > ? ORDER BY create_ms DESC LIMIT 100",
        account_id,
        now_ms,
    )
    return [SessionRow(*row) for row in rows]


def remove(hashed: bytes) -> Unit[None]:
    yield from query("DELETE FROM session WHERE token_hash = ?", hashed)


def revoke_all(account_id: str, stamp: Stamp) -> Unit[int]:
    """Ends the account's sessions here and tells the other centers; returns how many ended here."""
    revoked = yield from _remove_before(account_id, stamp.hlc)
    record = LogRecord(sessions_revoked=SessionsRevoked(account_id=account_id))
    yield from log.append(REVOCATIONS, stamp, record)
    return revoked


def apply(_source: str, record: LogRecord, _stamp: Stamp) -> Unit[None]:
    """The effect of another center's log record."""
    if record.WhichOneof("body") != "sessions_revoked":
        raise ValueError("not a record of this service")
    yield from _remove_before(record.sessions_revoked.account_id, record.hlc)


def counts(now_ms: int) -> Unit[dict[str, int]]:
    rows = yield from query("SELECT count(*) FROM session WHERE expire_ms > ?", now_ms)
    return {"sessions": rows[0][0]}


def _remove_before(account_id: str, hlc: int) -> Unit[int]:
    rows = yield from query(
        "DELETE FROM session WHERE account_id = ? AND hlc < ? RETURNING 1", account_id, hlc
    )
    return len(rows)
