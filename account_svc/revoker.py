"""After a change of a password: the account's other sessions end, whatever happens meanwhile.

That they are to end is noted in the same unit as the new password. The session service is told at once, and
again and again until it has done it.
"""

import asyncio
from contextlib import suppress
from typing import NamedTuple

from duohuo.internal.v1.peer_services_pb2 import EndOtherSessionsRequest, EndOtherSessionsResponse
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.methods import peer_method
from runtime.store import Store, Unit, query
from sync_bus.site import Site

SCHEMA = """
CREATE TABLE IF NOT EXISTS revocation_due (
  account_id TEXT NOT NULL PRIMARY KEY, kept_session_id TEXT NOT NULL, hlc INTEGER NOT NULL
  ) STRICT, WITHOUT ROWID;
"""
RETRY_INTERVAL_S = 1.0
TIMEOUT_S = 2.0
AT_ONCE_MAX = 100
_END_OTHERS = peer_method("session", "EndOtherSessions")


class Due(NamedTuple):
    """All sessions of an account are to end, but for one; since the password change with this clock."""

    account_id: str
    kept_session_id: str
    hlc: int


def note(due: Due) -> Unit[None]:
    """A later change of the same password stands for both."""
    yield from query(
        "INSERT INTO revocation_due VALUES (?, ?, ?) ON CONFLICT (account_id) DO UPDATE SET"
        " kept_session_id = excluded.kept_session_id, hlc = excluded.hlc",
        *due,
    )


def _some() -> Unit[list[Due]]:
    rows = yield from query("SELECT * FROM revocation_due ORDER BY hlc LIMIT ?", AT_ONCE_MAX)
    return [Due(*row) for row in rows]


def _of(account_id: str) -> Unit[list[Due]]:
    rows = yield from query("SELECT * FROM revocation_due WHERE account_id = ?", account_id)
    return [Due(*row) for row in rows]


def _done(due: Due) -> Unit[None]:
    yield from query(
        "DELETE FROM revocation_due WHERE account_id = ? AND hlc = ?", due.account_id, due.hlc
    )


class Revoker:
    """Run `run` for as long as the service lives."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database

    async def run(self) -> None:
        while True:
            for due in await self._store.read(_some()):
                await self._revoke(due)
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def revoke_now(self, account_id: str) -> None:
        """Ends what is to end of an account, if the session service can do that now."""
        for due in await self._store.read(_of(account_id)):
            await self._revoke(due)

    async def _revoke(self, due: Due) -> None:
        request = EndOtherSessionsRequest(
            account_id=due.account_id, kept_session_id=due.kept_session_id
        )
        here = self._site.mesh.local
        with suppress(RpcError):
            await ask(here, _END_OTHERS, request, EndOtherSessionsResponse, TIMEOUT_S)
            await self._store.write("sessions have ended", _done(due))
