"""A poisoned entry waits for an operator, holds nobody back, and can be applied late or given up."""

from collections.abc import AsyncIterator, Sequence
from sqlite3 import IntegrityError

import pytest
from structlog.testing import capture_logs

from account_svc import app as account_app
from account_svc import registry
from account_svc import store as accounts
from duohuo.internal.v1.log_pb2 import (
    AccountCreated,
    ApplicationChanged,
    CredentialChanged,
    LogEntry,
    LogRecord,
    ProfileChanged,
)
from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from duohuo.v1.operator_service_pb2 import (
    DropParkedRequest,
    EntryName,
    ListParkedRequest,
    ParkedAction,
    RetryParkedRequest,
    TransitFact,
)
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_DELIVERED,
    APPLICATION_STATE_QUEUED,
    APPLICATION_STATE_SUCCEEDED,
    Application,
    ApplicationState,
)
from runtime.dispatcher import Incoming
from runtime.store import SqliteStore, query
from sync_bus import facts
from sync_bus.bus import Delivery
from sync_bus.log import Road, latest_hlc, read_after
from sync_bus.node import ServiceNode
from tests.fakes import GENERATION, FakeClock, account, site, stamp, temporary_store
from tests.unit.bank import Bank, Center, bank
from transfer_svc import applications
from transfer_svc.ledger import LEDGER

ALICE, BOB, CAROL = account(0), account(2), account(4)
INCOMING = Incoming("", 5.0, operator="operator")
HOUR_MS = 3_600_000


class NoInspection:
    async def counts(self) -> dict[str, int]:
        return {}

    async def overdue(self) -> list[TransitFact]:
        return []

    async def facts(self) -> CollectFactsResponse:
        return CollectFactsResponse()


class NoBus:
    """Nothing is published and nothing arrives."""

    async def last_published(self, topic: str) -> LogEntry | None:
        raise AssertionError(topic)

    async def publish(self, topic: str, entries: Sequence[LogEntry]) -> None:
        raise AssertionError(topic, entries)

    def deliveries(self, source: str) -> AsyncIterator[Delivery]:
        raise AssertionError(source)

    def doubt(self, source: str) -> None:
        raise AssertionError(source)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(accounts.SCHEMA, account_app.TOPICS, ["b"]) as opened:
        yield opened


@pytest.fixture
def node(store: SqliteStore, clock: FakeClock) -> ServiceNode:
    """The account service of a, in a mesh of a and b."""
    here = site("a", "a", "b", clock=clock)
    return ServiceNode(
        account_app.ROLE,
        account_app.TOPICS,
        here,
        store,
        NoBus(),
        accounts.apply,
        NoInspection(),
    )


def created(seq: int, account_id: str, identifier: str) -> LogEntry:
    body = AccountCreated(account_id=account_id, identifier=identifier, request_id=f"request-{seq}")
    record = LogRecord(hlc=stamp(seq).hlc, time_ms=stamp(seq).time_ms, account_created=body)
    return LogEntry(
        topic="accounts", seq=seq, generation=GENERATION, record=record.SerializeToString()
    )


def renamed(seq: int, name: str, at_ms: int, account_id: str = ALICE) -> LogEntry:
    body = ProfileChanged(
        account_id=account_id, fields={"display_name": name}, request_id=f"request-{name}"
    )
    record = LogRecord(hlc=stamp(at_ms).hlc, profile_changed=body)
    return LogEntry(
        topic="changes", seq=seq, generation=GENERATION, record=record.SerializeToString()
    )


async def receive(node: ServiceNode, *entries: LogEntry) -> None:
    await node._replicator._apply("b", entries, Road.FEED)


async def parked(node: ServiceNode) -> list[tuple[str, int, str, str]]:
    listed = await node.ListParked(ListParkedRequest(), INCOMING)
    return [(one.name.topic, one.name.seq, one.reason, one.kind) for one in listed.entries]


async def retry(node: ServiceNode, name: EntryName | None = None) -> list[tuple[int, str, str]]:
    done = await node.RetryParked(RetryParkedRequest(name=name), INCOMING)
    return [(one.name.seq, one.before, one.after) for one in done.actions]


