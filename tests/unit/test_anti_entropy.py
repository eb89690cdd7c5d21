"""What differs from its owner although it should not is found and repaired; nothing else is touched."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from unittest.mock import patch

import pytest
import structlog.testing

from account_svc import store as accounts
from account_svc.registry import ACCOUNTS, AccountRow
from account_svc.store import CHANGES
from duohuo.internal.v1.peer_services_pb2 import CopyPage
from duohuo.v1.transfer_service_pb2 import APPLICATION_STATE_QUEUED, Application
from ops.verify import judge
from runtime.errors import RpcError
from runtime.grpc_client import MESSAGE_BYTES_MAX
from runtime.identifiers import IDENTIFIER_LENGTH_MAX
from runtime.placement import slot_of
from runtime.store import Row, query
from sync_bus import anti_entropy, copies
from sync_bus.copies import CopiedTable, Range
from sync_bus.log import Topic
from sync_bus.snapshot import PAGE_ROWS_MAX
from tests.fakes import account, stamp
from tests.unit.centers import Centers, Service, centers, until
from transfer_svc import applications
from transfer_svc.applications import APPLICATIONS
from transfer_svc.ledger import LEDGER
from transfer_svc.rules import MEMO_LENGTH_MAX

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""
TABLES = {table.name: (topic, table) for topic in (LEDGER, APPLICATIONS) for table in topic.tables}


@pytest.fixture
async def two() -> AsyncIterator[Centers]:
    """a and b, with money, transfers both ways and an application, all of it everywhere."""
    async with centers("a", "b") as made:
        await made.deposit(ALICE, 100, "deposit-1")
        await made.deposit(BOB, 100, "deposit-1")
        for number in range(3):
            await made.pay(ALICE, BOB, 10, f"there-{number}")
            await made.pay(BOB, ALAN, 5, f"back-{number}")
        application = Application(
            application_id="application-1",
            transfer_id="applied",
            state=APPLICATION_STATE_QUEUED,
            payer_account_id=ALICE,
            origin_center="a",
        )
        unit = applications.accept(application, b"body", "a", stamp(0))
        await made.service("a").store.write("accept", unit)
        await made.settle()
        yield made


async def by_hand(service: Service, statement: str, *values: str | int) -> None:
    await service.store.write("by hand", query(statement, *values))


async def compare_all(service: Service, peer: str) -> None:
    for topic in service.topics:
        for table in topic.tables:
            after: Row | None = None
            while True:
                after = await service.anti_entropy.compare(peer, topic, table, after)
                if after is None:
                    break


async def rows(service: Service, table: CopiedTable, owner: str) -> list[Row]:
    return await service.store.read(copies.rows_in(table, owner, Range()))


BY_HAND = [
    ("ledger_account", "UPDATE ledger_account SET balance = balance + 1 WHERE center = 'a'", 4),
    ("entry", "UPDATE entry SET memo = 'by hand' WHERE center = 'a' AND number = 1", 4),
    ("entry", "DELETE FROM entry WHERE center = 'a' AND number = 2", 3),
    ("received", "DELETE FROM received WHERE center = 'a'", 3),
    ("received", "INSERT INTO received VALUES ('~', 'by hand', 'b', '', 'a')", 1),
    ("transfer", "UPDATE transfer SET memo = 'by hand' WHERE center = 'a'", 4),
    ("transfer", "UPDATE transfer SET state = 2 WHERE center = 'a' AND transfer_id = 'there-1'", 1),
    ("transfer", "DELETE FROM transfer WHERE center = 'a' AND transfer_id = 'there-1'", 1),
    ("application", "DELETE FROM application WHERE origin = 'a'", 1),
    ("application", "UPDATE application SET message = x'00' WHERE origin = 'a'", 1),
    ("application", "UPDATE application SET body_hash = x'00' WHERE origin = 'a'", 1),
]


@pytest.mark.parametrize(("name", "statement", "count"), BY_HAND, ids=str)
async def test_a_copy_changed_by_hand_is_repaired_counted_and_told(
    two: Centers, name: str, statement: str, count: int
) -> None:
    a, b = two.service("a"), two.service("b")
    _, table = TABLES[name]
    await by_hand(b, statement)
    assert not judge(await two.facts(), ["a", "b"]).passed
    with structlog.testing.capture_logs() as told:
        await compare_all(b, "a")
    assert await rows(b, table, "a") == await rows(a, table, "a")
    assert await b.repaired() == {"a": count}
    assert [(line["event"], line["table"]) for line in told] == [("copy repaired", name)] * count
    await two.check_same()
    await compare_all(b, "a")
    assert await b.repaired() == {"a": count}


async def test_copies_that_are_the_same_cost_one_digest(two: Centers) -> None:
    a, b = two.service("a"), two.service("b")
    await compare_all(b, "a")
    await compare_all(a, "b")
    assert await a.repaired() == {"b": 0}
    assert await b.repaired() == {"a": 0}


async def test_an_owner_that_asks_its_copies_repairs_nothing_of_its_own(two: Centers) -> None:
    """The owner is right, also when somebody changed it by hand: the copies follow it."""
    a, b = two.service("a"), two.service("b")
    await by_hand(a, "UPDATE transfer SET memo = 'by hand' WHERE center = 'a'")
    own = await rows(a, TABLES["transfer"][1], "a")
    await compare_all(a, "b")
    assert await rows(a, TABLES["transfer"][1], "a") == own
    await compare_all(b, "a")
    assert await rows(b, TABLES["transfer"][1], "a") == own


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("entry", "UPDATE entry SET memo = 'by hand' WHERE center = 'a' AND number = 1"),
        ("entry", "UPDATE entry SET minor_units = minor_units + 1 WHERE center = 'a'"),
        ("entry", "DELETE FROM entry WHERE center = 'a' AND number = 2"),
        ("ledger_account", "UPDATE ledger_account SET balance = balance + 1 WHERE center = 'a'"),
        ("ledger_account", "UPDATE ledger_account SET head = x'00' WHERE center = 'a'"),
    ],
)
async def test_an_owners_rows_that_do_not_fit_their_chain_are_not_spread(
    two: Centers, name: str, statement: str
) -> None:
    """The copies keep what was posted: from them people can see what it was."""
    a, b = two.service("a"), two.service("b")
    table = TABLES[name][1]
    posted = await rows(b, table, "a")
    await by_hand(a, statement)
    with structlog.testing.capture_logs() as told:
        await compare_all(b, "a")
    assert await rows(b, table, "a") == posted
    assert {line["event"] for line in told} == {"owner not believed"}
    assert await b.repaired() == {"a": 0}
    assert not judge(await two.facts(), ["a", "b"]).passed


async def test_many_rows_are_compared_some_at_a_time(two: Centers) -> None:
    b = two.service("b")
    await by_hand(b, "DELETE FROM entry WHERE center = 'a'")
    missing = len(await rows(two.service("a"), TABLES["entry"][1], "a"))
    with (
        patch.object(anti_entropy, "COMPARED_ROWS_MAX", 2),
        patch("sync_bus.snapshot.COMPARED_ROWS_MAX", 2),
    ):
        await compare_all(b, "a")
        await by_hand(
            b,
            "INSERT INTO entry SELECT '~' || account_id, number, center, kind,"
            " transfer_id, minor_units, balance_after, counterparty, memo, time_ms, hash"
            " FROM entry WHERE center = 'a'",
        )
        await compare_all(b, "a")
    assert await b.repaired() == {"a": 2 * missing}
    await two.check_same()


@pytest.mark.parametrize("compared", [2, 3, 5, 100])
async def test_what_differs_comes_in_pages_however_many_rows_are_compared(
    two: Centers, compared: int
) -> None:
    b = two.service("b")
    await by_hand(b, "DELETE FROM entry WHERE center = 'a' AND number > 1")
    missing = len(await rows(two.service("a"), TABLES["entry"][1], "a")) - 4
    with (
        patch.object(anti_entropy, "COMPARED_ROWS_MAX", compared),
        patch("sync_bus.snapshot.COMPARED_ROWS_MAX", compared),
        patch("sync_bus.snapshot.PAGE_ROWS_MAX", 2),
    ):
        await compare_all(b, "a")
    assert await b.repaired() == {"a": missing}
    await two.check_same()


def test_the_longest_rows_fit_into_a_message() -> None:
    """Letters of four bytes everywhere, and some to spare."""
    letter, name = "\N{CJK UNIFIED IDEOGRAPH-20000}", "n" * 64
    memo, identifier = letter * MEMO_LENGTH_MAX, "i" * IDENTIFIER_LENGTH_MAX
    application = Application(
        application_id=name,
        transfer_id=name,
        payer_account_id=name,
        payee_account_id=name,
        payee_identifier=identifier,
        memo=memo,
        reason=name,
    ).SerializeToString()
    longest = {
        "application": (*[name] * 4, b"h" * 32, 1, 2**60, application),
        "transfer": (name, name, b"h" * 32, name, *"aC", 2**60, memo, 3, name, name, 2**60, "a"),
        "entry": (name, 2**60, "a", 1, name, 2**60, 2**60, name, memo, 2**60),
        "history": (name, name, 2**60, "a", letter * 64),
        "account": (name, identifier, name, "a", 2**60),
    }
    for row in longest.values():
        page = CopyPage(rows=copies.encoded([row] * PAGE_ROWS_MAX))
        assert page.ByteSize() < MESSAGE_BYTES_MAX * 0.9


async def test_what_is_on_its_way_is_no_difference(two: Centers) -> None:
    """The owner's answer is of a position that is not reached here in time: another time, then."""
    b = two.service("b")
    await two.deposit(ALICE, 1, "on its way")
    with patch.object(anti_entropy, "CATCH_UP_S_MAX", 0):
        await compare_all(b, "a")
    assert await b.repaired() == {"a": 0}
    await b.follow("a")
    await two.check_same()


