"""Password hashing: argon2id with OWASP's minimum parameters, in a small bounded pool.

https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
"""

import asyncio
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from grpc import StatusCode

from runtime.errors import RpcError

T = TypeVar("T")

POOL_THREADS = 2
POOL_WAITING_MAX = 64


class Passwords(Protocol):
    """Turns passwords into what may be stored, and checks them."""

    async def hash(self, password: str) -> str:
        """The stored form. Raises RpcError RESOURCE_EXHAUSTED when too many wait."""
        ...

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Does the password fit? Takes as long for None (no such user) as for a real hash."""
        ...


class Argon2Passwords:
    """argon2id, m=19 MiB, t=2, p=1: about 26 ms of one core."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher(memory_cost=19 * 1024, time_cost=2, parallelism=1)
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="argon2")
        self._waiting = 0
        self._nobody: str | None = None

    async def hash(self, password: str) -> str:
        return await self._run(self._hasher.hash, _normal(password))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        if password_hash is None:
            nobody = self._nobody
            if nobody is None:
                nobody = self._nobody = await self._run(self._hasher.hash, "nobody")
            await self._run(self._fits, nobody, _normal(password))
            return False
        return await self._run(self._fits, password_hash, _normal(password))

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


def _normal(password: str) -> str:
    # The same password typed on two keyboards may differ in composition (RFC 8265, OpaqueString).
    return unicodedata.normalize("NFC", password)