async def audit(node: ServiceNode) -> list[ParkedAction]:
    return list((await node.ListParked(ListParkedRequest(), INCOMING)).actions)


async def digests(store: SqliteStore) -> tuple[str, str]:
    return (
        await store.read(facts.digest_of(registry.ACCOUNTS, "b")),
        await store.read(facts.digest_of(accounts.CHANGES, "")),
    )


async def test_entries_that_break_a_constraint_or_cannot_be_decoded_wait_and_others_go_on(
    node: ServiceNode, store: SqliteStore
) -> None:
    garbage = LogEntry(topic="accounts", seq=3, generation=GENERATION, record=b"\xff garbage")
    taken = created(2, BOB, "alice@example.com")
    await receive(node, created(1, ALICE, "alice@example.com"), taken, garbage)
    await receive(node, created(4, CAROL, "carol@example.com"))
    assert await parked(node) == [
        ("accounts", 2, "IntegrityError", "account_created"),
        ("accounts", 3, "UNDECODABLE", ""),
    ]
    assert await store.read(accounts.counts()) == {"accounts": 2}
    road = next(one for one in await node._replicator.roads() if one.topic == "accounts")
    assert (road.cursor, road.parked) == (4, 2)


async def test_a_retry_after_the_cause_is_gone_gives_the_same_digests(
    node: ServiceNode, store: SqliteStore
) -> None:
    log = [created(1, ALICE, "alice@example.com"), created(2, BOB, "bob@example.com")]
    planted = "INSERT INTO account VALUES ('by hand', 'alice@example.com', '', 'a', 0)"
    await store.write("plant", query(planted))
    await receive(node, *log)
    assert await parked(node) == [("accounts", 1, "IntegrityError", "account_created")]
    await store.write("fix", query("DELETE FROM account WHERE account_id = 'by hand'"))
    assert await retry(node) == [(1, "parked: IntegrityError", "applied")]
    assert await parked(node) == []
    async with temporary_store(accounts.SCHEMA, account_app.TOPICS, ["b"]) as other:
        here = site("c", "c", "b")
        untroubled = ServiceNode(
            "account",
            account_app.TOPICS,
            here,
            other,
            NoBus(),
            accounts.apply,
            NoInspection(),
        )
        await receive(untroubled, *log)
        assert await digests(other) == await digests(store)


async def test_a_retry_that_fails_again_stays_parked_with_the_new_reason(
    node: ServiceNode, store: SqliteStore
) -> None:
    entry = renamed(1, "Alicia", 5)
    await store.write(
        "plant", query("INSERT INTO parked VALUES ('b', 'changes', 1, ?, 'OLD', 0)", entry.record)
    )
    await store.write(
        "forbid",
        query(
            "CREATE TRIGGER no BEFORE INSERT ON profile_field BEGIN SELECT RAISE(ABORT, 'no'); END"
        ),
    )
    assert await retry(node) == [(1, "parked: OLD", "parked: IntegrityError")]
    assert await retry(node) == [(1, "parked: IntegrityError", "parked: IntegrityError")]
    assert await parked(node) == [("changes", 1, "IntegrityError", "profile_changed")]
    assert await store.read(query("SELECT count(*) FROM request")) == [(0,)]


async def test_a_retry_is_out_of_order_and_the_newer_value_stays(
    node: ServiceNode, store: SqliteStore
) -> None:
    late = renamed(1, "Alicia", 5)
    await store.write(
        "plant",
        query("INSERT INTO parked VALUES ('b', 'changes', 1, ?, 'ValueError', 0)", late.record),
    )
    await store.write("plant", query("UPDATE cursor SET seq = 1 WHERE topic = 'changes'"))
    await receive(node, renamed(2, "Ali", 9))
    assert await retry(node) == [(1, "parked: ValueError", "applied")]
    assert await store.read(accounts.profile_fields(ALICE)) == [("display_name", "Ali")]
    assert await store.read(query("SELECT value FROM history")) == [("Alicia",)]


async def test_only_the_named_entry_is_retried(node: ServiceNode) -> None:
    await receive(
        node,
        *(
            LogEntry(topic="accounts", seq=seq, generation=GENERATION, record=b"\xff")
            for seq in (1, 2)
        ),
    )
    name = EntryName(source_center="b", topic="accounts", seq=2)
    assert await retry(node, name) == [(2, "parked: UNDECODABLE", "parked: UNDECODABLE")]
    name.seq = 3
    assert await retry(node, name) == []


