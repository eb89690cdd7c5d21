"""Copies become the same in whatever order rows come; what differs from its owner is found and mended."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from account_svc.store import CHANGES
from duohuo.internal.v1.peer_services_pb2 import CopyRow
from runtime.store import Row, SqliteStore, Unit, query
from sync_bus import copies
from sync_bus.copies import CopiedTable, Difference, Range
from tests.fakes import temporary_store

SCHEMA = """
CREATE TABLE thing (name TEXT NOT NULL, part INTEGER NOT NULL, version INTEGER NOT NULL,
  value TEXT NOT NULL, center TEXT NOT NULL, PRIMARY KEY (name, part)) STRICT, WITHOUT ROWID;
CREATE TABLE field (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL, hlc INTEGER NOT NULL,
  center TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
THINGS = CopiedTable(
    "thing",
    ("name", "part", "version", "value", "center"),
    keys=2,
    owner="center",
    version=lambda row: row[2],
)
FIELDS = CopiedTable(
    "field",
    ("name", "value", "hlc", "center"),
    keys=1,
    owner="center",
    merged=True,
    version=lambda row: row[2:],
)
PARTIAL = CopiedTable(
    "thing", ("name", "part", "version", "value", "center"), keys=2, owner="center", complete=False
)
EVERYTHING = Range()


def thing(name: str, version: int = 1, value: str = "", center: str = "b", part: int = 1) -> Row:
    """A row whose content is a function of its version, unless somebody has tampered with it."""
    return (name, part, version, value or f"as of {version}", center)


def field(name: str, hlc: int, center: str = "b", value: str = "") -> Row:
    return (name, value or f"{center} wrote at {hlc}", hlc, center)


async def hold(store: SqliteStore, table: CopiedTable, rows: Sequence[Row]) -> None:
    marks = ", ".join("?" * len(table.columns))
    for row in rows:
        await store.write(
            "hold",
            query(f"INSERT OR REPLACE INTO {table.name} VALUES ({marks})", *row),  # noqa: S608 - constant
        )


async def install(
    store: SqliteStore, table: CopiedTable, keys: Range, rows: Sequence[Row]
) -> list[Row]:
    return await store.write("install", copies.install(table, "b", keys, rows))


async def held(store: SqliteStore, table: CopiedTable, source: str = "b") -> list[Row]:
    return await store.read(copies.rows_in(table, source, EVERYTHING))


async def repair(
    store: SqliteStore,
    table: CopiedTable,
    owners: Sequence[Row],
    keys: Range = EVERYTHING,
    before: Sequence[Row] | None = None,
) -> list[tuple[Row, Difference]]:
    if before is None:
        before = await store.read(copies.rows_in(table, "b", keys))
    found = await store.write("repair", copies.repair(table, "b", keys, before, owners))
    assert all(one.trusted for one in found)
    return [(one.row, one.difference) for one in found]


things = st.lists(
    st.builds(
        thing,
        st.sampled_from("xyz"),
        st.integers(0, 3),
        center=st.just("b"),
        part=st.integers(1, 3),
    ),
    max_size=20,
)
fields = st.lists(
    st.builds(field, st.sampled_from("xyz"), st.integers(0, 4), st.sampled_from("abc")), max_size=20
)


@settings(max_examples=60)
@given(fields, st.data())
def test_merged_rows_in_any_order_and_repeated_give_one_digest(
    rows: list[Row], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    repeated = data.draw(st.lists(st.sampled_from(rows), max_size=5)) if rows else []

    async def run() -> None:
        async with temporary_store(SCHEMA) as one, temporary_store(SCHEMA) as other:
            for store, order in ((one, rows), (other, [*shuffled, *repeated])):
                for row in order:
                    await install(store, FIELDS, EVERYTHING, [row])
            digests = [await s.read(copies.digest_all(FIELDS, "b")) for s in (one, other)]
            assert digests[0] == digests[1]
            newest = {row[0]: row for row in sorted(rows, key=FIELDS.version)}
            assert await held(one, FIELDS) == [newest[name] for name in sorted(newest)]

    asyncio.run(run())


@settings(max_examples=60)
@given(things, things, st.integers(1, 4), st.data())
def test_a_snapshot_in_pages_replaces_whatever_was_there(
    local: list[Row], snapshot: list[Row], page_rows: int, data: st.DataObject
) -> None:
    """Older, newer, altered and foreign rows; a page may arrive twice. Other owners' rows stay."""
    newest = {THINGS.key(row): row for row in snapshot}
    wanted = [newest[key] for key in sorted(newest)]
    there = [(*row[:3], data.draw(st.sampled_from([row[3], "tampered"])), "b") for row in local]
    others = [thing(name, 9, center="c", part=4) for name in "xyz"]

    async def run() -> None:
        async with temporary_store(SCHEMA) as store:
            await hold(store, THINGS, [*there, *others])
            after: Row | None = None
            for begin in range(0, len(wanted), page_rows):
                page = wanted[begin : begin + page_rows]
                for _ in range(2):
                    await install(store, THINGS, Range(after, THINGS.key(page[-1])), page)
                after = THINGS.key(page[-1])
            await install(store, THINGS, Range(after), [])
            assert await held(store, THINGS) == wanted
            assert await held(store, THINGS, "c") == others

    asyncio.run(run())


@given(things, st.data())
def test_a_digest_does_not_depend_on_order_but_on_everything_else(
    rows: list[Row], data: st.DataObject
) -> None:
    assert copies.digest(rows) == copies.digest(data.draw(st.permutations(rows)))
    for other in (thing("new"), thing("x", 9), ("x", 1, 1, b"as of 1", "b")):
        assert copies.digest([*rows, other]) != copies.digest(rows)


async def test_a_row_of_the_same_version_with_another_content_is_replaced() -> None:
    async with temporary_store(SCHEMA) as store:
        await hold(store, THINGS, [thing("x", 2, "tampered")])
        await install(store, THINGS, EVERYTHING, [thing("x", 2)])
        assert await held(store, THINGS) == [thing("x", 2)]
        await hold(store, FIELDS, [field("x", 2, value="tampered")])
        await install(store, FIELDS, EVERYTHING, [field("x", 2)])
        assert await held(store, FIELDS) == [field("x", 2)]


async def test_a_snapshot_of_another_than_the_owner_alters_no_row_of_the_same_version() -> None:
    """It may be the copy that was changed by hand: also the owner itself gets snapshots of others."""
    async with temporary_store(SCHEMA) as store:
        row = field("x", 2, center="c")
        await hold(store, FIELDS, [row])
        await install(store, FIELDS, EVERYTHING, [field("x", 2, center="c", value="tampered")])
        assert await held(store, FIELDS) == [row]


async def test_an_older_row_of_a_merged_table_goes_to_its_history() -> None:
    put: list[Row] = []

    def remember(row: Row) -> Unit[None]:
        yield from ()
        put.append(row)

    table = replace(FIELDS, put=remember)
    async with temporary_store(SCHEMA) as store:
        await hold(store, FIELDS, [field("x", 2)])
        await install(store, table, EVERYTHING, [field("x", 1), field("y", 1)])
        assert put == [field("x", 1), field("y", 1)]
        await install(store, table, EVERYTHING, [field("x", 2)])
        assert len(put) == 2


async def test_a_range_is_open_below_closed_above_and_of_one_owner() -> None:
    rows = [thing(name, part=part) for name in "xy" for part in (1, 2, 3)]
    async with temporary_store(SCHEMA) as store:
        await hold(store, THINGS, [*rows, thing("x", center="c", part=9)])

        async def found(keys: Range, limit: int | None = None) -> list[Row]:
            return await store.read(copies.rows_in(THINGS, "b", keys, limit))

        assert await found(EVERYTHING) == rows
        assert await found(Range(("x", 2))) == rows[2:]
        assert await found(Range(None, ("x", 2))) == rows[:2]
        assert await found(Range(("x", 1), ("y", 1))) == rows[1:4]
        assert await found(Range(("x", 3)), 2) == rows[3:5]


async def test_a_merged_table_is_everybodys() -> None:
    rows = [field("x", 1, "a"), field("y", 1, "b")]
    async with temporary_store(SCHEMA) as store:
        await hold(store, FIELDS, rows)
        assert await held(store, FIELDS, "b") == rows


@pytest.mark.parametrize(
    ("local", "difference", "after"),
    [
        ([], Difference.MISSING, [thing("x", 2)]),
        ([thing("x", 1)], Difference.OLDER, [thing("x", 2)]),
        ([thing("x", 2, "tampered")], Difference.ALTERED, [thing("x", 2)]),
        ([thing("x", 2), thing("w")], Difference.EXTRA, [thing("x", 2)]),
        ([thing("x", 2), thing("y")], Difference.EXTRA, [thing("x", 2)]),
        ([thing("x", 2)], None, [thing("x", 2)]),
    ],
    ids=str,
)
async def test_each_difference_from_the_owner_is_named_and_put_right(
    local: list[Row], difference: Difference | None, after: list[Row]
) -> None:
    async with temporary_store(SCHEMA) as store:
        await hold(store, THINGS, local)
        found = await repair(store, THINGS, [thing("x", 2)])
        assert [one for _, one in found] == ([difference] if difference else [])
        assert await held(store, THINGS) == after


async def test_what_is_ahead_of_the_owners_answer_stays() -> None:
    """It has come over the log since: newer versions, and new rows."""
    async with temporary_store(SCHEMA) as store:
        await hold(store, THINGS, [thing("x", 1)])
        before = await held(store, THINGS)
        ahead = [thing("x", 3), thing("y")]
        await hold(store, THINGS, ahead)
        assert await repair(store, THINGS, [thing("x", 2)], before=before) == []
        assert await held(store, THINGS) == ahead


async def test_a_row_that_changed_while_the_owner_was_asked_is_not_extra() -> None:
    """The owner did not have it then, but has it now: the log has brought it again."""
    async with temporary_store(SCHEMA) as store:
        await hold(store, THINGS, [thing("x", 1)])
        before = await held(store, THINGS)
        await hold(store, THINGS, [thing("x", 2)])
        assert await repair(store, THINGS, [], before=before) == []
        assert await held(store, THINGS) == [thing("x", 2)]


async def test_nothing_is_missing_or_extra_in_a_table_that_is_not_complete() -> None:
    async with temporary_store(SCHEMA) as store:
        await hold(store, PARTIAL, [thing("only here"), thing("x", 1, "tampered")])
        found = await repair(store, PARTIAL, [thing("x", 1), thing("only there")])
        assert found == [(thing("x", 1), Difference.ALTERED)]
        assert await held(store, PARTIAL) == [thing("only here"), thing("x", 1)]


async def test_a_range_is_repaired_and_nothing_outside_it() -> None:
    async with temporary_store(SCHEMA) as store:
        outside = [thing("a", 1, "tampered"), thing("z", 1, "tampered")]
        await hold(store, THINGS, [*outside, thing("m", 1, "tampered")])
        found = await repair(store, THINGS, [thing("m")], Range(("a", 1), ("m", 1)))
        assert [row for row, _ in found] == [thing("m")]
        assert await held(store, THINGS) == [outside[0], thing("m"), outside[1]]


async def test_a_merged_row_that_others_wrote_is_theirs_to_repair() -> None:
    async with temporary_store(SCHEMA) as store:
        await hold(store, FIELDS, [field("x", 1, "c", "tampered"), field("z", 1, "a")])
        owners = [field("x", 1, "c"), field("y", 1, "c"), field("w", 1, "b")]
        assert await repair(store, FIELDS, owners) == [(field("w", 1, "b"), Difference.MISSING)]
        kept = [field("w", 1, "b"), field("x", 1, "c", "tampered"), field("z", 1, "a")]
        assert await held(store, FIELDS) == kept


@settings(max_examples=100)
@given(st.data())
def test_a_repaired_copy_is_its_owners_but_for_what_is_newer(data: st.DataObject) -> None:
    """Rows of any versions, any of them tampered with; other owners' rows stay as they are."""
    keys = [(name, part) for name in "xyz" for part in (1, 2)]
    owners, local = [], []
    for name, part in keys:
        present = data.draw(st.integers(-1, 2))
        here = data.draw(st.integers(-1, 3))
        tampered = data.draw(st.booleans())
        if present >= 0:
            owners.append(thing(name, present, part=part))
        if here >= 0:
            local.append(thing(name, here, "tampered" if tampered else "", part=part))
    others = [thing(name, 1, "tampered", center="c", part=3) for name in "xyz"]

    async def run() -> None:
        async with temporary_store(SCHEMA) as store:
            await hold(store, THINGS, [*local, *others])
            await repair(store, THINGS, owners)
            there = {THINGS.key(row): row for row in owners}
            for row in await held(store, THINGS):
                newer = there[THINGS.key(row)][2] < row[2]
                assert row == there[THINGS.key(row)] or (newer and row in local)
            assert len(await held(store, THINGS)) == len(owners)
            assert await held(store, THINGS, "c") == others
            assert await repair(store, THINGS, owners) == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "row",
    [("x", 1, -(2**63), "", "b"), ("ä.b", 2**63 - 1, 0, "\0", "b"), (b"\xff", None, "", 0, 1)],
)
def test_rows_travel_unchanged(row: Row) -> None:
    (travelled,) = copies.encoded([row])
    assert copies.decoded(THINGS, [CopyRow.FromString(travelled.SerializeToString())]) == [row]


def test_keys_travel_unchanged_and_open_ends_stay_open() -> None:
    for key in (None, ("x", 1)):
        sent = copies.encoded_key(key) or CopyRow()
        assert copies.decoded_key(THINGS, sent) == key


def test_rows_and_keys_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="other columns"):
        copies.decoded(THINGS, copies.encoded([("x", 1)]))
    with pytest.raises(ValueError, match="other keys"):
        copies.decoded_key(THINGS, copies.encoded([("x",)])[0])
    with pytest.raises(TypeError, match="float"):
        copies.encoded([(1.5,)])


