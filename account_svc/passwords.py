"""Password hashing: argon2id, with OWASP's minimum parameters or stronger ones, in a small bounded pool.

https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from grpc import StatusCode

from account_svc.password_rules import normal
from runtime.errors import RpcError

T = TypeVar("T")

MEMORY_KIB_MIN, TIME_COST_MIN = 19_456, 2
POOL_THREADS = 2
POOL_NICENESS = 10
POOL_WAITING_MAX = 64


class Passwords(Protocol):
    """Turns passwords into what may be stored, and checks them."""

    async def hash(self, password: str) -> str:
        """The stored form. Raises RpcError RESOURCE_EXHAUSTED when too many wait."""
        ...

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Does the password fit? Takes as long for None (no such user) as for a real hash."""
        ...

    def is_outdated(self, password_hash: str) -> bool:
        """Would it be hashed with other parameters now?"""
        ...


class Argon2Passwords:
    """argon2id; with m=19 MiB, t=2, p=1 about 26 ms of one core."""

    def __init__(self, memory_kib: int = MEMORY_KIB_MIN, time_cost: int = TIME_COST_MIN) -> None:
        self._hasher = PasswordHasher(time_cost, memory_kib, parallelism=1)
        self._pool = ThreadPoolExecutor(
            POOL_THREADS, thread_name_prefix="argon2", initializer=_yield_to_others
        )
        self._waiting = 0
        # Made now: the first unknown user must not cost more than the next.
        self._nobody = self._hasher.hash("nobody")

    async def hash(self, password: str) -> str:
        return await self._run(self._hasher.hash, normal(password))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        if password_hash is None:
            await self._run(self._fits, self._nobody, normal(password))
            return False
        return await self._run(self._fits, password_hash, normal(password))

    def is_outdated(self, password_hash: str) -> bool:
        return self._hasher.check_needs_rehash(password_hash)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fits(self, password_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: Callable[..., T], *values: str) -> T:
        if self._waiting >= POOL_WAITING_MAX:
            raise RpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "PASSWORD_CHECKS_BUSY",
                "too many passwords are being checked at this center",
                retry_after_ms=1000,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *values)
        finally:
            self._waiting -= 1


def _yield_to_others() -> None:
    """A storm of logins must not make other calls wait for a core."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + POOL_NICENESS, 19)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
