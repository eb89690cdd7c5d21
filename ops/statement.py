"""`duohuo statement`: all of a user's entries, page by page, as a table, CSV or JSON.

Memory holds one page. Entries come newest first, as the service pages; each has to join on to the one
before, so that a statement is either whole or fails.

CSV follows RFC 4180: a header, CRLF, quotes where they are needed; UTF-8. A spreadsheet takes a text
that begins with = + - @ for a formula, and a payer chooses the memo and the transfer id that a payee
opens there: such text gets an apostrophe in front
(https://owasp.org/www-community/attacks/CSV_Injection). JSON is not touched.
"""

import csv
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, TextIO

from duohuo.v1.transfer_service_pb2 import Entry, ListEntriesRequest, ListEntriesResponse
from ops.client import Client, Login
from ops.output import Failure
from ops.plain import plain
from runtime.clock import iso, milliseconds

PAGE_SIZE = 100
DAY_MS = 24 * 3600 * 1000
_COLUMNS = (
    "number",
    "time",
    "amount_minor_units",
    "balance_after_minor_units",
    "currency",
    "counterparty_account_id",
    "transfer_id",
    "memo",
)
# Also the full-width forms, which East Asian versions of spreadsheets take for the same.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


class Period(NamedTuple):
    """From a moment on, up to but not including another one."""

    since_ms: int | None = None
    until_ms: int | None = None

    def includes(self, time_ms: int) -> bool:
        return (self.since_ms is None or self.since_ms <= time_ms) and (
            self.until_ms is None or time_ms < self.until_ms
        )

    def is_over(self, time_ms: int) -> bool:
        """Is whatever is older than an entry of this time before the period?

        Entries carry their center's clock, which may have been set back between two of them; by more than
        a day is not believed.
        """
        return self.since_ms is not None and time_ms < self.since_ms - DAY_MS


def period(since: str, until: str) -> Period:
    """Whole days in UTC, both included. Raises Failure."""
    first = _day_ms(since) if since else None
    last = _day_ms(until) if until else None
    if first is not None and last is not None and last < first:
        raise Failure(f"{until} is before {since}")
    return Period(first, None if last is None else last + DAY_MS)


def _day_ms(text: str) -> int:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise Failure(f"{text} is not a date", advice="Dates look like 2026-11-25.") from None
    since_1970 = datetime(day.year, day.month, day.day, tzinfo=UTC) - datetime(
        1970, 1, 1, tzinfo=UTC
    )
    return since_1970 // timedelta(milliseconds=1)


async def entries(client: Client, login: Login, wanted: Period) -> AsyncIterator[Entry]:
    """The account's entries of a period, newest first, but for those of its moves between centers. Raises
    Failure if they do not join."""
    newer: Entry | None = None
    request = ListEntriesRequest(account_id=login.account_id, page_size=PAGE_SIZE)
    while True:
        page = await client.call("TransferService/ListEntries", request, ListEntriesResponse, login)
        for entry in page.entries:
            _check_joins(newer, entry)
            newer = entry
            time_ms = milliseconds(entry.create_time)
            if wanted.is_over(time_ms):
                return
            if wanted.includes(time_ms) and not entry.moved:
                yield entry
        if not page.next_page_token:
            if newer is not None and newer.number != 1:
                raise _incomplete(newer.number - 1)
            return
        request.page_token = page.next_page_token


def _check_joins(newer: Entry | None, entry: Entry) -> None:
    """Is this the entry just before the newer one, by number and by balance?"""
    if newer is None:
        return
    before = newer.balance_after.minor_units - newer.amount.minor_units
    if (entry.number, entry.balance_after.minor_units) != (newer.number - 1, before):
        raise _incomplete(newer.number - 1)


def _incomplete(number: int) -> Failure:
    return Failure(
        f"entry {number} is missing, or does not fit the one after it",
        "STATEMENT_INCOMPLETE",
        advice="A copy that is catching up may have gaps; ask again when the home center answers.",
    )


async def write_table(out: TextIO, found: AsyncIterator[Entry]) -> None:
    """Columns for people; of fixed width, as nobody knows what is still to come."""
    line = "{:>8}  {:<29}  {:>16}  {:>18}  {:<8}  {:<37}  {}"
    print(
        line.format("NO", "WHEN", "AMOUNT", "BALANCE", "CURRENCY", "WITH", "MEMO").rstrip(),
        file=out,
    )
    async for entry in found:
        number, time, amount, balance, currency, counterparty, _, memo = _cells(entry)
        # A memo must not move the cursor or begin a line of its own on its reader's terminal.
        memo = "".join(one if one.isprintable() else " " for one in str(memo))
        cells = line.format(number, time, amount, balance, currency, counterparty, memo)
        print(cells.rstrip(), file=out)


async def write_csv(out: TextIO, found: AsyncIterator[Entry]) -> None:
    """RFC 4180, without formulas."""
    rows = csv.writer(out, lineterminator="\r\n")
    rows.writerow(_COLUMNS)
    async for entry in found:
        rows.writerow(defused(cell) if isinstance(cell, str) else cell for cell in _cells(entry))


async def write_json(out: TextIO, found: AsyncIterator[Entry]) -> None:
    """One object with the entries, written one by one."""
    out.write('{"entries": [')
    separator = "\n"
    async for entry in found:
        out.write(f"{separator}  {json.dumps(plain(entry))}")
        separator = ",\n"
    out.write("\n]}\n")


def defused(text: str) -> str:
    """The text with an apostrophe in front if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def _cells(entry: Entry) -> tuple[int | str, ...]:
    return (
        entry.number,
        iso(milliseconds(entry.create_time)),
        entry.amount.minor_units,
        entry.balance_after.minor_units,
        entry.amount.currency_code,
        entry.counterparty_account_id,
        entry.transfer_id,
        entry.memo,
    )


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name when it is complete, or not at all; for its owner alone.

    Raises Failure if it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise Failure(f"cannot write to {path.parent}: {error.strerror}") from None
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