async def test_every_copied_table_is_as_its_schema_says() -> None:
    """Columns exist, the first are the primary key, and what is stored without `put` needs no more."""
    import account_svc.app
    import session_svc.app
    import transfer_svc.app

    for app in (account_svc.app, session_svc.app, transfer_svc.app):
        async with temporary_store(app.SCHEMA) as store:
            for table in (table for topic in app.TOPICS for table in topic.tables):
                rows = await store.read(
                    query(
                        'SELECT name, pk, "notnull", dflt_value FROM pragma_table_info(?)',
                        table.name,
                    )
                )
                keys = [name for name, pk, _, _ in sorted(rows, key=lambda row: row[1]) if pk]
                assert tuple(keys) == table.columns[: table.keys], table.name
                assert set(table.columns) <= {row[0] for row in rows}, table.name
                assert table.owner in table.columns, table.name
                needed = {name for name, _, notnull, default in rows if notnull and default is None}
                assert table.put or needed <= set(table.columns), table.name


def test_merged_is_said_of_whole_topics() -> None:
    """Their digests have a position of all centers; a topic of both kinds would have none."""
    assert CHANGES.merged
    assert all(table.merged for table in CHANGES.tables)


async def test_a_row_that_something_stands_in_the_way_of_holds_up_no_other() -> None:
    async with temporary_store(SCHEMA) as store:
        await store.write("unique", query("CREATE UNIQUE INDEX value ON thing (value)"))
        await hold(store, THINGS, [thing("a", value="wanted", center="c")])
        rows = [thing("x", value="wanted"), thing("y", value="free")]
        assert await install(store, THINGS, EVERYTHING, rows) == [rows[0]]
        assert await held(store, THINGS) == [rows[1]]
