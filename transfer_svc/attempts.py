"""When an application's origin asked home, and what came of it: the last times, for `duohuo why`.

The origin's own: not copied, and gone with its disk.
"""

from typing import NamedTuple

from runtime.store import Unit, query

KEPT_MAX = 20
"""Of each application. With delays of up to a minute these are its last twenty minutes."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS attempt (
  application_id TEXT NOT NULL, number INTEGER NOT NULL, asked TEXT NOT NULL,
  begin_ms INTEGER NOT NULL, end_ms INTEGER NOT NULL, error TEXT NOT NULL,
  PRIMARY KEY (application_id, number)) STRICT, WITHOUT ROWID;
"""


class Attempt(NamedTuple):
    """One question to home; `error` is why it brought no decision, empty if it did."""

    number: int
    asked: str
    begin_ms: int
    end_ms: int
    error: str


def record(
    application_id: str, asked: str, begin_ms: int, end_ms: int, error: str = ""
) -> Unit[None]:
    """Adds an attempt, and forgets the one that is too many."""
    rows = yield from query(
        "INSERT INTO attempt SELECT ?1, coalesce(max(number), 0) + 1, ?2, ?3, ?4, ?5 FROM attempt"
        " WHERE application_id = ?1 RETURNING number",
        application_id,
        asked,
        begin_ms,
        end_ms,
        error,
    )
    yield from query(
        "DELETE FROM attempt WHERE application_id = ? AND number <= ?",
        application_id,
        rows[0][0] - KEPT_MAX,
    )


def of(application_id: str) -> Unit[list[Attempt]]:
    """The attempts that are kept, the first one first."""
    rows = yield from query(
        "SELECT number, asked, begin_ms, end_ms, error FROM attempt WHERE application_id = ?"
        " ORDER BY number",
        application_id,
    )
    return [Attempt(*row) for row in rows]
