"""A snapshot stands in for entries that are gone: the same rows, and every effect exactly once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from account_svc import store as accounts
from account_svc.store import CHANGES
from duohuo.internal.v1.log_pb2 import POSTING_KIND_CREDIT, LogRecord
from duohuo.internal.v1.peer_services_pb2 import (
    CopyRequest,
    CopyResponse,
    PullRequest,
    SealRequest,
    SealResponse,
)
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_SUCCEEDED,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_REFUNDED,
)
from runtime.endpoint import Call, ask
from runtime.errors import RpcError
from runtime.methods import peer_method
from runtime.store import Unit, query
from sync_bus import copies, inbox, log, snapshot
from sync_bus.copies import Range
from tests.fakes import NOON_MS, FakeClock, account
from tests.unit.centers import Centers, Service, centers, until
from transfer_svc import applications
from transfer_svc.ledger import LEDGER

ALICE, BOB, CAROL = account(0), account(1), account(2)
"""At home at a, b and a; with three centers, Carol's is c."""


@pytest.fixture
async def two() -> AsyncIterator[Centers]:
    async with centers("a", "b") as made:
        await made.deposit(ALICE, 100, "deposit-1")
        await made.settle()
        yield made


async def forget(service: Service, entries_max: int = 0) -> None:
    """The center's logs keep no more than so many entries."""
    for topic in service.topics:
        await service.store.write("bound", log.bound(topic.name, entries_max))


async def needs_snapshot(service: Service, peer: str, topic: str = "ledger") -> bool:
    cursor = await service.cursor(peer, topic)
    call = Call(
        peer_method(service.role, "Pull"),
        PullRequest(topic=topic, after_seq=cursor).SerializeToString(),
        1.0,
    )
    try:
        async with aclosing(service.site.mesh.stream(peer, call)) as parts:  # type: ignore[type-var]
            async for _ in parts:
                pass
    except RpcError as error:
        return error.reason == "SNAPSHOT_NEEDED"
    return False


async def given(
    asker: Service, holder: str, source: str, topic: str = "ledger"
) -> list[CopyResponse]:
    request = CopyRequest(source=source, topic=topic).SerializeToString()
    call = Call(peer_method(asker.role, "Copy"), request, 1.0)
    return [CopyResponse.FromString(part) async for part in asker.site.mesh.stream(holder, call)]