async def test_a_dropped_entry_is_gone_and_its_audit_row_stays(
    node: ServiceNode, store: SqliteStore, clock: FakeClock
) -> None:
    await receive(node, LogEntry(topic="accounts", seq=1, generation=GENERATION, record=b"\xff"))
    clock.advance(7)
    name = EntryName(source_center="b", topic="accounts", seq=1)
    with capture_logs() as logged:
        dropped = await node.DropParked(DropParkedRequest(name=name), INCOMING)
        again = await node.DropParked(DropParkedRequest(name=name), INCOMING)
    assert again.actions == []
    assert [(line["event"], line["who"], line["target"]) for line in logged] == [
        ("operator action: drop parked entry", "operator", "b/accounts/1")
    ]
    assert await parked(node) == []
    (row,) = await audit(node)
    assert dropped.actions[0] == row
    assert (row.who, row.action, row.name, row.before, row.after) == (
        "operator",
        "drop",
        name,
        "parked: UNDECODABLE",
        "dropped",
    )
    assert row.time.ToMilliseconds() == clock.wall_ms()
    for change in ("DELETE FROM audit", "UPDATE audit SET who = 'nobody'"):
        with pytest.raises(IntegrityError, match="append-only"):
            await store.write("falsify", query(change))
    assert await audit(node) == [row]


async def test_the_effect_and_its_audit_row_commit_together_or_not_at_all(
    node: ServiceNode, store: SqliteStore
) -> None:
    await receive(node, LogEntry(topic="accounts", seq=1, generation=GENERATION, record=b"\xff"))
    await store.write(
        "forbid",
        query("CREATE TRIGGER no BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END"),
    )
    name = EntryName(source_center="b", topic="accounts", seq=1)
    with pytest.raises(IntegrityError):
        await node.DropParked(DropParkedRequest(name=name), INCOMING)
    assert len(await parked(node)) == 1


async def test_the_timestamp_of_a_retried_entry_is_believed(
    node: ServiceNode, store: SqliteStore
) -> None:
    entry = renamed(1, "Alicia", 5)
    await store.write(
        "plant",
        query("INSERT INTO parked VALUES ('b', 'changes', 1, ?, 'ValueError', 0)", entry.record),
    )
    await retry(node)
    assert await store.read(latest_hlc()) > stamp(5).hlc


async def test_a_password_parked_is_applied_without_being_shown(
    node: ServiceNode, store: SqliteStore
) -> None:
    secret = CredentialChanged(account_id=ALICE, password_hash="canary", request_id="request-1")
    record = LogRecord(hlc=stamp(1).hlc, credential_changed=secret).SerializeToString()
    await store.write(
        "plant", query("INSERT INTO parked VALUES ('b', 'changes', 1, ?, 'ValueError', 0)", record)
    )
    with capture_logs() as logged:
        listed = await node.ListParked(ListParkedRequest(), INCOMING)
        await retry(node)
    assert "canary" not in f"{listed}{logged}{await audit(node)}"
    credential = await store.read(accounts.find_credential(ALICE))
    assert credential is not None
    assert credential.password_hash == "canary"


async def test_an_entry_from_too_far_ahead_is_applied_once_the_clock_has_caught_up(
    node: ServiceNode, store: SqliteStore, clock: FakeClock
) -> None:
    ahead = renamed(1, "Alicia", 2 * HOUR_MS)
    garbage = LogEntry(topic="changes", seq=2, generation=GENERATION, record=b"\xff")
    await receive(node, ahead, garbage)
    assert [one[2] for one in await parked(node)] == ["TIMESTAMP_TOO_FAR_AHEAD", "UNDECODABLE"]
    clock.advance(HOUR_MS - 1)
    await node._replicator._retry_ahead("b")
    assert len(await parked(node)) == 2
    assert await audit(node) == []
    clock.jump(1)
    await node._replicator._retry_ahead("b")
    assert [one[2] for one in await parked(node)] == ["UNDECODABLE"]
    assert await store.read(accounts.profile_fields(ALICE)) == [("display_name", "Alicia")]
    (row,) = await audit(node)
    assert (row.who, row.before, row.after) == (
        "clock",
        "parked: TIMESTAMP_TOO_FAR_AHEAD",
        "applied",
    )
    assert node._replicator._stamps.hybrid.latest >= stamp(2 * HOUR_MS).hlc


