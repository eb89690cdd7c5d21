"""A session is good until it expires, is ended or is revoked; its token is never stored."""

from collections.abc import AsyncIterator, Sequence
from itertools import permutations

import pytest

from duohuo.internal.v1.log_pb2 import LogRecord, SessionsRevoked
from runtime.hlc import HybridClock
from runtime.store import SqliteStore, query
from session_svc import store as units
from session_svc.sessions import USE_NOTED_EVERY_MS, Lifetimes, Sessions
from session_svc.store import (
    EXPIRED_AT_ONCE_MAX,
    REVOCATIONS,
    SESSIONS_MAX,
    SessionRow,
    token_hash,
)
from sync_bus import log
from sync_bus.log import Stamps
from tests.fakes import NOON_MS, SEAL, FakeClock, SeededIds, account, stamp, temporary_store

ALICE, BOB = account(1), account(2)
LIFETIME_MS = 1000
IDS = SeededIds()


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(units.SCHEMA, units.TOPICS, ["b"]) as opened:
        yield opened


async def login(store: SqliteStore, user: str, at_ms: int = 0) -> str:
    """A new session's token."""
    made, secret = stamp(at_ms), SEAL.token("a", IDS.secret())
    expire_ms = made.time_ms + LIFETIME_MS
    row = SessionRow(IDS.unique(), user, "phone", made.time_ms, expire_ms, made.time_ms)
    await store.write("login", units.add(token_hash(secret), row, made))
    return secret


def sessions(store: SqliteStore, at_ms: int = 0, idle_ms: int = LIFETIME_MS) -> Sessions:
    """The sessions as they are at a moment."""
    clock = FakeClock(NOON_MS + at_ms)
    stamps = Stamps(clock, HybridClock(clock))
    return Sessions("a", store, stamps, Lifetimes(LIFETIME_MS, idle_ms))


async def user_of(store: SqliteStore, secret: str, at_ms: int = 0) -> str:
    row = await sessions(store, at_ms).find(token_hash(secret))
    return row.account_id if row else ""


async def revoke(store: SqliteStore, user: str, at_ms: int, counter: int = 0) -> int:
    return await store.write("revoke", units.revoke_all("a", user, stamp(at_ms, counter)))


@pytest.mark.parametrize(("at_ms", "good"), [(0, True), (999, True), (1000, False), (1001, False)])
async def test_a_session_is_good_until_it_expires(
    store: SqliteStore, at_ms: int, good: bool
) -> None:
    secret = await login(store, ALICE)
    assert (await user_of(store, secret, at_ms) == ALICE) is good
    assert len(await sessions(store, at_ms).of_account(ALICE)) == good
    assert await sessions(store, at_ms).counts() == {"sessions": good}


async def test_a_token_opens_its_own_session_and_no_other(store: SqliteStore) -> None:
    alice, bob = await login(store, ALICE), await login(store, BOB)
    assert await user_of(store, alice) == ALICE
    assert await user_of(store, bob) == BOB
    assert await user_of(store, alice[:-1] + ("x" if alice[-1] != "x" else "y")) == ""


async def test_an_ended_session_is_over_and_may_be_ended_again(store: SqliteStore) -> None:
    first, second = await login(store, ALICE), await login(store, ALICE)
    for _ in range(2):
        await store.write("logout", units.remove(token_hash(first)))
    assert await user_of(store, first) == ""
    assert await user_of(store, second) == ALICE


async def test_revoking_ends_all_sessions_of_the_account_that_were_made_before(
    store: SqliteStore,
) -> None:
    old = [await login(store, ALICE, at_ms) for at_ms in (0, 4)]
    other, new = await login(store, BOB), await login(store, ALICE, 6)
    assert await revoke(store, ALICE, 5) == 2
    assert [await user_of(store, secret) for secret in (*old, other, new)] == ["", "", BOB, ALICE]
    assert await revoke(store, ALICE, 5) == 0


