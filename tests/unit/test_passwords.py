"""Passwords are checked as typed, slowly for everybody, and only so many at a time."""

import asyncio
import os
import sys
import threading
from collections.abc import Iterator

import pytest
from grpc import StatusCode

import account_svc.passwords
from account_svc.passwords import POOL_NICENESS, Argon2Passwords
from runtime.errors import RpcError

COMPOSED, DECOMPOSED = "caf\u00e9-au-lait", "cafe\u0301-au-lait"


@pytest.fixture
def passwords() -> Iterator[Argon2Passwords]:
    made = Argon2Passwords()
    yield made
    made.close()


async def test_a_password_fits_its_hash_and_no_other_does(passwords: Argon2Passwords) -> None:
    stored = await passwords.hash("correct horse")
    assert await passwords.verify(stored, "correct horse")
    for wrong in ("correct horsE", "correct horse ", ""):
        assert not await passwords.verify(stored, wrong)


async def test_a_password_fits_however_the_keyboard_composes_it(passwords: Argon2Passwords) -> None:
    assert COMPOSED != DECOMPOSED
    assert await passwords.verify(await passwords.hash(COMPOSED), DECOMPOSED)
    assert await passwords.verify(await passwords.hash(DECOMPOSED), COMPOSED)


async def test_the_stored_form_is_salted_argon2id_without_the_password(
    passwords: Argon2Passwords,
) -> None:
    one, other = await asyncio.gather(*(passwords.hash("correct horse") for _ in range(2)))
    assert one != other
    assert one.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert "horse" not in one


@pytest.mark.parametrize("stored", ["", "no hash", "$argon2id$v=19$m=19456,t=2,p=1$AAAA$AAAA"])
async def test_nothing_fits_a_damaged_hash(passwords: Argon2Passwords, stored: str) -> None:
    assert not await passwords.verify(stored, "correct horse")


async def test_nobodys_password_is_checked_as_if_somebody_had_it(
    passwords: Argon2Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    fits = passwords._fits

    def noted(stored: str, password: str) -> bool:
        checked.append(stored)
        return fits(stored, password)

    monkeypatch.setattr(passwords, "_fits", noted)
    for guess in ("correct horse", "nobody"):
        assert not await passwords.verify(None, guess)
    assert len(checked) == 2
    assert all(stored.startswith("$argon2id$") for stored in checked)


async def test_a_hash_of_other_parameters_is_outdated_and_still_fits(
    passwords: Argon2Passwords,
) -> None:
    stored = await passwords.hash("correct horse")
    stronger = Argon2Passwords(memory_kib=32_768, time_cost=3)
    try:
        assert stronger.is_outdated(stored)
        assert await stronger.verify(stored, "correct horse")
        renewed = await stronger.hash("correct horse")
        assert renewed.startswith("$argon2id$v=19$m=32768,t=3,p=1$")
        assert not stronger.is_outdated(renewed)
    finally:
        stronger.close()
    assert not passwords.is_outdated(stored)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own here")
async def test_a_storm_of_logins_yields_to_other_calls(passwords: Argon2Passwords) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    loop = asyncio.get_running_loop()
    own = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())  # noqa: E731 - one use
    assert await loop.run_in_executor(passwords._pool, own) == min(mine + POOL_NICENESS, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


async def test_too_many_at_once_are_refused_and_did_not_run(
    passwords: Argon2Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_svc.passwords, "POOL_WAITING_MAX", 2)
    outcomes = await asyncio.gather(
        *(passwords.hash("correct horse") for _ in range(4)), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, RpcError)]
    assert [(error.code, error.ran) for error in refused] == [
        (StatusCode.RESOURCE_EXHAUSTED, False)
    ] * 2
    assert await passwords.verify(await passwords.hash("correct horse"), "correct horse")
