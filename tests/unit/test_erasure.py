"""What is personal of an account goes for good, in every center, whatever comes late or comes back."""

from collections.abc import AsyncIterator

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from account_svc import erasure
from account_svc.registry import ACCOUNTS
from account_svc.store import CHANGES
from duohuo.internal.v1.peer_services_pb2 import (
    ClaimIdentifierRequest,
    ClaimIdentifierResponse,
    EraseAtHomeRequest,
    LookupAccountRequest,
    LookupAccountResponse,
)
from duohuo.v1.account_service_pb2 import (
    Account,
    AccountExport,
    ExportAccountRequest,
    Notification,
    Profile,
    SetNotificationRequest,
    UpdateProfileRequest,
)
from duohuo.v1.operator_service_pb2 import EraseAccountResponse
from runtime.endpoint import OPERATOR, ask
from runtime.methods import method, peer_method
from runtime.store import query
from tests.unit.centers import centers
from tests.unit.test_idempotency import Plain, call
from tests.unit.test_second_identifiers import ALICE, BOB, HERS_AT_A, HERS_AT_B, Users, refused

CANARY = "canary-of-alice"
PERSONAL = (ALICE, HERS_AT_A, HERS_AT_B, CANARY, "argon2")


class Erasing(Users):
    """Users, one of whom is erased."""

    async def edit(self, user: str, name: str, at: str) -> None:
        request = UpdateProfileRequest(
            account_id=user,
            profile=Profile(display_name=name),
            update_mask=FieldMask(paths=["display_name"]),
            request_id=self._id(""),
        )
        await self._ask("UpdateProfile", request, Account, at)

    async def notify(self, user: str, at: str) -> None:
        request = SetNotificationRequest(account_id=user, email=True, request_id=self._id(""))
        await self._ask("SetNotification", request, Notification, at)

    async def export(self, user: str, at: str) -> AccountExport:
        request = ExportAccountRequest(account_id=user)
        return await self._ask("ExportAccount", request, AccountExport, at)

    async def erase(self, user: str, at: str = "a") -> EraseAccountResponse:
        return await ask(
            self.two.service(at).dispatcher,
            peer_method("account", "EraseAtHome"),
            EraseAtHomeRequest(account_id=user),
            EraseAccountResponse,
            10.0,
            {OPERATOR: "olga"},
        )

    async def kept(self, at: str) -> str:
        """All that a center's account service keeps, in every table, but for the log."""
        store = self.two.service(at).store
        tables = await store.read(query("SELECT name FROM sqlite_master WHERE type = 'table'"))
        found = []
        for (name,) in tables:
            if name != "log":
                found += await store.read(query(f"SELECT * FROM {name}"))  # noqa: S608 - its own names
        return repr(found)

    async def nothing_is_left(self, *ats: str) -> None:
        for at in ats:
            kept = await self.kept(at)
            assert [one for one in PERSONAL if one in kept] == [], at


@pytest.fixture
async def users(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Erasing]:
    monkeypatch.setattr("account_svc.service.ERASED_WITHIN_S", 0.0)
    async with centers("a", "b", role="account", passwords=Plain()) as two:
        yield Erasing(two)
        two.silent.clear()
        await two.settle()
        await two.check_same()


@pytest.fixture
async def alice(users: Erasing) -> str:
    """She has left something of every kind in both centers."""
    made = await users.register(ALICE, "a")
    await users.two.settle()
    for number, at in enumerate(("a", "b")):
        users.two.clock.advance(1)
        await users.edit(made, f"{CANARY} {number}", at)
    await users.notify(made, "b")
    await users.add(made, HERS_AT_A, "a")
    await users.add(made, HERS_AT_B, "b")
    await users.two.settle()
    kept = await users.kept("a") + await users.kept("b")
    assert all(one in kept for one in PERSONAL[:-1])
    return made


