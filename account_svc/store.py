"""Accounts, credentials and profiles: the tables, and the units that keep their promises.

Every change goes with its log entry. Passwords and profile fields carry the version that wrote them;
a write that loses to a newer version changes nothing but the history.

Each write is noted with its request id and what it was asked to do, so that it is done once, wherever it is
asked for again, and another write of the same id is a conflict. These notes alone are ever forgotten, after
`rules.REQUESTS_KEPT_MS`; see docs/idempotency.md.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import NamedTuple

from account_svc import announcement, erasure, notification, registry, revoker
from account_svc.notification import Setting
from account_svc.revoker import Due
from duohuo.internal.v1.log_pb2 import (
    AccountCreated,
    AccountErased,
    CredentialChanged,
    CredentialRenewed,
    LogRecord,
    NotificationChanged,
    ProfileChanged,
    RequestsForgotten,
)
from runtime.placement import slot_of
from runtime.store import Row, Unit, query
from sync_bus import audit, homes, log
from sync_bus.copies import CopiedTable
from sync_bus.log import Road, Stamp, Topic
from sync_bus.merge import Version, wins

SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS credential (
  account_id TEXT NOT NULL PRIMARY KEY, password_hash TEXT NOT NULL,
  hlc INTEGER NOT NULL, center TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS profile_field (
  account_id TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
  hlc INTEGER NOT NULL, center TEXT NOT NULL, PRIMARY KEY (account_id, name)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS profile_identifier ON profile_field (name)
  WHERE name > 'identifier ' AND name < 'identifier!';
CREATE TABLE IF NOT EXISTS history (
  account_id TEXT NOT NULL, name TEXT NOT NULL, hlc INTEGER NOT NULL, center TEXT NOT NULL,
  value TEXT NOT NULL, PRIMARY KEY (account_id, name, hlc, center)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS request (
  account_id TEXT NOT NULL, request_id TEXT NOT NULL, time_ms INTEGER NOT NULL, center TEXT NOT NULL,
  body BLOB NOT NULL, PRIMARY KEY (account_id, request_id)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS request_by_time ON request (center, time_ms);
"""
    + homes.SCHEMA
    + registry.SCHEMA
    + erasure.SCHEMA
    + notification.SCHEMA
    + announcement.SCHEMA
    + revoker.SCHEMA
)


PASSWORD = "password"  # noqa: S105 - how the history calls that field
PASSWORD_WITHHELD = "withheld"  # noqa: S105 - what the history keeps instead of a password hash


class Credential(NamedTuple):
    account_id: str
    password_hash: str
    version: Version


class FieldVersion(NamedTuple):
    """One write of a profile field or of the password, whose value is withheld."""

    name: str
    value: str
    version: Version
    present: bool


def find_credential(account_id: str) -> Unit[Credential | None]:
    rows = yield from query(
        "SELECT account_id, password_hash, hlc, center FROM credential WHERE account_id = ?",
        account_id,
    )
    return Credential(rows[0][0], rows[0][1], Version(*rows[0][2:])) if rows else None


def profile_fields(account_id: str) -> Unit[list[tuple[str, str]]]:
    rows = yield from query(
        "SELECT name, value FROM profile_field WHERE account_id = ? ORDER BY name", account_id
    )
    return [(name, value) for name, value in rows]


def versions(account_id: str) -> Unit[list[FieldVersion]]:
    """All writes of the account's fields and password that are kept, by field, the oldest first."""
    rows = yield from query(
        "SELECT name, value, hlc, center, 1 FROM profile_field WHERE account_id = ?1"
        " UNION ALL SELECT ?2, ?3, hlc, center, 1 FROM credential"
        " WHERE account_id = ?1"
        " UNION ALL SELECT name, value, hlc, center, 0 FROM history WHERE account_id = ?1"
        " ORDER BY 1, 3, 4",
        account_id,
        PASSWORD,
        PASSWORD_WITHHELD,
    )
    return [FieldVersion(row[0], row[1], Version(*row[2:4]), bool(row[4])) for row in rows]


def register(
    account: registry.AccountRow, password_hash: str, fields: Mapping[str, str], stamp: Stamp
) -> Unit[bool]:
    """Makes the account unless its identifier belongs to one already.

    Only the identifier's home runs this, so the one transaction decides for all centers.
    """
    if (yield from registry.holder(account.identifier)) is not None:
        return False
    yield from query("INSERT INTO account VALUES (?, ?, ?, ?, ?)", *account)
    created = AccountCreated(
        account_id=account.account_id,
        identifier=account.identifier,
        request_id=account.request_id,
    )
    yield from log.append(registry.ACCOUNTS, stamp, LogRecord(account_created=created))
    request_id = account.request_id
    yield from set_password(account.account_id, password_hash, request_id, account.source, stamp)
    # A request id counts once per account: the profile's part of the same registration gets its own.
    yield from set_profile(
        account.account_id, fields, profile_part(request_id), account.source, stamp
    )
    return True


