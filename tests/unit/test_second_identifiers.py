"""An account may have more identifiers than one, each claimed at its own home and for ever."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import pytest
from grpc import StatusCode

from account_svc import registry, rules, store
from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_UNKNOWN,
    PASSWORD_OUTCOME_VERIFIED,
    ClaimIdentifierRequest,
    ClaimIdentifierResponse,
    LookupAccountRequest,
    LookupAccountResponse,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.account_service_pb2 import (
    Account,
    AddIdentifierRequest,
    ChangePasswordRequest,
    ChangePasswordResponse,
    GetAccountRequest,
    RegisterRequest,
    RemoveIdentifierRequest,
)
from duohuo.v1.operator_service_pb2 import ListVersionsRequest, ListVersionsResponse
from runtime.errors import RpcError
from runtime.methods import method, peer_method
from runtime.placement import slot_of
from tests.unit.centers import Centers, centers
from tests.unit.test_idempotency import M, Plain, call

PASSWORD = "correct-horse"


def at_home(center: str, name: str) -> str:
    """An identifier that begins with this name and is at home there."""
    slots = {"a": 0, "b": 1}
    return next(
        one
        for number in count()
        if slot_of(one := f"{name}{number}@example.com") % 2 == slots[center]
    )


ALICE, BOB = at_home("a", "alice"), at_home("b", "bob")
HERS_AT_A, HERS_AT_B = at_home("a", "second"), at_home("b", "second")


class Users:
    """What users and operators may ask of two centers. `at` is where they ask."""

    def __init__(self, two: Centers) -> None:
        self.two = two
        self.numbers = count()

    async def _ask(self, name: str, request: Any, answer: type[M], at: str) -> M:
        called = method(f"/duohuo.v1.AccountService/{name}")
        user = getattr(request, "account_id", "")
        return await call(self.two, at, called, request, answer, user)

    def _id(self, given: str) -> str:
        return given or f"request-{next(self.numbers)}"

    async def register(self, identifier: str, at: str, request_id: str = "") -> str:
        request = RegisterRequest(
            identifier=identifier, password=PASSWORD, request_id=self._id(request_id)
        )
        return (await self._ask("Register", request, Account, at)).account_id

    async def add(
        self, user: str, identifier: str, at: str = "a", request_id: str = ""
    ) -> list[str]:
        request = AddIdentifierRequest(
            account_id=user, identifier=identifier, request_id=self._id(request_id)
        )
        return list((await self._ask("AddIdentifier", request, Account, at)).identifiers)

    async def remove(
        self, user: str, identifier: str, at: str = "a", request_id: str = ""
    ) -> list[str]:
        request = RemoveIdentifierRequest(
            account_id=user, identifier=identifier, request_id=self._id(request_id)
        )
        return list((await self._ask("RemoveIdentifier", request, Account, at)).identifiers)

    async def identifiers(self, user: str, at: str) -> list[str]:
        request = GetAccountRequest(account_id=user)
        return list((await self._ask("GetAccount", request, Account, at)).identifiers)

    async def opens(self, identifier: str, at: str) -> str:
        """The account that the password opens by this identifier, as far as a center knows."""
        asked = VerifyPasswordRequest(identifier=identifier, password=PASSWORD)
        verify = peer_method("account", "VerifyPassword")
        found = await call(self.two, at, verify, asked, VerifyPasswordResponse)
        known = {PASSWORD_OUTCOME_VERIFIED: found.account_id, PASSWORD_OUTCOME_UNKNOWN: ""}
        return known[found.outcome]

    async def paid_as(self, identifier: str, at: str) -> str:
        asked = LookupAccountRequest(user=identifier)
        lookup = peer_method("account", "LookupAccount")
        return (await call(self.two, at, lookup, asked, LookupAccountResponse)).account_id


@pytest.fixture
async def users() -> AsyncIterator[Users]:
    async with centers("a", "b", role="account", passwords=Plain()) as two:
        yield Users(two)
        two.silent.clear()
        await two.settle()
        await two.check_same()


@pytest.fixture
async def alice(users: Users) -> str:
    made = await users.register(ALICE, "a")
    await users.two.settle()
    return made


async def refused(asked: object, reason: str) -> RpcError:
    with pytest.raises(RpcError) as error:
        await asked  # type: ignore[misc] # whatever was asked of `Users`
    assert error.value.reason == reason
    return error.value


@pytest.mark.parametrize("identifier", [HERS_AT_A, HERS_AT_B], ids=["own home", "another home"])
@pytest.mark.parametrize("at", ["a", "b"])
async def test_it_is_as_good_as_the_first_one_in_every_center(
    users: Users, alice: str, identifier: str, at: str
) -> None:
    assert await users.add(alice, identifier.upper(), at) == [ALICE, identifier]
    await users.two.settle()
    for center in ("a", "b"):
        assert await users.identifiers(alice, center) == [ALICE, identifier]
        assert await users.opens(identifier, center) == alice
        assert await users.paid_as(identifier, center) == alice


@pytest.mark.parametrize("at", ["a", "b"])
async def test_it_belongs_to_the_account_for_ever(users: Users, alice: str, at: str) -> None:
    bob = await users.register(BOB, "b")
    await users.two.settle()
    await users.add(alice, HERS_AT_B)
    await refused(users.register(HERS_AT_B, "b"), "IDENTIFIER_TAKEN")
    await refused(users.add(bob, HERS_AT_B, at), "IDENTIFIER_TAKEN")
    await users.two.settle()
    assert await users.remove(alice, HERS_AT_B, at) == [ALICE]
    await users.two.settle()
    for center in ("a", "b"):
        assert await users.opens(HERS_AT_B, center) == ""
        assert await users.paid_as(HERS_AT_B, center) == ""
    await refused(users.register(HERS_AT_B, "b"), "IDENTIFIER_TAKEN")
    await refused(users.add(bob, HERS_AT_B, at), "IDENTIFIER_TAKEN")
    assert await users.add(alice, HERS_AT_B, at) == [ALICE, HERS_AT_B]
    await users.two.settle()
    assert await users.opens(HERS_AT_B, "b") == alice


async def test_somebody_s_first_identifier_is_nobody_s_second(users: Users, alice: str) -> None:
    await users.register(BOB, "b")
    for at in ("a", "b"):
        await refused(users.add(alice, BOB, at), "IDENTIFIER_TAKEN")
    assert await users.identifiers(alice, "a") == [ALICE]


async def test_the_first_one_stays(users: Users, alice: str) -> None:
    assert await users.add(alice, ALICE) == [ALICE]
    await refused(users.remove(alice, ALICE), "FIRST_IDENTIFIER")
    await refused(users.remove(alice, HERS_AT_A), "IDENTIFIER_UNKNOWN")


async def test_only_its_home_can_give_it_away(users: Users, alice: str) -> None:
    users.two.hush("b")
    error = await refused(users.add(alice, HERS_AT_B), "IDENTIFIER_HOME_UNAVAILABLE")
    assert not error.ran
    assert error.retry_after_ms
    assert await users.add(alice, HERS_AT_A) == [ALICE, HERS_AT_A]  # a gives its own
    users.two.answer("b")
    assert HERS_AT_B in await users.add(alice, HERS_AT_B)


async def test_a_center_claims_what_is_at_home_there_alone(users: Users, alice: str) -> None:
    asked = ClaimIdentifierRequest(identifier=HERS_AT_B, account_id=alice)
    claim = peer_method("account", "ClaimIdentifier")
    await refused(call(users.two, "a", claim, asked, ClaimIdentifierResponse), "WRONG_HOME")


async def test_claimed_and_then_nothing_is_mended_by_asking_again(users: Users, alice: str) -> None:
    """The center that was asked dies between the claim and the rest: nobody else gets it meanwhile."""
    asked = ClaimIdentifierRequest(identifier=HERS_AT_B, account_id=alice)
    claim = peer_method("account", "ClaimIdentifier")
    await call(users.two, "b", claim, asked, ClaimIdentifierResponse)
    await users.two.settle()
    assert await users.identifiers(alice, "b") == [ALICE]
    assert await users.opens(HERS_AT_B, "b") == ""
    await refused(users.register(HERS_AT_B, "b"), "IDENTIFIER_TAKEN")
    assert await users.add(alice, HERS_AT_B, "b") == [ALICE, HERS_AT_B]


@pytest.mark.parametrize("identifier", [ALICE, HERS_AT_B])
async def test_who_only_says_that_it_is_theirs_has_nothing_of_it(
    users: Users, alice: str, identifier: str
) -> None:
    """As a center could that has been broken into: what it writes is copied."""
    bob = await users.register(BOB, "b")
    await users.add(alice, HERS_AT_B)
    await users.two.settle()
    b = users.two.service("b")
    fields = {registry.identifier_field(identifier): registry.ATTACHED}
    unit = store.set_profile(bob, fields, "request-of-b", "b", b.site.stamps.now())
    await b.store.write("by hand", unit)
    await users.two.settle()
    for at in ("a", "b"):
        assert await users.opens(identifier, at) == alice
        assert await users.paid_as(identifier, at) == alice


async def test_a_lost_disk_brings_it_back(users: Users, alice: str) -> None:
    await users.add(alice, HERS_AT_B)
    for center in ("b", "a"):
        await users.two.settle()
        await users.two.recover(center)
    await users.two.settle()
    assert await users.opens(HERS_AT_B, "b") == alice
    await refused(users.register(HERS_AT_B, "b"), "IDENTIFIER_TAKEN")


async def test_the_same_request_counts_once(users: Users, alice: str) -> None:
    await users.add(alice, HERS_AT_B, request_id="add-it-now")
    await users.remove(alice, HERS_AT_B, request_id="remove-it-now")
    assert await users.add(alice, HERS_AT_B, request_id="add-it-now") == [ALICE]
    await refused(users.add(alice, HERS_AT_A, request_id="add-it-now"), "IDEMPOTENCY_CONFLICT")


async def test_the_last_word_counts_when_centers_are_apart(users: Users, alice: str) -> None:
    await users.add(alice, HERS_AT_B)
    await users.two.settle()
    await users.remove(alice, HERS_AT_B, "a")
    users.two.clock.advance(1)
    await users.add(alice, HERS_AT_B, "b")
    await users.two.settle()
    for center in ("a", "b"):
        assert await users.identifiers(alice, center) == [ALICE, HERS_AT_B]


async def test_an_account_can_have_so_many(users: Users, alice: str) -> None:
    names = [at_home("a", f"number{number}-") for number in range(rules.IDENTIFIERS_MAX)]
    for name in names[:-1]:
        await users.add(alice, name)
    await refused(users.add(alice, names[-1]), "TOO_MANY_IDENTIFIERS")
    await users.remove(alice, names[0])
    await refused(users.add(alice, names[-1]), "TOO_MANY_IDENTIFIERS")  # it still belongs to her
    assert len(await users.add(alice, names[0])) == rules.IDENTIFIERS_MAX


async def test_nobody_finds_out_without_end_who_has_an_account(users: Users, alice: str) -> None:
    await users.register(BOB, "b")
    for _ in range(5):
        await refused(users.add(alice, BOB), "IDENTIFIER_TAKEN")
    error = await refused(users.add(alice, BOB), "TOO_MANY_ATTEMPTS")
    assert error.code is StatusCode.RESOURCE_EXHAUSTED
    users.two.clock.advance(error.retry_after_ms or 0)
    await refused(users.add(alice, BOB), "IDENTIFIER_TAKEN")


@pytest.mark.parametrize("identifier", ["", "nobody", "a b@example.com"])
async def test_it_has_to_be_one(users: Users, alice: str, identifier: str) -> None:
    for asked in (users.add, users.remove):
        assert (await refused(asked(alice, identifier), "INVALID_FIELD")).field_name == "identifier"


async def test_a_password_must_not_contain_any(users: Users, alice: str) -> None:
    await users.add(alice, HERS_AT_B)
    request = ChangePasswordRequest(
        account_id=alice, old_password=PASSWORD, new_password=HERS_AT_B, request_id="change-it"
    )
    change = method("/duohuo.v1.AccountService/ChangePassword")
    asked = call(users.two, "a", change, request, ChangePasswordResponse, alice)
    assert (await refused(asked, "INVALID_FIELD")).field_name == "new_password"


async def test_why_shows_when_it_came_and_went(users: Users, alice: str) -> None:
    await users.add(alice, HERS_AT_B)
    users.two.clock.advance(1)
    await users.remove(alice, HERS_AT_B)
    found = await call(
        users.two,
        "a",
        peer_method("account", "ListVersions"),
        ListVersionsRequest(user=alice),
        ListVersionsResponse,
    )
    field = f"identifier {HERS_AT_B}"
    said = [(one.value, one.present) for one in found.versions if one.field == field]
    assert said == [("attached", False), ("detached", True)]