async def test_a_difference_is_looked_at_once_the_copy_has_caught_up(two: Centers) -> None:
    """Meanwhile it goes on applying; what comes behind the owner's answer stays."""
    a, b = two.service("a"), two.service("b")
    await by_hand(b, "DELETE FROM entry WHERE center = 'a' AND number = 1")
    await two.deposit(ALICE, 1, "on its way")
    topic, table = TABLES["entry"]
    missing = len(await rows(a, table, "a")) - len(await rows(b, table, "a")) - 2
    two.lines["a"].seen.clear()
    comparing = asyncio.create_task(b.anti_entropy.compare("a", topic, table))
    await until(lambda: bool(two.lines["a"].seen))
    await two.deposit(ALICE, 1, "later")
    await b.follow("a")
    await comparing
    assert await b.repaired() == {"a": missing}
    await two.check_same()


@pytest.mark.parametrize(
    "state",
    [
        "UPDATE cursor SET installing = 1 WHERE source = 'a'",
        "UPDATE peer_life SET diverged = 1 WHERE source = 'a'",
        "UPDATE peer_life SET generation = 2 WHERE source = 'a'",
        "INSERT INTO parked VALUES ('a', 'ledger', 1, x'', 'ValueError', 0)",
        "UPDATE cursor SET seq = seq + 1 WHERE source = 'a'",
    ],
    ids=["installing", "diverged", "another life", "parked", "ahead of its owner"],
)
async def test_a_copy_that_cannot_be_compared_is_left_alone(two: Centers, state: str) -> None:
    b = two.service("b")
    await by_hand(b, "DELETE FROM entry WHERE center = 'a'")
    await by_hand(b, state)
    await compare_all(b, "a")
    assert await b.repaired() == {"a": 0}
    assert await rows(b, TABLES["entry"][1], "a") == []


