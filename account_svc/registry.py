"""Which account each identifier belongs to: the tables, and the units that keep it so.

An identifier belongs to one account for ever: to the one registered with it (`account`), or to the one
for which it was claimed later (`claim`). Its home center alone writes either. Which of the identifiers
claimed for it an account uses at present is a field of its profile, which any center may write.
"""

from collections.abc import Iterable
from typing import NamedTuple

from grpc import StatusCode

from account_svc import erasure
from duohuo.internal.v1.log_pb2 import IdentifierClaimed, IdentifierReleased, LogRecord
from runtime.errors import RpcError
from runtime.ids import account_slot
from runtime.placement import slot_of
from runtime.store import Unit, query
from sync_bus import homes, log
from sync_bus.copies import CopiedTable
from sync_bus.log import Road, Stamp, Topic

SCHEMA = """
CREATE TABLE IF NOT EXISTS account (
  account_id TEXT NOT NULL PRIMARY KEY, identifier TEXT NOT NULL UNIQUE, request_id TEXT NOT NULL,
  source TEXT NOT NULL, create_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claim (
  identifier TEXT NOT NULL PRIMARY KEY, account_id TEXT NOT NULL, source TEXT NOT NULL,
  create_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS claim_by_account ON claim (account_id);
"""
PAGE_ROWS = 2000

_IDENTIFIER = "identifier "
ATTACHED, DETACHED = "attached", "detached"
"""What the profile says of an identifier that was claimed for the account: in use, or not any more."""


class AccountRow(NamedTuple):
    account_id: str
    identifier: str
    request_id: str
    source: str
    create_ms: int


def find_account(account_id: str) -> Unit[AccountRow | None]:
    rows = yield from query(
        "SELECT account_id, identifier, request_id, source, create_ms FROM account"
        " WHERE account_id = ?",
        account_id,
    )
    return AccountRow(*rows[0]) if rows else None


def find_registered(identifier: str) -> Unit[AccountRow | None]:
    """The account that was registered with this identifier."""
    rows = yield from query(
        "SELECT account_id, identifier, request_id, source, create_ms FROM account"
        " WHERE identifier = ?",
        identifier,
    )
    return AccountRow(*rows[0]) if rows else None


def find_by_identifier(identifier: str) -> Unit[AccountRow | None]:
    """The account that uses this identifier.

    The claim may come after what says that it is used; once it is here, it has the last word. All is looked
    up in any case: nobody must be found sooner, or later, than who does not exist.
    """
    registered = yield from find_registered(identifier)
    rows = yield from query(
        "SELECT account_id FROM profile_field WHERE name = ? AND value = ?"
        " AND name > 'identifier ' AND name < 'identifier!'",
        identifier_field(identifier),
        ATTACHED,
    )
    claimed = yield from claimant(identifier)
    users = [user for (user,) in rows if claimed in (None, user)]
    if registered is not None:
        return registered
    return (yield from find_account(users[0])) if len(users) == 1 else None


def identifier_field(identifier: str) -> str:
    """The field of a profile that says whether its account uses this identifier: ATTACHED or DETACHED."""
    return _IDENTIFIER + identifier


def attached(account_id: str) -> Unit[list[str]]:
    """The identifiers that the account uses besides the one it was registered with."""
    fields = yield from query(
        "SELECT name, value FROM profile_field WHERE account_id = ? ORDER BY name", account_id
    )
    return [
        name.removeprefix(_IDENTIFIER)
        for name, value in fields
        if name.startswith(_IDENTIFIER) and value == ATTACHED
    ]


def claims(account_id: str) -> Unit[list[str]]:
    """The identifiers that were claimed for the account, in use or not, as far as is known here."""
    rows = yield from query(
        "SELECT identifier FROM claim WHERE account_id = ? ORDER BY identifier", account_id
    )
    return [identifier for (identifier,) in rows]


