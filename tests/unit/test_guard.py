"""Who may try a password: what counts, for whom, and what a login that may not be tried looks like."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count

import pytest

from duohuo.internal.v1.peer_services_pb2 import (
    PASSWORD_OUTCOME_MISMATCH,
    PASSWORD_OUTCOME_UNKNOWN,
    PASSWORD_OUTCOME_VERIFIED,
    GuessFailures,
    ShareFailuresRequest,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from duohuo.v1.session_service_pb2 import LoginRequest, Session
from runtime.dispatcher import Incoming
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, unreachable
from runtime.grpc_client import MESSAGE_BYTES_MAX
from runtime.guesses import COUNTERS_MAX, HEAL_MS
from runtime.mesh import Mesh
from runtime.placement import slot_of
from runtime.store import SqliteStore
from session_svc import store as units
from session_svc.guard import SHARED_MAX, Allowances, Guard
from session_svc.service import SessionService
from session_svc.sessions import Lifetimes, Sessions
from tests.fakes import SEAL, FakeClock, RecordingEndpoint, account, site, temporary_store

ALICE = "alice@example.com"
GHOST = next(
    one for n in count() if slot_of(one := f"ghost{n}@example.com") % 2 == slot_of(ALICE) % 2
)
"""Nobody; would have Alice's home."""
RIGHT, WRONG = "correct horse", "wrong horse"
ATTACKER, HERS = "192.0.2.66", "198.51.100.7"
FREE = Allowances().identifier


class Center:
    """The session service of one of two centers; its own account service knows everything, or is away."""

    def __init__(self, store: SqliteStore) -> None:
        self.clock = FakeClock()
        self.is_away = False
        self.accounts = RecordingEndpoint(self._verify)
        here = site("a", "a", "b", clock=self.clock)
        endpoints = dict.fromkeys(("a", "b"), self.accounts)
        here = replace(here, mesh=Mesh("a", endpoints, self.clock))
        self.guard = Guard(here, SEAL, Allowances())
        sessions = Sessions("a", store, here.stamps, Lifetimes())
        self.service = SessionService(here, sessions, SEAL, self.guard)

    def _verify(self, call: Call) -> Reply:
        if self.is_away:
            raise unreachable("a", ran=False)
        asked = VerifyPasswordRequest.FromString(call.request)
        outcome = PASSWORD_OUTCOME_MISMATCH
        if asked.identifier == GHOST:
            outcome = PASSWORD_OUTCOME_UNKNOWN
        elif asked.password == RIGHT:
            outcome = PASSWORD_OUTCOME_VERIFIED
        answer = VerifyPasswordResponse(outcome=outcome, account_id=account(0))
        return Reply(answer.SerializeToString(), {})

    async def login(
        self, password: str, proof: str = "", address: str = ATTACKER, identifier: str = ALICE
    ) -> Session:
        request = LoginRequest(identifier=identifier, password=password, device_proof=proof)
        return await self.service.Login(request, Incoming("", 5.0, client_address=address))

    async def refusal(self, password: str, proof: str = "", **given: str) -> RpcError:
        with pytest.raises(RpcError) as refused:
            await self.login(password, proof, **given)
        return refused.value

    async def attack(self, times: int = FREE) -> None:
        for _ in range(times):
            assert (await self.refusal(WRONG)).reason == "BAD_CREDENTIALS"


@pytest.fixture
async def center() -> AsyncIterator[Center]:
    async with temporary_store(units.SCHEMA, units.TOPICS, ["b"]) as store:
        yield Center(store)


async def test_after_a_few_wrong_ones_the_right_one_looks_wrong_for_a_while(center: Center) -> None:
    await center.attack(FREE - 1)
    assert (await center.login(RIGHT)).account_id
    await center.attack(1)
    assert (await center.refusal(RIGHT)).reason == "BAD_CREDENTIALS"
    center.clock.advance(30_000)
    assert (await center.login(RIGHT)).account_id


async def test_locked_wrong_and_unknown_are_answered_alike_for_the_same_work(
    center: Center,
) -> None:
    async def seen(password: str, identifier: str) -> tuple[bytes, list[str]]:
        before = len(center.accounts.calls)
        refused = await center.refusal(password, identifier=identifier)
        asked = [call.method.name for call in center.accounts.calls[before:]]
        return refused.to_status().SerializeToString(deterministic=True), asked

    wrong = await seen(WRONG, ALICE)
    unknown = await seen(WRONG, GHOST)
    await center.attack(FREE)
    locked_wrong, locked_right = await seen(WRONG, ALICE), await seen(RIGHT, ALICE)
    assert wrong == unknown == locked_wrong == locked_right
    assert "VerifyPassword" in wrong[1]


async def test_a_password_that_is_not_to_be_tried_goes_nowhere(center: Center) -> None:
    await center.attack(FREE)
    before = len(center.accounts.calls)
    await center.refusal(RIGHT)
    for call in center.accounts.calls[before:]:
        assert VerifyPasswordRequest.FromString(call.request).password != RIGHT


async def test_a_known_device_gets_in_and_has_a_budget_of_its_own(center: Center) -> None:
    proof = (await center.login(RIGHT, address=HERS)).device_proof
    await center.attack(FREE)
    session = await center.login(RIGHT, proof, address=HERS)
    assert session.device_proof == proof
    for _ in range(Allowances().device):
        await center.refusal(WRONG, proof)
    assert (await center.refusal(RIGHT, proof)).reason == "BAD_CREDENTIALS"


@pytest.mark.parametrize("proof", ["", "x", "d-.", SEAL.device_proof("bob@example.com", "n" * 43)])
async def test_what_proves_nothing_is_no_device(center: Center, proof: str) -> None:
    await center.attack(FREE)
    assert (await center.refusal(RIGHT, proof)).reason == "BAD_CREDENTIALS"


async def test_at_once_no_more_are_tried_than_one_after_the_other(center: Center) -> None:
    async def guess(number: int) -> None:
        await center.refusal(f"guess {number}")

    await asyncio.gather(*(guess(number) for number in range(200)))
    tried = {VerifyPasswordRequest.FromString(c.request).password for c in center.accounts.calls}
    assert len([one for one in tried if one.startswith("guess")]) == FREE


async def test_one_guess_at_each_of_many_users_is_stopped_by_its_address(center: Center) -> None:
    reasons = [
        (await center.refusal(WRONG, identifier=f"user{number}@example.com")).reason
        for number in range(Allowances().address + 1)
    ]
    assert reasons[:-1] == ["BAD_CREDENTIALS"] * Allowances().address
    assert reasons[-1] == "GUESSES_LIMITED"
    refused = await center.refusal(RIGHT)
    assert refused.retry_after_ms
    assert not refused.ran
    assert (await center.login(RIGHT, address=HERS)).account_id


async def test_what_was_not_looked_at_is_no_failure(center: Center) -> None:
    center.is_away = True
    for _ in range(FREE):
        assert (await center.refusal(WRONG)).reason != "BAD_CREDENTIALS"
    center.is_away = False
    assert (await center.login(RIGHT)).account_id


def test_the_most_that_is_told_at_once_fits_into_a_message() -> None:
    counts = {f"{'c' * 16}-{number:032x}": 2**62 for number in range(COUNTERS_MAX)}
    told = [
        GuessFailures(key=number.to_bytes(16), counts=counts, age_ms=HEAL_MS)
        for number in range(SHARED_MAX)
    ]
    request = ShareFailuresRequest(center="c" * 16, process="c" * 49, failures=told)
    assert request.ByteSize() < MESSAGE_BYTES_MAX