# Money: a late posting adds its entry, and does not bring an old balance back.


async def park_next(made: Bank, source: str, target: str) -> None:
    """Parks the next entry from a source, as if something had been wrong with it."""
    here = made.centers[target]
    (entry,) = await made.centers[source].store.read(
        read_after("ledger", await _cursor(here, source), 1)
    )
    await here.store.write(
        "park",
        query(
            "INSERT INTO parked VALUES (?, 'ledger', ?, ?, 'ValueError', 0)",
            *(source, entry.seq, entry.record),
        ),
    )
    await here.store.write(
        "skip",
        query("UPDATE cursor SET seq = ? WHERE source = ? AND topic = 'ledger'", entry.seq, source),
    )


async def _cursor(center: Center, source: str) -> int:
    rows = await center.store.read(
        query("SELECT seq FROM cursor WHERE source = ? AND topic = 'ledger'", source)
    )
    return int(rows[0][0])


async def retry_all(center: Center) -> list[str]:
    node = ServiceNode(
        "transfer",
        (LEDGER,),
        center.site,
        center.store,
        NoBus(),
        center.inbound.apply,
        NoInspection(),
    )
    done = await node.RetryParked(RetryParkedRequest(), INCOMING)
    return [one.after for one in done.actions]


async def test_a_copy_does_not_go_back_when_an_earlier_posting_comes_late() -> None:
    async with bank("a", "b") as made:
        await made.deposit(ALICE, 100, "deposit-1")
        await made.pay(ALICE, BOB, 30, "transfer-1")
        await park_next(made, "a", "b")
        await made.deliver("a", "b")
        b = made.centers["b"]
        assert await b.balance(ALICE) == 70
        assert await retry_all(b) == ["applied"]
        assert await b.balance(ALICE) == 70
        rows = await b.store.read(
            query("SELECT last_number FROM ledger_account WHERE account_id = ?", ALICE)
        )
        assert rows == [(2,)]
        rows = await b.store.read(
            query("SELECT number, balance_after FROM entry WHERE account_id = ? ORDER BY 1", ALICE)
        )
        assert rows == [(1, 100), (2, 70)]


async def test_money_parked_on_its_way_arrives_once_it_is_retried() -> None:
    bob = account(1)
    async with bank("a", "b") as made:
        await made.deposit(ALICE, 100, "deposit-1")
        await made.deliver("a", "b")
        await made.pay(ALICE, bob, 30, "transfer-1")
        await park_next(made, "a", "b")
        await made.pay(ALICE, bob, 5, "transfer-2")
        await made.settle()
        assert await made.home(bob).balance(bob) == 5
        assert await retry_all(made.centers["b"]) == ["applied"]
        assert await retry_all(made.centers["b"]) == []
        await made.settle()
        assert await made.home(bob).balance(bob) == 35
        assert await made.transit() == {"CNY": 0}


@pytest.mark.parametrize("late", [APPLICATION_STATE_QUEUED, APPLICATION_STATE_DELIVERED])
async def test_a_copied_application_does_not_go_back(late: ApplicationState.ValueType) -> None:
    def changed(state: ApplicationState.ValueType) -> LogRecord:
        application = Application(
            application_id="q-b-001-" + "1" * 32,
            payer_account_id=ALICE,
            transfer_id="transfer-1",
            origin_center="b",
            state=state,
        )
        return LogRecord(application_changed=ApplicationChanged(application=application))

    async with bank("a", "b") as made:
        here = made.centers["a"]
        handler = here.inbound.apply
        for state in (APPLICATION_STATE_SUCCEEDED, late):
            await here.store.write("apply", handler("b", changed(state), stamp(1)))
        found = await here.store.read(applications.find("q-b-001-" + "1" * 32))
        assert found is not None
        assert found.message.state == APPLICATION_STATE_SUCCEEDED