def holder(identifier: str) -> Unit[str | None]:
    """The account that an identifier belongs to, whether or not it uses it."""
    registered = yield from find_registered(identifier)
    return registered.account_id if registered else (yield from claimant(identifier))


def claimant(identifier: str) -> Unit[str | None]:
    """The account for which an identifier was claimed after it was registered with another one."""
    rows = yield from query("SELECT account_id FROM claim WHERE identifier = ?", identifier)
    return rows[0][0] if rows else None


def claim(identifier: str, account_id: str, center: str, stamp: Stamp) -> Unit[str]:
    """Claims an identifier for an account if nobody has it; returns whoever has it then.

    Only the identifier's home runs this, as it alone registers it.
    """
    yield from require_present(account_id)
    present = yield from holder(identifier)
    if present is not None:
        return present
    yield from query(
        "INSERT INTO claim VALUES (?, ?, ?, ?)", identifier, account_id, center, stamp.time_ms
    )
    claimed = IdentifierClaimed(identifier=identifier, account_id=account_id)
    yield from log.append(ACCOUNTS, stamp, LogRecord(identifier_claimed=claimed))
    return account_id


def release(account_id: str, center: str, stamp: Stamp) -> Unit[int]:
    """Forgets the identifiers of an erased account; returns how many. From now on this center may give
    those that are at home here to others: who copies that must have heard that they are free."""
    rows = yield from query(
        "DELETE FROM claim WHERE account_id = ? RETURNING identifier, source", account_id
    )
    for identifier, source in rows:
        at_home = yield from homes.acts_for(center, slot_of(identifier))
        if source == center or at_home:
            released = IdentifierReleased(identifier=identifier)
            yield from log.append(ACCOUNTS, stamp, LogRecord(identifier_released=released))
    return len(rows)


def to_release() -> Unit[str | None]:
    """An erased account of which identifiers are kept."""
    rows = yield from query("SELECT account_id FROM claim JOIN erasure USING (account_id) LIMIT 1")
    return rows[0][0] if rows else None


def require_present(account_id: str) -> Unit[None]:
    """Raises RpcError ACCOUNT_ERASED if what was personal of it is gone."""
    if (yield from erasure.is_erased(account_id)):
        raise RpcError(StatusCode.NOT_FOUND, "ACCOUNT_ERASED", "this account has been erased")


def count_in(slots: Iterable[int]) -> Unit[int]:
    """How many accounts there are in these slots."""
    rows = yield from query(
        f"SELECT count(*) FROM account WHERE {homes.SLOT_OF.format('account_id')}"  # noqa: S608 - constant names
        " IN (SELECT value FROM json_each(?))",
        homes.listed(slots),
    )
    return int(rows[0][0])


def held_twice() -> Unit[list[tuple[str, str]]]:
    """Pairs of accounts to which one identifier belongs."""
    rows = yield from query(
        "SELECT account.account_id, claim.account_id FROM claim JOIN account USING (identifier)"
    )
    return [(one, other) for one, other in rows]


def misplaced(limit: int) -> Unit[list[str]]:
    """Accounts whose id does not carry their identifier's slot."""
    found: list[str] = []
    after = ""
    while rows := (
        yield from query(
            "SELECT account_id, identifier FROM account WHERE account_id > ?"
            " ORDER BY account_id LIMIT ?",
            after,
            PAGE_ROWS,
        )
    ):
        after = rows[-1][0]
        found += [
            one
            for one, identifier in rows
            if account_slot(one) != slot_of(identifier) and identifier != erasure.placeholder(one)
        ]
    return found[:limit]


ACCOUNTS = Topic(
    "accounts",
    Road.JETSTREAM,
    (
        CopiedTable("account", AccountRow._fields, keys=1, owner="source"),
        CopiedTable(
            "claim",
            ("identifier", "account_id", "source", "create_ms"),
            keys=1,
            owner="source",
            gone=lambda row: erasure.is_erased(str(row[1])),
        ),
        erasure.TABLE,
        # Last: whoever has these has all that is above.
        *homes.TABLES,
    ),
)