def profile_part(request_id: str) -> str:
    """The request id of a registration's profile."""
    return f"{request_id}:profile"


def body_of_fields(fields: Mapping[str, str]) -> bytes:
    """What the request id of a profile is bound to."""
    return sha256(repr(sorted(fields.items())).encode()).digest()


def body_of_setting(setting: Setting) -> bytes:
    """What the request id of a notification setting is bound to."""
    return sha256(repr(tuple(setting)).encode()).digest()


def body_of_password(version: Version) -> bytes:
    """What is noted of a password: which version it became. Nothing that is derived from it may be
    stored but its hash in `credential`; while that version stands there, passwords can be compared."""
    return repr(tuple(version)).encode()


def set_password(
    account_id: str,
    password_hash: str,
    request_id: str,
    center: str,
    stamp: Stamp,
    replaces: Version | None = None,
    kept_session_id: str | None = None,
) -> Unit[bool]:
    """Writes a password here, unless its request was seen before. All sessions of the account are to end,
    but for the one that is kept; none if that is None.

    False if the password that the caller proved to know (`replaces`) is no longer the present one.
    """
    yield from registry.require_present(account_id)
    if (yield from seen(account_id, request_id)) is not None:
        return True
    present = yield from find_credential(account_id)
    if replaces is not None and (present is None or present.version != replaces):
        return False
    version = Version(stamp.hlc, center)
    body = body_of_password(version)
    yield from _note_request(account_id, request_id, stamp.time_ms, center, body)
    yield from _merge_password(account_id, password_hash, version)
    if kept_session_id is not None:
        yield from revoker.note(Due(account_id, kept_session_id, stamp.hlc))
    changed = CredentialChanged(
        account_id=account_id, password_hash=password_hash, request_id=request_id
    )
    yield from log.append(CHANGES, stamp, LogRecord(credential_changed=changed))
    return True


def renew_hash(
    account_id: str, password_hash: str, renews: Version, center: str, stamp: Stamp
) -> Unit[bool]:
    """Stores another hash of the present password; False if that is no longer the one that is renewed.

    Its version is the next one after that password's: every change of the password since then, wherever
    it was made and whenever it arrives, still wins over it.
    """
    present = yield from find_credential(account_id)
    if present is None or present.version != renews:
        return False
    version = Version(renews.hlc + 1, center)
    yield from _merge_password(account_id, password_hash, version)
    renewed = CredentialRenewed(account_id=account_id, password_hash=password_hash, hlc=version.hlc)
    yield from log.append(CHANGES, stamp, LogRecord(credential_renewed=renewed))
    return True


def set_profile(
    account_id: str, fields: Mapping[str, str], request_id: str, center: str, stamp: Stamp
) -> Unit[bool]:
    """Writes profile fields here, unless their request was seen before; False if it was one to write
    something else."""
    yield from registry.require_present(account_id)
    body = body_of_fields(fields)
    before = yield from seen(account_id, request_id)
    if before is not None:
        return before == body
    yield from _note_request(account_id, request_id, stamp.time_ms, center, body)
    yield from _merge_fields(account_id, fields, Version(stamp.hlc, center))
    changed = ProfileChanged(account_id=account_id, fields=fields, request_id=request_id)
    yield from log.append(CHANGES, stamp, LogRecord(profile_changed=changed))
    return True


def set_notification(
    account_id: str, setting: Setting, request_id: str, center: str, stamp: Stamp
) -> Unit[bool]:
    """Writes the notification setting here, unless its request was seen before; False if it was one to
    write something else."""
    yield from registry.require_present(account_id)
    body = body_of_setting(setting)
    before = yield from seen(account_id, request_id)
    if before is not None:
        return before == body
    yield from _note_request(account_id, request_id, stamp.time_ms, center, body)
    yield from notification.merge(account_id, setting, Version(stamp.hlc, center))
    changed = NotificationChanged(account_id=account_id, request_id=request_id, **setting._asdict())
    yield from log.append(CHANGES, stamp, LogRecord(notification_changed=changed))
    return True