@pytest.mark.parametrize(("at_ms", "counter", "over"), [(5, 0, False), (5, 1, True), (4, 9, False)])
async def test_before_means_by_the_hybrid_clock(
    store: SqliteStore, at_ms: int, counter: int, over: bool
) -> None:
    secret = await login(store, ALICE, 5)
    record = LogRecord(
        hlc=stamp(at_ms, counter).hlc, sessions_revoked=SessionsRevoked(account_id=ALICE)
    )
    await store.write("apply", units.apply("b", record, stamp(99)))
    assert (await user_of(store, secret) == "") is over


async def applied(store: SqliteStore, center: str, at_ms: int) -> None:
    """Another center's revocation of Alice's sessions."""
    record = LogRecord(hlc=stamp(at_ms).hlc, sessions_revoked=SessionsRevoked(account_id=ALICE))
    await store.write("apply", units.apply(center, record, stamp(99)))


@pytest.mark.parametrize(
    "order", sorted(set(permutations([("a", 5), ("b", 3), ("b", 7), ("b", 7)]))), ids=str
)
async def test_of_all_revocations_each_centers_last_is_kept_in_whatever_order_they_come(
    store: SqliteStore, order: Sequence[tuple[str, int]]
) -> None:
    for center, at_ms in order:
        if center == "a":
            await revoke(store, ALICE, at_ms)
        else:
            await applied(store, center, at_ms)
    kept = await store.read(query("SELECT account_id, center, hlc FROM revocation"))
    assert sorted(kept) == [(ALICE, "a", stamp(5).hlc), (ALICE, "b", stamp(7).hlc)]


async def test_an_older_revocation_that_comes_later_ends_what_was_made_before_it(
    store: SqliteStore,
) -> None:
    """Such as after a session table that was restored from before both."""
    await applied(store, "b", 7)
    await store.write(
        "restore",
        query(
            "INSERT INTO session VALUES (x'00', 's', ?, '', ?, 0, ?, 0)",
            ALICE,
            stamp(2).hlc,
            NOON_MS + LIFETIME_MS,
        ),
    )
    new = await login(store, ALICE, 8)
    await applied(store, "b", 3)
    assert [row.create_ms - NOON_MS for row in await store.read(units.of_account(ALICE))] == [8]
    assert await user_of(store, new) == ALICE


@pytest.mark.parametrize(("at_ms", "counter", "over"), [(5, 0, False), (5, 1, True), (4, 9, False)])
async def test_a_session_of_before_a_revocation_is_not_stored_after_it(
    store: SqliteStore, at_ms: int, counter: int, over: bool
) -> None:
    await revoke(store, ALICE, at_ms, counter)
    await applied(store, "b", 1)
    session, others = await login(store, ALICE, 5), await login(store, BOB, 0)
    assert (await user_of(store, session) == "") is over
    assert await user_of(store, others) == BOB


async def test_a_revocation_is_told_to_the_other_centers_even_if_nothing_ended_here(
    store: SqliteStore,
) -> None:
    await revoke(store, ALICE, 5)
    (entry,) = await store.read(log.read_after(REVOCATIONS.name, 0, 10))
    record = LogRecord.FromString(entry.record)
    assert record.sessions_revoked.account_id == ALICE
    assert record.hlc == stamp(5).hlc


async def test_a_record_of_another_service_is_refused(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match="not a record of this service"):
        await store.write("apply", units.apply("b", LogRecord(), stamp(0)))


async def test_the_token_itself_is_nowhere_in_the_database(store: SqliteStore) -> None:
    secret = await login(store, ALICE)
    await revoke(store, BOB, 5)
    sessions = await store.read(query("SELECT * FROM session"))
    stored = repr([sessions, await store.read(query("SELECT * FROM log"))])
    assert ALICE in stored
    assert secret not in stored
    assert secret.removeprefix("s-a-") not in stored


async def test_logins_forget_what_has_expired_a_bounded_number_at_a_time(
    store: SqliteStore,
) -> None:
    for number in range(EXPIRED_AT_ONCE_MAX + 5):
        await login(store, account(3, number))

    async def kept() -> int:
        return int((await store.read(query("SELECT count(*) FROM session")))[0][0])

    current = await login(store, BOB, LIFETIME_MS)
    assert await kept() == 6
    await login(store, BOB, LIFETIME_MS)
    assert await kept() == 2
    assert await user_of(store, current, LIFETIME_MS) == BOB