async def test_the_copies_are_walked_for_ever(two: Centers) -> None:
    b = two.service("b")
    with patch.object(anti_entropy, "PAUSE_S", 0):
        running = asyncio.create_task(b.anti_entropy.run())
        for round_ in (1, 2):
            await by_hand(b, "DELETE FROM entry WHERE center = 'a' AND number = 1")
            two.hush("a")  # as long as nobody answers, nothing can be said
            await asyncio.sleep(0)
            two.answer("a")
            deleted = 4 * round_
            for _ in range(1000):
                if (await b.repaired())["a"] == deleted:
                    break
                await asyncio.sleep(0)
            assert await b.repaired() == {"a": deleted}
        running.cancel()


async def test_only_copied_tables_and_known_topics_are_compared(two: Centers) -> None:
    b = two.service("b")
    unknown = CopiedTable("life", ("one",), 1, "one")
    topic = Topic("unknown", LEDGER.road, (unknown,))
    with pytest.raises(RpcError, match="is not copied"):
        await b.anti_entropy.compare("a", Topic("ledger", LEDGER.road), TABLES["application"][1])
    with pytest.raises((RpcError, IndexError)):
        await b.anti_entropy.compare("a", topic, TABLES["entry"][1])


def _at_home_at_a(name: str, centers: int) -> str:
    return next(one for number in count() if slot_of(one := f"{name}{number}") % centers == 0)


