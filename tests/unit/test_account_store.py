"""Accounts are claimed once; passwords and profiles become the same everywhere, in whatever order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from account_svc import registry
from account_svc import store as units
from account_svc.registry import AccountRow
from account_svc.store import TOPICS
from duohuo.internal.v1.log_pb2 import AccountCreated, CredentialChanged, LogRecord, ProfileChanged
from runtime.store import SqliteStore, query
from sync_bus import facts, log
from sync_bus.merge import Version
from tests.fakes import account, stamp, temporary_store

ALICE, BOB = account(1), account(2)
ROW = AccountRow(ALICE, "alice@example.com", "request-1", "a", 0)


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(units.SCHEMA, TOPICS, ["b"]) as opened:
        yield opened


async def register(store: SqliteStore, row: AccountRow = ROW, stored: str = "hash") -> bool:
    unit = units.register(row, stored, {"display_name": "Alice"}, stamp(0))
    return await store.write("register", unit)


async def change_password(
    store: SqliteStore,
    password: str,
    request_id: str,
    at_ms: int,
    replaces: Version | None = None,
) -> bool:
    unit = units.set_password(ALICE, password, request_id, "a", stamp(at_ms), replaces=replaces)
    return await store.write("set password", unit)


async def set_profile(
    store: SqliteStore, request_id: str, at_ms: int, center: str = "a", **fields: str
) -> None:
    unit = units.set_profile(ALICE, fields, request_id, center, stamp(at_ms))
    await store.write("set profile", unit)


async def password(store: SqliteStore) -> str:
    credential = await store.read(units.find_credential(ALICE))
    return credential.password_hash if credential else ""


async def profile(store: SqliteStore) -> dict[str, str]:
    return dict(await store.read(units.profile_fields(ALICE)))


async def history(store: SqliteStore) -> list[tuple[str, str]]:
    rows = await store.read(query("SELECT name, value FROM history ORDER BY hlc, name"))
    return [(name, value) for name, value in rows]


async def heads(store: SqliteStore) -> dict[str, int]:
    return await store.read(log.heads())


async def test_registering_makes_account_password_and_profile_and_tells_the_others(
    store: SqliteStore,
) -> None:
    assert await register(store)
    assert await store.read(registry.find_account(ALICE)) == ROW
    assert await store.read(registry.find_by_identifier("alice@example.com")) == ROW
    assert await password(store) == "hash"
    assert await profile(store) == {"display_name": "Alice"}
    assert await heads(store) == {"accounts": 1, "changes": 2}


async def test_an_identifier_is_claimed_once(store: SqliteStore) -> None:
    """Who asks later is told who has it, and leaves nothing behind."""
    await register(store)
    later = AccountRow(BOB, ROW.identifier, "request-2", "a", 5)
    assert not await register(store, later, "other")
    assert await store.read(registry.find_account(BOB)) is None
    assert await password(store) == "hash"
    assert await heads(store) == {"accounts": 1, "changes": 2}


async def test_the_same_request_again_is_the_same_account(store: SqliteStore) -> None:
    await register(store)
    again = ROW._replace(account_id=BOB, create_ms=5)
    assert not await register(store, again)
    assert await store.read(units.counts()) == {"accounts": 1}


async def test_a_request_carried_out_twice_is_carried_out_once(store: SqliteStore) -> None:
    await register(store)
    for at_ms, name in ((1, "Alicia"), (2, "Mallory")):
        await set_profile(store, "request-2", at_ms, display_name=name)
    assert await profile(store) == {"display_name": "Alicia"}
    for at_ms, new in ((3, "new"), (4, "newer")):
        assert await change_password(store, new, "request-3", at_ms)
    assert await password(store) == "new"
    assert await heads(store) == {"accounts": 1, "changes": 4}
    assert await store.read(units.seen(ALICE, "request-3")) is not None
    assert await store.read(units.seen(BOB, "request-3")) is None


async def test_a_password_replaces_only_the_one_that_was_proved(store: SqliteStore) -> None:
    await register(store)
    credential = await store.read(units.find_credential(ALICE))
    assert credential is not None
    assert await change_password(store, "second", "request-2", 1, replaces=credential.version)
    assert not await change_password(store, "third", "request-3", 2, replaces=credential.version)
    assert await password(store) == "second"
    assert await heads(store) == {"accounts": 1, "changes": 3}


async def test_a_password_that_is_not_here_replaces_nothing(store: SqliteStore) -> None:
    assert not await change_password(store, "new", "request-2", 1, replaces=Version(1, "a"))
    assert await password(store) == ""


async def test_losers_are_kept_in_the_history_but_never_a_password(store: SqliteStore) -> None:
    await register(store, stored="hash-1")
    await change_password(store, "hash-2", "request-2", 5)
    await change_password(store, "hash-old", "request-3", 3)
    await set_profile(store, "request-4", 7, display_name="Alicia", language="fr")
    await set_profile(store, "request-5", 6, display_name="Too late")
    assert await password(store) == "hash-2"
    assert await profile(store) == {"display_name": "Alicia", "language": "fr"}
    assert await history(store) == [
        ("display_name", "Alice"),
        ("password", units.PASSWORD_WITHHELD),
        ("password", units.PASSWORD_WITHHELD),
        ("display_name", "Too late"),
    ]


async def test_an_account_that_is_there_already_is_not_applied_again(store: SqliteStore) -> None:
    """So the second claim of an identifier is parked, for an operator to see."""
    await register(store)
    created = AccountCreated(account_id=BOB, identifier=ROW.identifier, request_id="request-2")
    record = LogRecord(account_created=created)
    with pytest.raises(Exception, match="UNIQUE"):
        await store.write("apply", units.apply("b", record, stamp(0)))


async def test_a_record_of_another_service_is_refused(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match="not a record of this service"):
        await store.write("apply", units.apply("b", LogRecord(), stamp(0)))


async def test_a_request_that_another_center_carried_out_is_not_carried_out_again(
    store: SqliteStore,
) -> None:
    """It may have been sent here after a failure that left its outcome unknown."""
    changed = CredentialChanged(account_id=ALICE, password_hash="hash", request_id="request-1")
    profile_changed = ProfileChanged(
        account_id=ALICE, fields={"language": "fr"}, request_id="request-2"
    )
    for record in (
        LogRecord(hlc=5, credential_changed=changed),
        LogRecord(hlc=6, profile_changed=profile_changed),
    ):
        await store.write("apply", units.apply("b", record, stamp(0)))
    assert await change_password(store, "again", "request-1", 1)
    await set_profile(store, "request-2", 2, language="de")
    assert await password(store) == "hash"
    assert await profile(store) == {"language": "fr"}
    assert await heads(store) == {"accounts": 0, "changes": 0}


async def test_a_password_may_arrive_before_its_account(store: SqliteStore) -> None:
    changed = CredentialChanged(account_id=ALICE, password_hash="hash", request_id="request-1")
    record = LogRecord(hlc=5, credential_changed=changed)
    await store.write("apply", units.apply("b", record, stamp(0)))
    assert await password(store) == "hash"
    assert await store.read(registry.find_account(ALICE)) is None


class Write(NamedTuple):
    """A field, or the password, set at a center at a time."""

    center: str
    at_ms: int
    field: str

    @property
    def value(self) -> str:
        return f"{self.field} set at {self.center} at {self.at_ms}"

    @property
    def version(self) -> Version:
        return Version(stamp(self.at_ms).hlc, self.center)

    def record(self) -> LogRecord:
        record = LogRecord(hlc=self.version.hlc)
        request_id = f"{self.center}-{self.at_ms}-{self.field}"
        if self.field == "password":
            record.credential_changed.CopyFrom(
                CredentialChanged(account_id=ALICE, password_hash=self.value, request_id=request_id)
            )
        else:
            fields = {self.field: self.value}
            record.profile_changed.CopyFrom(
                ProfileChanged(account_id=ALICE, fields=fields, request_id=request_id)
            )
        return record


FIELDS = ("password", "display_name", "language")
writes = st.lists(
    st.builds(Write, st.sampled_from("abc"), st.integers(1, 4), st.sampled_from(FIELDS)),
    max_size=10,
    unique=True,
)


async def applied(store: SqliteStore, written: list[Write]) -> tuple[str, list[tuple[str, ...]]]:
    """Digest and history of a store after writes arrived in this order."""
    for write in written:
        await store.write("apply", units.apply(write.center, write.record(), stamp(0)))
    kept = await store.read(query("SELECT name, hlc, center FROM history ORDER BY 1, 2, 3"))
    return await store.read(facts.digest_of(units.CHANGES, "")), kept


@settings(max_examples=80)
@given(writes, st.data())
def test_all_centers_end_with_the_same_in_whatever_order_they_learn_it(
    written: list[Write], data: st.DataObject
) -> None:
    """Repetitions change nothing; the last writer of each field wins; every loser is in the history."""
    repeated = data.draw(st.lists(st.sampled_from(written), max_size=3)) if written else []
    shuffled = data.draw(st.permutations(written + repeated))

    async def converge() -> None:
        async with AsyncExitStack() as stack:
            one, other = [
                await stack.enter_async_context(temporary_store(units.SCHEMA, TOPICS))
                for _ in range(2)
            ]
            assert await applied(one, written) == await applied(other, shuffled)
            by_field = {
                field: sorted((w for w in written if w.field == field), key=lambda w: w.version)
                for field in FIELDS
            }
            winners = {field: found[-1].value for field, found in by_field.items() if found}
            assert await password(other) == winners.pop("password", "")
            assert await profile(other) == winners
            kept = await other.read(query("SELECT name, hlc, center, value FROM history"))
            losers = [write for found in by_field.values() for write in found[:-1]]
            assert {row[:3] for row in kept} == {(w.field, *w.version) for w in losers}
            assert not any("password set" in row[3] for row in kept)

    asyncio.run(converge())


async def test_every_write_that_lost_is_kept_in_order_but_no_password_is_shown(
    store: SqliteStore,
) -> None:
    await register(store)
    await set_profile(store, "request-2", 5, display_name="Alicia")
    await set_profile(store, "request-3", 3, center="b", display_name="Loser")
    assert await change_password(store, "second", "request-4", 4)
    found = await store.read(units.versions(ALICE))
    assert [(one.name, one.value, one.version, one.present) for one in found] == [
        ("display_name", "Alice", Version(stamp(0).hlc, "a"), False),
        ("display_name", "Loser", Version(stamp(3).hlc, "b"), False),
        ("display_name", "Alicia", Version(stamp(5).hlc, "a"), True),
        ("password", units.PASSWORD_WITHHELD, Version(stamp(0).hlc, "a"), False),
        ("password", units.PASSWORD_WITHHELD, Version(stamp(4).hlc, "a"), True),
    ]
    assert await store.read(units.versions(BOB)) == []


async def renew(store: SqliteStore, renews: Version, center: str = "a") -> bool:
    unit = units.renew_hash(ALICE, "renewed", renews, center, stamp(1000))
    return await store.write("renew", unit)


async def credential_version(store: SqliteStore) -> Version:
    credential = await store.read(units.find_credential(ALICE))
    assert credential is not None
    return credential.version


async def test_a_renewed_hash_takes_the_place_of_the_one_it_renews(store: SqliteStore) -> None:
    await register(store)
    version = await credential_version(store)
    assert await renew(store, version)
    assert await password(store) == "renewed"
    assert not await renew(store, version)  # by two logins at the same time


async def test_a_change_made_before_the_renewal_and_arriving_after_it_wins(
    store: SqliteStore,
) -> None:
    """The old password must not come back because somebody has logged in with it meanwhile."""
    await register(store)
    await renew(store, await credential_version(store))
    made = stamp(1)  # long before the moment of the renewal
    changed = CredentialChanged(account_id=ALICE, password_hash="new", request_id="change-1")
    await store.write(
        "apply", units.apply("b", LogRecord(hlc=made.hlc, credential_changed=changed), made)
    )
    assert await password(store) == "new"


async def test_a_renewal_is_the_same_everywhere_whatever_comes_first(store: SqliteStore) -> None:
    await register(store)
    await renew(store, await credential_version(store))
    entries = await store.read(log.read_after("changes", 0, 100))
    records = [LogRecord.FromString(entry.record) for entry in entries]
    for order in (records, list(reversed(records))):
        async with temporary_store(units.SCHEMA, TOPICS, ["a"]) as copy:
            for record in order:
                await copy.write("apply", units.apply("a", record, stamp(0)))
            assert await password(copy) == "renewed"
            assert await credential_version(copy) == await credential_version(store)


async def test_an_identifier_is_found_without_a_look_at_all_profiles(store: SqliteStore) -> None:
    plan = await store.read(
        query(
            "EXPLAIN QUERY PLAN SELECT account_id FROM profile_field WHERE name = ? AND value = ?"
            " AND name > 'identifier ' AND name < 'identifier!'",
            registry.identifier_field("alice@example.com"),
            registry.ATTACHED,
        )
    )
    assert ["profile_identifier" in row[3] for row in plan] == [True]