def seen(account_id: str, request_id: str) -> Unit[bytes | None]:
    """What this request did, if it was carried out, here or at a center whose log has arrived."""
    rows = yield from query(
        "SELECT body FROM request WHERE account_id = ? AND request_id = ?", account_id, request_id
    )
    return rows[0][0] if rows else None


def forget_requests(center: str, before_ms: int, limit: int, stamp: Stamp) -> Unit[int]:
    """Forgets about so many of this center's oldest requests that are older than a moment, here and,
    by an entry, everywhere; returns how many."""
    rows = yield from query(
        "SELECT time_ms FROM request WHERE center = ? AND time_ms < ? ORDER BY time_ms LIMIT ?",
        center,
        before_ms,
        limit,
    )
    if not rows:
        return 0
    forgotten = RequestsForgotten(before_ms=rows[-1][0] + 1)
    yield from _forget(center, forgotten)
    yield from log.append(CHANGES, stamp, LogRecord(requests_forgotten=forgotten))
    return len(rows)


def _forget(center: str, forgotten: RequestsForgotten) -> Unit[None]:
    yield from query(
        "DELETE FROM request WHERE center = ? AND time_ms < ?", center, forgotten.before_ms
    )


def erase(account_id: str, center: str, who: str, stamp: Stamp) -> Unit[None]:
    """At the account's home: an operator has what is personal of it erased, here and, by an entry,
    everywhere. Nothing if that was done before."""
    if (yield from erasure.is_erased(account_id)):
        return
    erased = LogRecord(account_erased=AccountErased(account_id=account_id))
    yield from log.append(registry.ACCOUNTS, stamp, erased)
    yield from _erase(account_id, center, stamp.time_ms, stamp)
    yield from registry.release(account_id, center, stamp)
    yield from audit.record("account", center, who, "erase", account_id, "", "", stamp)


def _erase(account_id: str, source: str, time_ms: int, stamp: Stamp) -> Unit[None]:
    yield from erasure.erase(account_id, source, time_ms)
    # Also sessions that a center makes which has not heard of it are to end: so each ends all of them.
    yield from revoker.note(Due(account_id, "", stamp.hlc))