# At home at a, of two centers and of three.
ANN, BEN = _at_home_at_a("ann", 6), _at_home_at_a("ben", 6)


async def register(two: Centers, name: str) -> None:
    a = two.service("a")
    now = a.site.stamps.now()
    row = AccountRow(account(slot_of(name)), name, f"request {name}", "a", now.time_ms)
    unit = accounts.register(row, "hash", {"display_name": name}, now)
    await a.store.write("register", unit)


async def test_each_writer_of_a_merged_table_is_right_about_its_own_rows() -> None:
    async with centers("a", "b", "c", role="account") as three:
        await register(three, ANN)
        await register(three, BEN)
        await three.settle()
        ann = account(slot_of(ANN))
        c = three.service("c")
        unit = accounts.set_profile(ann, {"display_name": "of c"}, "edit", "c", c.site.stamps.now())
        await c.store.write("edit", unit)
        await three.settle()
        b = three.service("b")
        await by_hand(b, "UPDATE profile_field SET value = 'by hand'")
        await by_hand(b, "DELETE FROM credential")
        await by_hand(b, "UPDATE history SET value = 'by hand'")
        await compare_all(b, "a")
        assert (await b.repaired())["a"] == 4  # ben's name, two passwords, ann's earlier name
        await compare_all(b, "c")
        assert (await b.repaired())["c"] == 1
        for topic in (ACCOUNTS, CHANGES):
            assert len({await three.service(n).digest("a", topic) for n in "abc"}) == 1


async def test_claims_that_were_exchanged_by_hand_are_put_right() -> None:
    """Each in turn has an identifier that the other should have."""
    async with centers("a", "b", role="account") as two:
        await register(two, ANN)
        await register(two, BEN)
        await two.settle()
        b = two.service("b")
        for was, becomes in ((ANN, "x"), (BEN, ANN), ("x", BEN)):
            await by_hand(b, "UPDATE account SET identifier = ? WHERE identifier = ?", becomes, was)
        await compare_all(b, "a")
        assert await b.repaired() == {"a": 2}
        await two.check_same()


async def test_a_claim_that_was_planted_by_hand_makes_room_for_the_right_one() -> None:
    async with centers("a", "b", role="account") as two:
        await register(two, ANN)
        await two.settle()
        b = two.service("b")
        await by_hand(b, "UPDATE account SET account_id = '~'")
        await compare_all(b, "a")
        assert await b.repaired() == {"a": 2}
        await two.check_same()


async def test_what_stands_in_the_way_of_a_repair_is_told_and_stops_nothing_else() -> None:
    """Somebody gave ann's identifier, at b, to an account of b's own."""
    async with centers("a", "b", role="account") as two:
        await register(two, ANN)
        await register(two, BEN)
        await two.settle()
        b = two.service("b")
        await by_hand(
            b, "UPDATE account SET account_id = '~', source = 'b' WHERE identifier = ?", ANN
        )
        await by_hand(b, "DELETE FROM credential")
        with structlog.testing.capture_logs() as told:
            await compare_all(b, "a")
        assert [line["event"] for line in told] == ["copy cannot be repaired"] + [
            "copy repaired"
        ] * 2
        assert told[0]["reason"] == "IntegrityError"
        await by_hand(b, "DELETE FROM account WHERE account_id = '~'")
        await compare_all(b, "a")
        await two.check_same()


async def test_a_lost_store_is_not_spread(two: Centers) -> None:
    a, b = two.service("a"), two.service("b")
    await a.recovery.mark_lost()
    with pytest.raises(RpcError, match="CENTER_RECOVERING"):
        await compare_all(b, "a")
