"""The end of what is personal of an account.

Its home erases it, once and for ever; by the log, or with a snapshot, every other center does too, also one
that was away. What is known of the person goes: identifiers, password, profile and its history, how to
notify, what requests were about. The account's id stays, as the ledger needs it. Nothing that was written
before brings anything back, wherever it comes from: rows of an erased account are not taken any more.
"""

from runtime.store import Row, Unit, query
from sync_bus.copies import CopiedTable

SCHEMA = """
CREATE TABLE IF NOT EXISTS erasure (
  account_id TEXT NOT NULL PRIMARY KEY, source TEXT NOT NULL, time_ms INTEGER NOT NULL
  ) STRICT, WITHOUT ROWID;
"""
_PERSONAL = ("credential", "profile_field", "history", "request", "notification_setting")


def is_erased(account_id: str) -> Unit[bool]:
    rows = yield from query("SELECT 1 FROM erasure WHERE account_id = ?", account_id)
    return bool(rows)


def erase(account_id: str, source: str, time_ms: int) -> Unit[None]:
    """Erases here what is personal of an account, but for its claims (`store.release`)."""
    yield from query(
        "INSERT INTO erasure VALUES (?, ?, ?) ON CONFLICT DO NOTHING", account_id, source, time_ms
    )
    for table in _PERSONAL:
        yield from query(f"DELETE FROM {table} WHERE account_id = ?", account_id)  # noqa: S608 - constant names
    yield from query(
        "UPDATE account SET identifier = ? WHERE account_id = ?",
        placeholder(account_id),
        account_id,
    )


def placeholder(account_id: str) -> str:
    """What stands where the identifier was; nothing that anybody could register."""
    return f"erased {account_id}"


def is_gone(row: Row) -> Unit[bool]:
    """Does a row, whose first column is an account's id, belong to an erased one?"""
    return (yield from is_erased(str(row[0])))


def _put(row: Row) -> Unit[None]:
    account_id, source, time_ms = row
    yield from erase(account_id, source, time_ms)


TABLE = CopiedTable(
    "erasure", ("account_id", "source", "time_ms"), keys=1, owner="source", put=_put
)