def apply(source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
    """The effect of another center's log record."""
    if (yield from _is_of_erased(record)):
        return
    version = Version(record.hlc, source)
    match record.WhichOneof("body"):
        case "account_created":
            created = record.account_created
            if (yield from registry.claimant(created.identifier)) is not None:
                raise ValueError("this identifier was claimed for another account")
            yield from query(
                "INSERT INTO account VALUES (?, ?, ?, ?, ?)",
                created.account_id,
                created.identifier,
                created.request_id,
                source,
                record.time_ms,
            )
        case "identifier_claimed":
            claimed = record.identifier_claimed
            if (yield from registry.find_registered(claimed.identifier)) is not None:
                raise ValueError("this identifier was registered by another account")
            yield from query(
                "INSERT INTO claim VALUES (?, ?, ?, ?)",
                claimed.identifier,
                claimed.account_id,
                source,
                record.time_ms,
            )
        case "identifier_released":
            identifier = record.identifier_released.identifier
            at_home = yield from homes.speaks_for(source, slot_of(identifier))
            yield from query(
                "DELETE FROM claim WHERE identifier = ? AND (source = ? OR ?)",
                identifier,
                source,
                int(at_home),
            )
        case "account_erased":
            yield from _erase(record.account_erased.account_id, source, record.time_ms, stamp)
        case "credential_changed":
            password = record.credential_changed
            body = body_of_password(version)
            yield from _note_request(
                password.account_id, password.request_id, record.time_ms, source, body
            )
            yield from _merge_password(password.account_id, password.password_hash, version)
        case "credential_renewed":
            renewed = record.credential_renewed
            renewal = Version(renewed.hlc, source)
            yield from _merge_password(renewed.account_id, renewed.password_hash, renewal)
        case "profile_changed":
            profile = record.profile_changed
            body = body_of_fields(profile.fields)
            yield from _note_request(
                profile.account_id, profile.request_id, record.time_ms, source, body
            )
            yield from _merge_fields(profile.account_id, profile.fields, version)
        case "requests_forgotten":
            yield from _forget(source, record.requests_forgotten)
        case "notification_changed":
            changed = record.notification_changed
            setting = Setting(changed.webhook_url, changed.webhook_secret, changed.email)
            body = body_of_setting(setting)
            yield from _note_request(
                changed.account_id, changed.request_id, record.time_ms, source, body
            )
            yield from notification.merge(changed.account_id, setting, version)
        case "announcement_changed":
            yield from announcement.merge(announcement.of(record.announcement_changed), version)
        case other:
            raise ValueError(f"not a record of this service: {other}")


def counts() -> Unit[dict[str, int]]:
    rows = yield from query("SELECT count(*) FROM account")
    return {"accounts": rows[0][0]}


def _is_of_erased(record: LogRecord) -> Unit[bool]:
    """Would it bring back something of an account that was erased?"""
    kind = record.WhichOneof("body")
    if kind not in _PERSONAL:
        return False
    return (yield from erasure.is_erased(getattr(record, kind).account_id))


_PERSONAL = (
    "identifier_claimed",
    "credential_changed",
    "credential_renewed",
    "profile_changed",
    "notification_changed",
)


def _note_request(
    account_id: str, request_id: str, time_ms: int, center: str, body: bytes
) -> Unit[None]:
    """Notes that a request was carried out. Of two centers that did, the last one stands for both."""
    yield from query(
        "INSERT INTO request VALUES (?, ?, ?, ?, ?) ON CONFLICT (account_id, request_id) DO UPDATE"
        " SET time_ms = excluded.time_ms, center = excluded.center, body = excluded.body"
        " WHERE (excluded.time_ms, excluded.center) > (time_ms, center)",
        account_id,
        request_id,
        time_ms,
        center,
        body,
    )


def _merge_password(account_id: str, password_hash: str, version: Version) -> Unit[None]:
    present = yield from find_credential(account_id)
    if wins(version, present.version if present else None):
        if present:
            yield from _remember(account_id, PASSWORD, present.version, PASSWORD_WITHHELD)
        yield from query(
            "INSERT INTO credential VALUES (?, ?, ?, ?) ON CONFLICT (account_id) DO UPDATE SET"
            " password_hash = excluded.password_hash, hlc = excluded.hlc, center = excluded.center",
            account_id,
            password_hash,
            *version,
        )
    elif present and present.version != version:
        yield from _remember(account_id, PASSWORD, version, PASSWORD_WITHHELD)


def _merge_fields(account_id: str, fields: Mapping[str, str], version: Version) -> Unit[None]:
    for name in sorted(fields):
        rows = yield from query(
            "SELECT hlc, center, value FROM profile_field WHERE account_id = ? AND name = ?",
            account_id,
            name,
        )
        present = Version(*rows[0][:2]) if rows else None
        if wins(version, present):
            if present:
                yield from _remember(account_id, name, present, rows[0][2])
            yield from query(
                "INSERT INTO profile_field VALUES (?, ?, ?, ?, ?) ON CONFLICT (account_id, name)"
                " DO UPDATE SET value = excluded.value, hlc = excluded.hlc, center = excluded.center",
                account_id,
                name,
                fields[name],
                *version,
            )
        elif present != version:
            yield from _remember(account_id, name, version, fields[name])


def _remember(account_id: str, name: str, version: Version, value: str) -> Unit[None]:
    yield from query(
        "INSERT INTO history VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        account_id,
        name,
        *version,
        value,
    )


def _put_credential(row: Row) -> Unit[None]:
    account_id, password_hash, hlc, center = row
    yield from _merge_password(account_id, password_hash, Version(hlc, center))


def _put_field(row: Row) -> Unit[None]:
    account_id, name, value, hlc, center = row
    yield from _merge_fields(account_id, {name: value}, Version(hlc, center))


CHANGES = Topic(
    "changes",
    Road.FEED,
    (
        CopiedTable(
            "credential",
            ("account_id", "password_hash", "hlc", "center"),
            keys=1,
            owner="center",
            merged=True,
            version=lambda row: row[2:],
            put=_put_credential,
            gone=erasure.is_gone,
        ),
        CopiedTable(
            "profile_field",
            ("account_id", "name", "value", "hlc", "center"),
            keys=2,
            owner="center",
            merged=True,
            version=lambda row: row[3:],
            put=_put_field,
            gone=erasure.is_gone,
        ),
        # What has lost here may still stand elsewhere, until the write that beats it arrives there.
        CopiedTable(
            "history",
            ("account_id", "name", "hlc", "center", "value"),
            keys=4,
            owner="center",
            merged=True,
            complete=False,
            gone=erasure.is_gone,
        ),
        CopiedTable(
            "request",
            ("account_id", "request_id", "time_ms", "center", "body"),
            keys=2,
            owner="center",
            merged=True,
            version=lambda row: row[2:4],
            gone=erasure.is_gone,
        ),
        notification.TABLE,
        announcement.TABLE,
    ),
)
TOPICS = (registry.ACCOUNTS, CHANGES)