async def test_an_accounts_sessions_are_listed_newest_first(store: SqliteStore) -> None:
    for at_ms in (2, 1, 3):
        await login(store, ALICE, at_ms)
    listed = await store.read(units.of_account(ALICE))
    assert [row.create_ms - NOON_MS for row in listed] == [3, 2, 1]


async def test_a_new_session_ends_the_oldest_of_very_many(store: SqliteStore) -> None:
    first, second, *_ = [await login(store, ALICE, at_ms) for at_ms in range(SESSIONS_MAX)]
    other = await login(store, BOB)
    await login(store, ALICE, SESSIONS_MAX)
    assert [await user_of(store, one) for one in (first, second, other)] == ["", ALICE, BOB]


async def test_a_session_that_is_not_used_ends_before_its_time(store: SqliteStore) -> None:
    minute = USE_NOTED_EVERY_MS
    secret = SEAL.token("a", IDS.secret())
    row = SessionRow("a-1", ALICE, "phone", NOON_MS, NOON_MS + 100 * minute, NOON_MS)
    await store.write("login", units.add(token_hash(secret), row, stamp(0)))

    async def used(at_ms: int) -> bool:
        found = await sessions(store, at_ms, idle_ms=10 * minute).find(token_hash(secret))
        return found is not None

    assert await used(minute - 1)  # not noted: too soon
    assert await used(9 * minute)
    assert await used(18 * minute)
    (listed,) = await sessions(store, 20 * minute, idle_ms=10 * minute).of_account(ALICE)
    assert listed.last_use_ms == NOON_MS + 18 * minute
    assert not await used(28 * minute)
    assert await sessions(store, 28 * minute, idle_ms=10 * minute).of_account(ALICE) == []


async def test_no_session_lasts_longer_because_the_clock_is_set_back(store: SqliteStore) -> None:
    secret = await login(store, ALICE)
    clock = FakeClock(NOON_MS + LIFETIME_MS)
    stamps = Stamps(clock, HybridClock(clock))
    late = Sessions("a", store, stamps, Lifetimes(LIFETIME_MS, LIFETIME_MS))
    stamps.now()
    assert await late.find(token_hash(secret)) is None
    clock.jump(-86_400_000)
    assert await late.find(token_hash(secret)) is None


async def test_one_session_is_ended_by_its_name_and_its_users_alone(store: SqliteStore) -> None:
    mine, other = await login(store, ALICE), await login(store, ALICE)
    name = (await store.read(units.find(token_hash(mine)))).session_id  # type: ignore[union-attr] # it is there
    await sessions(store).end(BOB, name)
    assert await user_of(store, mine) == ALICE
    for _ in range(2):
        await sessions(store).end(ALICE, name)
    assert [await user_of(store, one) for one in (mine, other)] == ["", ALICE]


async def test_a_revocation_may_keep_one_session_here_and_elsewhere(store: SqliteStore) -> None:
    kept, over = await login(store, ALICE), await login(store, ALICE)
    row = await store.read(units.find(token_hash(kept)))
    assert row is not None
    await store.write("revoke", units.revoke_all("a", ALICE, stamp(5), row.session_id))
    assert [await user_of(store, one) for one in (kept, over)] == [ALICE, ""]
    (entry,) = await store.read(log.read_after(REVOCATIONS.name, 0, 10))
    record = LogRecord.FromString(entry.record)
    async with temporary_store(units.SCHEMA, units.TOPICS, ["a"]) as elsewhere:
        late = SessionRow("b-1", ALICE, "phone", NOON_MS, NOON_MS + LIFETIME_MS, NOON_MS)
        await elsewhere.write("apply", units.apply("a", record, stamp(5)))
        for hashed, one in ((b"1", late), (b"2", late._replace(session_id=row.session_id))):
            await elsewhere.write("add", units.add(hashed, one, stamp(4)))
        stored = await elsewhere.read(units.of_account(ALICE))
        assert [one.session_id for one in stored] == [row.session_id]
    # The next one keeps another, or none.
    assert await revoke(store, ALICE, 6) == 1
