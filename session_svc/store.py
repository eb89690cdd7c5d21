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
  device TEXT NOT NULL, hlc INTEGER NOT NULL, create_ms INTEGER NOT NULL, expire_ms INTEGER NOT NULL,
  last_use_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS session_by_account ON session (account_id);
CREATE INDEX IF NOT EXISTS session_by_expiry ON session (expire_ms);
CREATE TABLE IF NOT EXISTS revocation (
  account_id TEXT NOT NULL, center TEXT NOT NULL, hlc INTEGER NOT NULL,
  kept_session_id TEXT NOT NULL,
  PRIMARY KEY (account_id, center)) STRICT, WITHOUT ROWID;
"""
"""`revocation`: for each account, the last revocation by each center. All sessions of the account made
before are over, also one that is not stored yet, but for the one that is kept."""

EXPIRED_AT_ONCE_MAX = 100
SESSIONS_MAX = 100
"""Of one account at one center. A new one ends the oldest."""


class SessionRow(NamedTuple):
    session_id: str
    account_id: str
    device: str
    create_ms: int
    expire_ms: int
    last_use_ms: int


_COLUMNS = ", ".join(SessionRow._fields)


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
    if (yield from is_revoked(session, stamp.hlc)):
        return
    yield from query(
        "INSERT INTO session VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        hashed,
        session.session_id,
        session.account_id,
        session.device,
        stamp.hlc,
        session.create_ms,
        session.expire_ms,
        session.last_use_ms,
    )
    yield from query(
        "DELETE FROM session WHERE token_hash IN (SELECT token_hash FROM session"
        " WHERE account_id = ? ORDER BY create_ms DESC, session_id DESC LIMIT -1 OFFSET ?)",
        session.account_id,
        SESSIONS_MAX,
    )
    yield from query(
        "DELETE FROM session WHERE token_hash IN"
        " (SELECT token_hash FROM session WHERE expire_ms <= ? LIMIT ?)",
        session.create_ms,
        EXPIRED_AT_ONCE_MAX,
    )


def latest_hlc() -> Unit[int]:
    """The highest stamp of a session, which no log tells of; revocations must have later ones."""
    rows = yield from query("SELECT coalesce(max(hlc), 0) FROM session")
    return int(rows[0][0])


def add_all(sessions: Sequence[NewSession]) -> Unit[None]:
    """The same for sessions that had to wait."""
    for session in sessions:
        yield from add(*session)


def find(hashed: bytes) -> Unit[SessionRow | None]:
    """The session behind a token, if that has not been ended. It may have expired."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM session WHERE token_hash = ?",  # noqa: S608 - constant names
        hashed,
    )
    return SessionRow(*rows[0]) if rows else None


def of_account(account_id: str) -> Unit[list[SessionRow]]:
    """The account's sessions, newest first. Some may have expired."""
    rows = yield from query(
        f"SELECT {_COLUMNS} FROM session WHERE account_id = ?"  # noqa: S608 - constant names
        " ORDER BY create_ms DESC LIMIT ?",
        account_id,
        SESSIONS_MAX,
    )
    return [SessionRow(*row) for row in rows]


def note_use(hashed: bytes, now_ms: int) -> Unit[None]:
    yield from query(
        "UPDATE session SET last_use_ms = ?1 WHERE token_hash = ?2 AND last_use_ms < ?1",
        now_ms,
        hashed,
    )


def end(account_id: str, session_id: str) -> Unit[None]:
    """Ends a session by its name."""
    yield from query(
        "DELETE FROM session WHERE session_id = ? AND account_id = ?", session_id, account_id
    )


def remove(hashed: bytes) -> Unit[None]:
    yield from query("DELETE FROM session WHERE token_hash = ?", hashed)


def is_revoked(session: SessionRow, hlc: int) -> Unit[bool]:
    """Has any center ended the account's sessions of that time, this one among them?"""
    rows = yield from query(
        "SELECT 1 FROM revocation WHERE account_id = ? AND hlc > ? AND kept_session_id <> ? LIMIT 1",
        session.account_id,
        hlc,
        session.session_id,
    )
    return bool(rows)


def revoke_all(here: str, account_id: str, stamp: Stamp, kept_session_id: str = "") -> Unit[int]:
    """Ends the account's sessions here, but for one, and tells the other centers; returns how many ended
    here."""
    revoked = yield from revoke(account_id, here, stamp.hlc, kept_session_id)
    revocation = SessionsRevoked(account_id=account_id, kept_session_id=kept_session_id)
    yield from log.append(REVOCATIONS, stamp, LogRecord(sessions_revoked=revocation))
    return revoked


def apply(source: str, record: LogRecord, _stamp: Stamp) -> Unit[None]:
    """The effect of another center's log record."""
    if record.WhichOneof("body") != "sessions_revoked":
        raise ValueError("not a record of this service")
    revoked = record.sessions_revoked
    yield from revoke(revoked.account_id, source, record.hlc, revoked.kept_session_id)


def revoke(account_id: str, center: str, hlc: int, kept_session_id: str) -> Unit[int]:
    """Ends the account's sessions made before a revocation by a center, stored or still to come, but for
    one.

    Returns how many were stored. Repeating it, or an older one after it, revokes nothing anew.
    """
    yield from query(
        "INSERT INTO revocation VALUES (?, ?, ?, ?) ON CONFLICT (account_id, center) DO UPDATE SET"
        " hlc = excluded.hlc, kept_session_id = excluded.kept_session_id WHERE excluded.hlc > hlc",
        account_id,
        center,
        hlc,
        kept_session_id,
    )
    rows = yield from query(
        "DELETE FROM session WHERE account_id = ? AND hlc < ? AND session_id <> ? RETURNING 1",
        account_id,
        hlc,
        kept_session_id,
    )
    return len(rows)


def counts(now_ms: int, used_after_ms: int) -> Unit[dict[str, int]]:
    rows = yield from query(
        "SELECT count(*) FROM session WHERE expire_ms > ? AND last_use_ms > ?",
        now_ms,
        used_after_ms,
    )
    return {"sessions": rows[0][0]}


def _put(row: Row) -> Unit[None]:
    yield from revoke(*row)


REVOCATIONS = Topic(
    "revocations",
    Road.JETSTREAM,
    (
        CopiedTable(
            "revocation",
            ("account_id", "center", "hlc", "kept_session_id"),
            keys=2,
            owner="center",
            version=lambda row: row[2],
            put=_put,
        ),
    ),
)
TOPICS = (REVOCATIONS,)
