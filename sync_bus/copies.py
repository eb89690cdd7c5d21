"""Tables that every center has a copy of, row by row: for snapshots, comparisons and digests.

A row belongs to one center, its owner, and other centers repeat what the owner wrote. Rows of a merged
table are written by many centers, and the greatest version of a key wins; its owner is who wrote it.
Rows change only towards a greater version, and are deleted only by an entry of their owner's. So a copy can
be brought up to date from any other, in any order, and a row of the same version with another content is a
fault.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any, NamedTuple

from duohuo.internal.v1.peer_services_pb2 import Cell, CopyRow
from runtime.store import Row, Unit, query

DIGESTED_ROWS_MAX = 2000
"""So many are read at a time. Who compares digests must use the same number."""


@dataclass(frozen=True, slots=True)
class CopiedTable:
    """A table's copied columns, the first `keys` of them its primary key; the first is text.

    `owner` is the column that names a row's owner. `version` of a row grows with each change. `put`
    stores a row where a plain upsert would not do; in a merged table it gets older ones too, as they may
    be part of a history. Whether a row of a table that is not `complete` is there depends on more than its
    owner's log. A table that is not `digested` is vouched for by another one of its topic. `proven` says
    whether a row fits what is here of its kind, if that can be said: such a row is not deleted because its
    owner does not have it any more, and one that does not fit is not taken from its owner. A row that is
    `gone` has been deleted for good: it is not taken from anybody, and nobody is wrong to have it still.
    """

    name: str
    columns: tuple[str, ...]
    keys: int
    owner: str
    merged: bool = False
    complete: bool = True
    version: Callable[[Row], Any] = lambda _row: 0
    put: Callable[[Row], Unit[None]] | None = None
    digested: bool = True
    proven: Callable[[Row], Unit[bool | None]] | None = None
    gone: Callable[[Row], Unit[bool]] | None = None

    def key(self, row: Row) -> Row:
        return row[: self.keys]

    def owner_of(self, row: Row) -> str:
        return str(row[self.columns.index(self.owner)])


def columns(names: str) -> tuple[str, ...]:
    """Column names from one string."""
    return tuple(names.split())


class Difference(Enum):
    """How a copy's row differed from its owner's, all of whose changes it should have had."""

    MISSING = "missing"
    OLDER = "older"
    ALTERED = "altered"
    EXTRA = "extra"


class Found(NamedTuple):
    """One difference: the owner's row, or the local one if it is EXTRA. One that the rows here contradict
    is not `trusted`: the owner itself may have been changed by hand.
    """

    row: Row
    difference: Difference
    trusted: bool


class Range(NamedTuple):
    """Keys behind `after` up to `last`, which is in it; open ends if None."""

    after: Row | None = None
    last: Row | None = None


def rows_in(
    table: CopiedTable, source: str, keys: Range, limit: int | None = None
) -> Unit[list[Row]]:
    """Rows in the order of their keys: those that a source owns, or all if merged."""
    where, values = ([], []) if table.merged else ([f"{table.owner} = ?"], [source])
    key = ", ".join(table.columns[: table.keys])
    for bound, comparison in ((keys.after, ">"), (keys.last, "<=")):
        if bound is not None:
            where.append(f"({key}) {comparison} ({', '.join('?' * table.keys)})")
            values += bound
    return (
        yield from query(
            f"SELECT {', '.join(table.columns)} FROM {table.name}"  # noqa: S608 - constant names
            f"{' WHERE ' if where else ''}{' AND '.join(where)} ORDER BY {key}"
            f"{'' if limit is None else f' LIMIT {limit}'}",
            *values,
        )
    )


def digest(rows: Sequence[Row]) -> str:
    """One value for rows; the same whatever their order."""
    total = 0
    for row in rows:
        hashed = blake2b(repr(tuple(row)).encode(), digest_size=16).digest()
        total = (total + int.from_bytes(hashed)) % (1 << 128)
    return f"{total:032x}"


def digest_all(table: CopiedTable, source: str) -> Unit[str]:
    """One value for everything of a source, or of all if merged."""
    digested = blake2b(digest_size=16)
    after: Row | None = None
    while rows := (yield from rows_in(table, source, Range(after), DIGESTED_ROWS_MAX)):
        after = table.key(rows[-1])
        digested.update(repr(rows).encode())
    return digested.hexdigest()


def install(table: CopiedTable, source: str, keys: Range, rows: Sequence[Row]) -> Unit[list[Row]]:
    """Makes a range of a copy what a snapshot has of it; in a merged table, what is newer stays.

    Returns the rows that something else stands in the way of, such as a copy that was changed by hand
    to have a value that is unique. Anti-entropy comes back to them. Where rows of the same version differ,
    only the owner is believed: another center's copy may be the one that was changed by hand.
    """
    given = {table.key(row): row for row in rows}
    for present in (yield from rows_in(table, source, keys)):
        key = table.key(present)
        row = given.get(key)
        if row == present:
            del given[key]
        elif row is not None and table.version(row) > table.version(present):
            continue
        elif not table.merged or (row and _corrects(table, source, row, present)):
            yield from _delete(table, present)
        elif row is not None and (
            table.put is None or table.version(row) == table.version(present)
        ):
            del given[key]
    refused = []
    for row in given.values():
        yield from query("SAVEPOINT installed")
        try:
            yield from _put(table, row)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, the others go on
            yield from query("ROLLBACK TO installed")
            refused.append(row)
        yield from query("RELEASE installed")
    return refused


def _corrects(table: CopiedTable, source: str, row: Row, present: Row) -> bool:
    return table.version(row) == table.version(present) and table.owner_of(row) == source


def repair(
    table: CopiedTable, source: str, keys: Range, before: Sequence[Row], owners: Sequence[Row]
) -> Unit[list[Found]]:
    """Makes a range of this copy what its owner has, where that can be trusted; returns what differed."""
    found = yield from differences(table, source, keys, before, owners)
    trusted = [one for one in found if one.trusted]
    for row, difference, _ in trusted:
        if difference in (Difference.EXTRA, Difference.ALTERED):
            yield from _delete(table, row)
    # Only now: what was wrong may have stood in the way, with a value that is unique.
    for row, difference, _ in trusted:
        if difference is not Difference.EXTRA:
            yield from _put(table, row)
    return found


def differences(
    table: CopiedTable, source: str, keys: Range, before: Sequence[Row], owners: Sequence[Row]
) -> Unit[list[Found]]:
    """How a range of this copy differs from what its owner has.

    `before` are the local rows as they were before the owner was asked, `owners` the owner's rows of a
    moment up to which everything has been applied here since.
    """
    found = []
    local = {table.key(row): row for row in (yield from rows_in(table, source, keys))}
    known = {table.key(row) for row in owners}
    for row in before if table.complete else ():
        key = table.key(row)
        if key not in known and local.get(key) == row and table.owner_of(row) == source:
            kept = table.proven is not None and (yield from table.proven(row)) is True
            found.append(Found(row, Difference.EXTRA, not kept))
    for row in owners:
        if table.owner_of(row) != source:
            continue  # of a merged table: its own owner will be asked
        if table.gone is not None and (yield from table.gone(row)):
            continue
        present = local.get(table.key(row))
        if present is None:
            difference = Difference.MISSING if table.complete else None
        elif table.version(row) > table.version(present):
            difference = Difference.OLDER
        elif present != row and table.version(row) == table.version(present):
            difference = Difference.ALTERED
        else:
            difference = None
        if difference is not None:
            refuted = table.proven is not None and (yield from table.proven(row)) is False
            found.append(Found(row, difference, not refuted))
    return found


def encoded(rows: Sequence[Row]) -> list[CopyRow]:
    """Rows as they travel."""
    return [CopyRow(cells=[_cell(value) for value in row]) for row in rows]


def decoded(table: CopiedTable, rows: Sequence[CopyRow]) -> list[Row]:
    """Rows as they have travelled. Raises ValueError if they do not fit the table."""
    if any(len(row.cells) != len(table.columns) for row in rows):
        raise ValueError(f"rows of {table.name} have other columns here")
    return [tuple(_value(cell) for cell in row.cells) for row in rows]


def _matching(table: CopiedTable) -> str:
    return " AND ".join(f"{column} = ?" for column in table.columns[: table.keys])


def _find(table: CopiedTable, key: Row) -> Unit[Row | None]:
    rows = yield from query(
        f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE {_matching(table)}",  # noqa: S608 - constant names
        *key,
    )
    return rows[0] if rows else None


def _put(table: CopiedTable, row: Row) -> Unit[None]:
    if table.gone is not None and (yield from table.gone(row)):
        return
    if table.put is not None:
        yield from table.put(row)
        return
    key, rest = table.columns[: table.keys], table.columns[table.keys :]
    changes = ", ".join(f"{column} = excluded.{column}" for column in rest)
    yield from query(
        f"INSERT INTO {table.name} ({', '.join(table.columns)})"  # noqa: S608 - constant names
        f" VALUES ({', '.join('?' * len(row))}) ON CONFLICT ({', '.join(key)})"
        f" DO {f'UPDATE SET {changes}' if changes else 'NOTHING'}",
        *row,
    )


def _delete(table: CopiedTable, row: Row) -> Unit[None]:
    """Rows with columns that are not copied, or with a `put`, cannot be overwritten in place."""
    yield from query(f"DELETE FROM {table.name} WHERE {_matching(table)}", *table.key(row))  # noqa: S608 - constant names


def encoded_key(key: Row | None) -> CopyRow | None:
    """A key as it travels."""
    return None if key is None else encoded([key])[0]


def decoded_key(table: CopiedTable, key: CopyRow) -> Row | None:
    """A key as it has travelled; None for the open end. Raises ValueError if it does not fit."""
    if not key.cells:
        return None
    if len(key.cells) != table.keys:
        raise ValueError(f"{table.name} has other keys here")
    return tuple(_value(cell) for cell in key.cells)


def _cell(value: Any) -> Cell:
    match value:
        case str():
            return Cell(text=value)
        case int():
            return Cell(integer=value)
        case bytes():
            return Cell(blob=value)
        case None:
            return Cell()
    raise TypeError(type(value).__name__)


def _value(cell: Cell) -> Any:
    kind = cell.WhichOneof("value")
    return getattr(cell, kind) if kind else None