async def test_nothing_personal_is_left_anywhere(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    await users.nothing_is_left("a")
    await users.two.settle()
    await users.nothing_is_left("a", "b")
    for at in ("a", "b"):
        await refused(users.identifiers(alice, at), "ACCOUNT_ERASED")
        await refused(users.edit(alice, "again", at), "ACCOUNT_ERASED")
        await refused(users.notify(alice, at), "ACCOUNT_ERASED")
        await refused(users.add(alice, HERS_AT_B, at), "ACCOUNT_ERASED")
        for identifier in (ALICE, HERS_AT_A, HERS_AT_B):
            assert await users.opens(identifier, at) == ""
            assert await users.paid_as(identifier, at) == ""


async def test_the_log_forgets_it_once_all_have_heard(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    await users.two.settle()
    for at in ("a", "b"):
        for topic in (ACCOUNTS, CHANGES):
            rows = await users.two.service(at).store.read(
                query("SELECT record FROM log WHERE topic = ?", topic.name)
            )
            assert not [one for one in PERSONAL if one in repr(rows)]


async def test_the_account_s_id_stays_for_the_ledger_s_sake(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    asked = LookupAccountRequest(user=alice)
    lookup = peer_method("account", "LookupAccount")
    found = await call(users.two, "a", lookup, asked, LookupAccountResponse)
    assert found.account_id == alice


async def test_its_identifiers_are_free_again(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    bob = await users.register(BOB, "b")
    again = await users.register(ALICE, "a")
    assert again != alice
    # b has not heard of it: until then it keeps what it has claimed.
    await refused(users.register(HERS_AT_B, "b"), "IDENTIFIER_TAKEN")
    await users.two.settle()
    await users.register(HERS_AT_B, "b")
    await users.add(bob, HERS_AT_A, "b")
    await users.two.settle()
    assert await users.opens(HERS_AT_A, "a") == bob


async def test_it_can_be_asked_for_twice_and_is_on_record(users: Erasing, alice: str) -> None:
    for _ in range(2):
        assert (await users.erase(alice)).account_id == alice
    rows = await users.two.service("a").store.read(
        query("SELECT who, action, target, before, after FROM audit")
    )
    assert rows == [("olga", "erase", alice, "", "")]


async def test_it_says_who_has_not_heard_of_it(users: Erasing, alice: str) -> None:
    assert list((await users.erase(alice)).waiting_for) == ["b"]
    await users.two.settle()
    assert list((await users.erase(alice)).waiting_for) == []


async def test_only_its_home_erases(users: Erasing, alice: str) -> None:
    await refused(users.erase(alice, "b"), "WRONG_HOME")
    await refused(users.erase(alice.replace("-0", "-f"), "a"), "ACCOUNT_NOT_FOUND")
    assert ALICE in await users.identifiers(alice, "a")


async def test_what_a_center_that_was_away_still_did_comes_to_nothing(
    users: Erasing, alice: str
) -> None:
    """It is written later than the erasure, in a center that does not know of it."""
    await users.erase(alice)
    users.two.clock.advance(1000)
    await users.edit(alice, CANARY, "b")
    await users.notify(alice, "b")
    asked = ClaimIdentifierRequest(identifier=HERS_AT_B, account_id=alice)
    await call(
        users.two, "b", peer_method("account", "ClaimIdentifier"), asked, ClaimIdentifierResponse
    )
    await users.two.service("a").follow("b")
    await users.nothing_is_left("a")
    await users.two.settle()
    await users.nothing_is_left("a", "b")


@pytest.mark.parametrize("lost", ["a", "b"])
async def test_a_lost_disk_does_not_bring_it_back(users: Erasing, alice: str, lost: str) -> None:
    await users.erase(alice)
    await users.two.settle()
    await users.two.recover(lost)
    await users.two.settle()
    await users.nothing_is_left("a", "b")


async def test_a_center_that_comes_by_snapshot_erases_it_too(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    b = users.two.service("b")
    for topic in (CHANGES, ACCOUNTS):
        await b.node._replicator._snapshots.install("a", topic.name)
    await users.nothing_is_left("b")
    rows = await b.store.read(query("SELECT identifier FROM claim"))
    assert HERS_AT_B not in repr(rows)


async def test_comparing_copies_brings_nothing_back(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    a, b = users.two.service("a"), users.two.service("b")
    for table in CHANGES.tables:
        # b has all of it still, and says so.
        await a.follow("b")
        await a.anti_entropy.compare("b", CHANGES, table)
    await users.nothing_is_left("a")
    assert sum((await a.repaired()).values()) == 0
    assert CANARY in await users.kept(b.site.here)


async def test_the_sessions_of_every_center_end(users: Erasing, alice: str) -> None:
    await users.erase(alice)
    await users.two.settle()
    for at in ("a", "b"):
        due = query("SELECT account_id, kept_session_id FROM revocation_due")
        assert await users.two.service(at).store.read(due) == [(alice, "")]


async def test_a_user_gets_all_that_is_kept_and_no_secret(users: Erasing, alice: str) -> None:
    found = await users.export(alice, "b")
    assert list(found.account.identifiers) == [ALICE, *sorted((HERS_AT_A, HERS_AT_B))]
    assert found.notification.email
    values = [(one.field, one.value, one.present) for one in found.values]
    assert ("display_name", f"{CANARY} 0", False) in values
    assert ("display_name", f"{CANARY} 1", True) in values
    assert [one for one in values if one[0] == "password"] == [("password", "", True)]
    other = await users.register(BOB, "b")
    export = method("/duohuo.v1.AccountService/ExportAccount")
    asked = call(
        users.two, "a", export, ExportAccountRequest(account_id=alice), AccountExport, other
    )
    await refused(asked, "NOT_YOURS")


def test_what_stands_for_an_identifier_is_none() -> None:
    from account_svc.rules import check_identifier
    from runtime.errors import RpcError

    with pytest.raises(RpcError):
        check_identifier(erasure.placeholder("u001-00000000000000000000000000000001"))