class TestGiving:
    async def test_a_snapshot_holds_exactly_what_is_so_at_its_position(self, two: Centers) -> None:
        a, b = two.service("a"), two.service("b")
        start, *pages, end = await given(b, "a", "a")
        assert (start.start.seq, start.start.generation) == (1, 1)
        assert end.WhichOneof("part") == "end"
        tables = {table.name: table for table in LEDGER.tables}
        for table in tables.values():
            sent = [
                row for page in pages if page.page.table == table.name for row in page.page.rows
            ]
            held = await a.store.read(copies.rows_in(table, "a", Range()))
            assert copies.decoded(table, sent) == held

    async def test_what_is_written_meanwhile_is_not_in_it(self, two: Centers) -> None:
        b = two.service("b")
        request = CopyRequest(source="a", topic="ledger").SerializeToString()
        parts = b.site.mesh.stream("a", Call(peer_method("transfer", "Copy"), request, 1.0))
        start = CopyResponse.FromString(await anext(parts)).start
        await two.deposit(ALICE, 11, "deposit-2")
        pages = [CopyResponse.FromString(part).page async for part in parts]
        rows = {page.table: len(page.rows) for page in pages if page.table}
        assert start.seq == 1
        assert rows == {"ledger_account": 2, "entry": 2, "transfer": 1}

    async def test_whoever_has_a_copy_gives_it_and_its_own_position(self, two: Centers) -> None:
        a = two.service("a")
        await two.deposit(ALICE, 11, "only at a")
        start, *_ = await given(a, "b", "a")
        assert (start.start.seq, start.start.generation) == (1, 1)

    async def test_pages_are_bounded(self, two: Centers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(snapshot, "PAGE_ROWS_MAX", 1)
        parts = await given(two.service("b"), "a", "a")
        assert [len(part.page.rows) for part in parts[1:-1]] == [1] * 5

    async def test_so_many_at_once_and_no_more(self, two: Centers) -> None:
        b = two.service("b")
        request = CopyRequest(source="a", topic="ledger").SerializeToString()
        call = Call(peer_method("transfer", "Copy"), request, 1.0)
        running = [b.site.mesh.stream("a", call) for _ in range(snapshot.SNAPSHOTS_AT_ONCE_MAX)]
        for stream in running:
            await anext(stream)
        with pytest.raises(RpcError, match="SNAPSHOTS_BUSY"):
            await given(b, "a", "a")
        for stream in running:
            await stream.aclose()  # type: ignore[attr-defined] # generators
        servicer = two.service("a").node.servicers[1]
        await until(lambda: servicer._giving == 0)
        assert await given(b, "a", "a")

    async def test_an_incomplete_copy_is_not_given(self, two: Centers) -> None:
        b = two.service("b")
        await b.store.write("begin", inbox.begin_install("a", "ledger"))
        with pytest.raises(RpcError, match="COPY_INCOMPLETE"):
            await given(two.service("a"), "b", "a")
        sealed = await ask(
            two.lines["b"],
            peer_method("transfer", "Seal"),
            SealRequest(center="a"),
            SealResponse,
            1.0,
        )
        assert list(sealed.incomplete) == ["ledger"]

    @pytest.mark.parametrize(("source", "topic"), [("z", "ledger"), ("a", "accounts")])
    async def test_nobody_gives_what_there_is_not(
        self, two: Centers, source: str, topic: str
    ) -> None:
        with pytest.raises(RpcError, match="INVALID"):
            await given(two.service("b"), "a", source, topic)

    async def test_only_centers_of_the_mesh_seal_and_asking_seals_nothing(
        self, two: Centers
    ) -> None:
        async def seal(center: str, generation: int) -> SealResponse:
            request = SealRequest(center=center, generation=generation)
            method = peer_method("transfer", "Seal")
            return await ask(two.lines["b"], method, request, SealResponse, 1.0)

        with pytest.raises(RpcError, match="not a center"):
            await seal("z", 5)
        answer = await seal("a", 0)
        assert (answer.generation, answer.cursors["ledger"]) == (1, 1)
        assert (await seal("a", 5)).generation == 5
        assert (await seal("a", 4)).generation == 5


class TestInstalling:
    async def test_behind_a_log_that_is_short_a_snapshot_makes_copies_the_same(
        self, two: Centers
    ) -> None:
        for number in range(5):
            await two.deposit(ALICE, 1, f"while b is away {number}")
        await forget(two.service("a"), 2)
        b = two.service("b")
        assert await needs_snapshot(b, "a")
        await b.follow("a")
        assert await b.cursor("a", "ledger") == 6
        assert await b.balance(ALICE) == 105
        await two.check_same()
        await two.deposit(ALICE, 1, "goes on by the log")
        await b.follow("a")
        await two.settle()
        await two.check_same()

    async def test_behind_an_empty_log_too(self, two: Centers) -> None:
        await two.deposit(ALICE, 1, "forgotten")
        await forget(two.service("a"), 0)
        a, b = two.service("a"), two.service("b")
        assert await a.store.read(log.read_after("ledger", 0, 10)) == []
        assert await needs_snapshot(b, "a")
        await b.follow("a")
        assert not await needs_snapshot(b, "a")
        await two.check_same()

    async def test_a_follower_of_the_feed_hears_of_it_when_entries_come_later(self) -> None:
        """It waited at the end of an empty log; what it needs next is forgotten before it wakes."""
        async with centers("a", "b", role="account") as two:
            b = two.service("b")
            request = PullRequest(topic="changes", follow=True).SerializeToString()
            parts = b.site.mesh.stream("a", Call(peer_method("account", "Pull"), request, 1.0))
            growing = asyncio.create_task(two.service("a").node._growth.run())
            waiting = asyncio.ensure_future(anext(parts))
            await asyncio.sleep(0)
            now = two.service("a").site.stamps.now()

            def write_forget_and_write() -> Unit[None]:
                yield from accounts.set_profile("ann", {"name": "first"}, "edit-1", "a", now)
                yield from log.bound("changes", 0)
                yield from accounts.set_profile("ann", {"name": "second"}, "edit-2", "a", now)

            await two.service("a").store.write("edit", write_forget_and_write())
            with pytest.raises(RpcError, match="SNAPSHOT_NEEDED"):
                await waiting
            growing.cancel()

    @pytest.mark.parametrize("currency", ["CNY", "EUR"])
    async def test_what_entries_would_have_caused_happens_once(
        self, two: Centers, currency: str
    ) -> None:
        """b credits or refuses what came by snapshot, a settles what came by snapshot."""
        a, b = two.service("a"), two.service("b")
        await two.deposit(BOB, 5, "deposit-1", currency)
        for number in range(4):
            await two.pay(ALICE, BOB, 10, f"transfer-{number}")
        await b.follow("a")  # the first four by the log,
        for number in range(4, 8):
            await two.pay(ALICE, BOB, 10, f"transfer-{number}")
        await forget(a)
        assert await needs_snapshot(b, "a")
        await b.follow("a")  # the others not
        await forget(b)
        assert await needs_snapshot(a, "b")
        await a.follow("b")
        credited = currency == "CNY"
        for number in range(8):
            row = await a.transfer(ALICE, f"transfer-{number}")
            assert row is not None
            ended = TRANSFER_STATE_CREDITED if credited else TRANSFER_STATE_REFUNDED
            assert row.state == ended
        assert await a.balance(ALICE) == (20 if credited else 100)
        assert await b.balance(BOB) == (85 if credited else 5)
        await two.settle()
        await two.check_same()
        assert set((await two.transit()).values()) <= {0}

    async def test_a_credit_by_snapshot_tells_what_a_credit_by_entry_tells(
        self, two: Centers
    ) -> None:
        b = two.service("b")
        postings = []
        for transfer_id in ("by entry", "by snapshot"):
            await two.pay(ALICE, BOB, 10, transfer_id, application="application-1")
            if transfer_id == "by snapshot":
                await forget(two.service("a"))
            await b.follow("a")
            entry = (await b.store.read(log.read_after("ledger", 0, 10)))[-1]
            posting = LogRecord.FromString(entry.record).posting
            assert posting.kind == POSTING_KIND_CREDIT
            del posting.legs[:]
            posting.transfer_id = ""
            postings.append(posting)
        assert postings[0] == postings[1]

    async def test_an_application_hears_by_snapshot_how_it_was_decided(self, two: Centers) -> None:
        b = two.service("b")
        application = await two.apply("b", ALICE, CAROL, 30, "transfer-1")
        await two.pay(ALICE, CAROL, 30, "transfer-1", application=application)
        await forget(two.service("a"))
        for _ in range(2):
            await b.follow("a")
            row = await b.store.read(applications.find(application))
            assert row is not None
            assert row.message.state == APPLICATION_STATE_SUCCEEDED
        states = await b.store.read(log.read_after("applications", 0, 10))
        assert len(states) == 2  # queued, and succeeded

    @pytest.mark.parametrize("parts", range(5))
    async def test_it_is_broken_off_and_begun_again(self, two: Centers, parts: int) -> None:
        b = two.service("b")
        await two.pay(ALICE, BOB, 10, "transfer-1")
        await forget(two.service("a"))
        two.lines["a"].parts_left = parts
        with pytest.raises(RpcError, match="CENTER_UNREACHABLE"):
            await b.node._replicator._snapshots.install("a", "ledger")
        copy = await b.copy_of("a", "ledger")
        assert (copy.installing, copy.position.seq) == (True, 1)
        assert await b.balance(BOB) == 0  # nothing is done on half a snapshot
        await two.deposit(ALICE, 7, "meanwhile")
        entries = await two.service("a").store.read(log.read_after("ledger", 0, 10))
        await b.node._replicator._apply("a", entries, log.Road.JETSTREAM)
        assert (await b.copy_of("a", "ledger")).position.seq == 1
        two.answer("a")
        await b.follow("a")
        await two.settle()
        assert await b.balance(BOB) == 10
        await two.check_same()

    async def test_one_at_a_time_from_each_source(self, two: Centers) -> None:
        """A gap that the bus shows and the exchange at the same time: the second finds it done."""
        b = two.service("b")
        await two.deposit(ALICE, 1, "forgotten")
        await forget(two.service("a"))
        two.lines["a"].seen.clear()
        install = b.node._replicator._snapshots.install
        await asyncio.gather(install("a", "ledger"), install("a", "ledger"))
        assert [call.method.name for call in two.lines["a"].seen] == ["Copy"]

    async def test_a_snapshot_of_a_life_that_is_not_known_is_not_finished(
        self, two: Centers
    ) -> None:
        b = await two.recover("b")
        with pytest.raises(RpcError, match="CENTER_UNREACHABLE"):
            await b.node._replicator._snapshots.install("a", "ledger")
        assert (await b.copy_of("a", "ledger")).installing
        await b.follow("a")
        await two.settle()
        await two.check_same()

    async def test_a_snapshot_that_ends_after_its_life_was_sealed_does_not_count(
        self, two: Centers
    ) -> None:
        """Sealed, the copy was said to reach so far: further on it would have more than its source,
        which would take itself for lost."""
        b = two.service("b")
        await two.deposit(ALICE, 7, "in the snapshot")

        def seal_then_nothing(_source: str, _topic: str) -> Unit[int]:
            yield from inbox.seal("a", 10)
            return 0

        snapshots = b.node._replicator._snapshots
        snapshots._reconcile = seal_then_nothing
        with pytest.raises(RpcError):
            await snapshots.install("a", "ledger")
        copy = await b.copy_of("a", "ledger")
        assert (copy.generation, copy.position.seq, copy.installing) == (10, 1, True)

    async def test_a_snapshot_takes_the_place_of_what_was_there(self) -> None:
        """b had part of a snapshot of a's when a lost its disk, and with it a debit that c never got.
        Nothing may come of that debit."""
        async with centers("a", "b", "c") as three:
            await three.deposit(ALICE, 100, "deposit-1")
            await three.settle()
            await three.pay(ALICE, BOB, 30, "lost")
            await forget(three.service("a"))
            b = three.service("b")
            three.lines["a"].parts_left = 4  # all but its end
            with pytest.raises(RpcError):
                await b.node._replicator._snapshots.install("a", "ledger")
            a = await three.recover("a")
            three.answer("a")
            await three.settle()
            assert await a.balance(ALICE) == 100
            assert await b.balance(BOB) == 0
            await three.check_same()
            assert set((await three.transit()).values()) <= {0}

    async def test_a_diverged_copy_takes_no_snapshot(self, two: Centers) -> None:
        b = two.service("b")
        await two.deposit(ALICE, 7, "later")
        await b.store.write("diverge", query("UPDATE peer_life SET diverged = 1"))
        await b.node._replicator._snapshots.install("a", "ledger")
        assert await b.balance(ALICE) == 100
        assert not (await b.copy_of("a", "ledger")).installing


async def write_profile(service: Service, account_id: str, name: str) -> None:
    here = service.site.here
    unit = accounts.set_profile(
        account_id, {"display_name": name}, f"{name} at {here}", here, service.site.stamps.now()
    )
    await service.store.write("edit", unit)


async def profile(service: Service, account_id: str) -> dict[str, str]:
    return dict(await service.store.read(accounts.profile_fields(account_id)))


class TestMerged:
    async def test_the_newest_write_wins_whether_it_came_by_log_or_by_snapshot(self) -> None:
        async with centers("a", "b", "c", role="account") as three:
            await write_profile(three.service("a"), "ann", "of a")
            await three.settle()
            three.clock.advance(10)
            await write_profile(three.service("b"), "ann", "of b")
            three.clock.advance(10)
            await write_profile(three.service("c"), "ann", "of c")
            await forget(three.service("b"))
            a = three.service("a")
            await a.follow("c")
            await a.follow("b")  # by snapshot: older than what is here
            assert await profile(a, "ann") == {"display_name": "of c"}
            await three.settle()
            assert len({await three.service(n).digest("a", CHANGES) for n in "abc"}) == 1
            await three.check_same()

    async def test_a_write_after_a_snapshot_wins_over_what_came_with_it(self) -> None:
        """MONOTONE: c's clock is ahead, its write comes to b by log, and to a by b's snapshot alone."""
        async with centers("a", "b", "c", role="account") as three:
            ahead = three.start("c", three.service("c").store, FakeClock(NOON_MS + 600_000))
            await ahead.recovery.run()
            await write_profile(ahead, "ann", "of c")
            await three.service("b").follow("c")
            await forget(three.service("b"))
            await write_profile(three.service("b"), "ben", "of b")
            await forget(three.service("b"))
            a = three.service("a")
            assert await needs_snapshot(a, "b", "changes")
            await a.follow("b")
            assert await profile(a, "ann") == {"display_name": "of c"}
            await write_profile(a, "ann", "read that, and then wrote this")
            await three.settle()
            for name in "abc":
                found = await profile(three.service(name), "ann")
                assert found == {"display_name": "read that, and then wrote this"}

    async def test_a_write_after_a_recovery_wins_over_what_came_back(self) -> None:
        async with centers("a", "b", "c", role="account") as three:
            await write_profile(three.service("a"), "ben", "of a")
            ahead = three.start("c", three.service("c").store, FakeClock(NOON_MS + 600_000))
            await ahead.recovery.run()
            await write_profile(ahead, "ann", "of c")
            await three.service("b").follow("a")
            await three.service("b").follow("c")
            a = await three.recover("a")
            assert await profile(a, "ann") == {"display_name": "of c"}
            await write_profile(a, "ann", "read that, and then wrote this")
            await three.settle()
            for name in "abc":
                found = await profile(three.service(name), "ann")
                assert found == {"display_name": "read that, and then wrote this"}
            await three.check_same()
