"""What an account had when a transfer was refused for it: it has changed since, and `duohuo why` tells.

A refusal leaves no entry in the statement, so the balance that it saw is nowhere else. Other centers hold
copies, as of the refusal itself.
"""

from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import BalanceSeen
from runtime.store import Unit, query
from sync_bus.copies import CopiedTable

SCHEMA = """
CREATE TABLE IF NOT EXISTS refusal (
  payer_account_id TEXT NOT NULL, transfer_id TEXT NOT NULL, account_id TEXT NOT NULL,
  currency TEXT NOT NULL, balance INTEGER NOT NULL, held INTEGER NOT NULL,
  time_ms INTEGER NOT NULL, center TEXT NOT NULL,
  PRIMARY KEY (payer_account_id, transfer_id)) STRICT, WITHOUT ROWID;
"""


class Refusal(NamedTuple):
    """One row: a transfer is refused at most once, by its payer's home or by its payee's."""

    payer_account_id: str
    transfer_id: str
    account_id: str
    currency: str
    balance: int
    held: int
    time_ms: int
    center: str


TABLE = CopiedTable("refusal", Refusal._fields, keys=2, owner="center")


def record(
    payer_account_id: str, transfer_id: str, saw: BalanceSeen, time_ms: int, center: str
) -> Unit[None]:
    """Stores what a refusal saw, here or at another center. Once stored, it stays."""
    yield from query(
        "INSERT INTO refusal VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        payer_account_id,
        transfer_id,
        saw.account_id,
        saw.currency_code,
        saw.minor_units,
        saw.held_minor_units,
        time_ms,
        center,
    )


def find(payer_account_id: str, transfer_id: str) -> Unit[Refusal | None]:
    rows = yield from query(
        f"SELECT {', '.join(Refusal._fields)} FROM refusal"  # noqa: S608 - constant names
        " WHERE payer_account_id = ? AND transfer_id = ?",
        payer_account_id,
        transfer_id,
    )
    return Refusal(*rows[0]) if rows else None
