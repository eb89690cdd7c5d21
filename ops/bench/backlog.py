"""Users, and log entries that another center has to catch up with, made straight in a center's stores.

The units are those that serve requests, on the same store engine (SQLite, synchronous=FULL, group
commit); only the RPCs in front of them are left out. The center must have run once, and must not be
running. Each entry gets a trace of its own, as a real request has one: recording it is part of what
applying costs.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import account_svc.app
import account_svc.store
import transfer_svc.app
from account_svc.registry import AccountRow
from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_QUEUED,
    Application,
    ApplyTransferRequest,
)
from gateway import ring
from runtime.clock import SystemClock, timestamp
from runtime.hlc import HybridClock
from runtime.ids import RandomIds, account_id, account_slot, application_id
from runtime.placement import slot_of
from runtime.store import SqliteStore, Unit
from sync_bus import log, node
from sync_bus.log import Stamp, Stamps
from transfer_svc import applications, ledger, rules, transfers
from transfer_svc.rules import Order

CURRENCY = "CNY"
DEPOSIT = 1_000_000_000
LIFETIME_MS = 24 * 3600 * 1000
AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes to the stores of a center that is not running, as that center."""

    center: str
    centers: Sequence[str]
    stores: Path
    """The directory of its stores."""

    async def make_users(self, count: int, password_hash: str) -> list[AccountRow]:
        """Registers users at home here, all with this password, and gives each some money."""
        ids = RandomIds()
        users = []
        async with self._open(account_svc.app.ROLE) as (accounts, stamps):
            units = []
            for identifier in islice(self._identifiers(), count):
                account, stamp = account_id(slot_of(identifier), ids.unique()), self._stamp(stamps)
                user = AccountRow(account, identifier, ids.unique(), self.center, stamp.time_ms)
                users.append(user)
                units.append(account_svc.store.register(user, password_hash, {}, stamp))
            await _write_all(accounts, units, lambda _done: None)
        async with self._open(transfer_svc.app.ROLE) as (books, stamps):
            payer = ledger.outside(self.center)
            await _write_all(
                books,
                [
                    self._decide(payer, user.account_id, DEPOSIT, self._stamp(stamps))
                    for user in users
                ],
                lambda _done: None,
            )
        return users

    async def transfer(
        self, users: Sequence[AccountRow], count: int, done: Callable[[int], None]
    ) -> None:
        """Makes so many entries of the ledger: transfers between these users."""
        random = Random(0)  # noqa: S311 - the same pairs in every run
        async with self._open(transfer_svc.app.ROLE) as (books, stamps):
            units = []
            for _ in range(count):
                payer, payee = random.sample(users, 2)
                units.append(
                    self._decide(payer.account_id, payee.account_id, 1, self._stamp(stamps))
                )
            await _write_all(books, units, done)

    async def change_profiles(
        self, users: Sequence[AccountRow], count: int, done: Callable[[int], None]
    ) -> None:
        """Makes so many entries of the changes: new display names for these users, in turn."""
        ids = RandomIds()
        async with self._open(account_svc.app.ROLE) as (accounts, stamps):
            units = [
                account_svc.store.set_profile(
                    users[number % len(users)].account_id,
                    {"display_name": f"Name {number}"},
                    ids.unique(),
                    self.center,
                    self._stamp(stamps),
                )
                for number in range(count)
            ]
            await _write_all(accounts, units, done)

    async def apply(self, payers: Sequence[AccountRow], count: int, home: str) -> None:
        """Accepts so many applications of these payers, in turn, for their home center. Each payer's
        transfer ids grow in the order of acceptance."""
        ids = RandomIds()
        async with self._open(transfer_svc.app.ROLE) as (books, stamps):
            units = []
            for number in range(count):
                payer, payee = (payers[(number + n) % len(payers)].account_id for n in (0, 1))
                stamp = self._stamp(stamps)
                request = ApplyTransferRequest(
                    transfer_id=f"queue-{number:08}",
                    payer_account_id=payer,
                    payee_account_id=payee,
                    amount=Money(currency_code=CURRENCY, minor_units=1),
                    memo="benchmark",
                )
                slot = account_slot(payer)
                assert slot is not None  # noqa: S101 - it was made here
                application = Application(
                    application_id=application_id(self.center, slot, ids.unique()),
                    transfer_id=request.transfer_id,
                    state=APPLICATION_STATE_QUEUED,
                    payer_account_id=payer,
                    payee_account_id=payee,
                    amount=request.amount,
                    memo=request.memo,
                    origin_center=self.center,
                    create_time=timestamp(stamp.time_ms),
                    expire_time=timestamp(stamp.time_ms + LIFETIME_MS),
                )
                body = rules.body_hash(request)
                units.append(applications.accept(application, body, home, stamp))
            await _write_all(books, units, lambda _done: None)

    async def heads(self) -> dict[str, int]:
        """How far the center's logs reach, by topic."""
        found = {}
        for role in (account_svc.app.ROLE, transfer_svc.app.ROLE):
            async with self._open(role) as (store, _stamps):
                found.update(await store.read(log.heads()))
        return found

    def _decide(
        self, payer: str, payee: str, minor_units: int, stamp: Stamp
    ) -> Unit[transfers.TransferRow]:
        unique = RandomIds().unique()
        order = Order(unique, payer, payee, CURRENCY, minor_units, "benchmark", b"")
        return transfers.decide(self.center, order, self.center, "", stamp)

    def _stamp(self, stamps: Stamps) -> Stamp:
        return stamps.now(f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")

    def _identifiers(self) -> Iterator[str]:
        """Identifiers whose home is this center."""
        placement = ring.compute(dict.fromkeys(self.centers, 1), 1)
        while True:
            identifier = f"bench-{RandomIds().unique()}@example.com"
            if placement.home(slot_of(identifier)) == self.center:
                yield identifier

    @asynccontextmanager
    async def _open(self, role: str) -> AsyncIterator[tuple[SqliteStore, Stamps]]:
        """A role's store, and stamps above everything in it."""
        app = {"account": account_svc.app, "transfer": transfer_svc.app}[role]
        store = await SqliteStore.open(self.stores / f"{role}.db", node.SCHEMA + app.SCHEMA)
        try:
            clock = SystemClock()
            hybrid = HybridClock(clock, await store.read(log.latest_hlc()))
            yield store, Stamps(clock, hybrid)
        finally:
            await store.close()


async def _write_all(
    store: SqliteStore, units: Sequence[Unit[object]], done: Callable[[int], None]
) -> None:
    """Writes the units in order, many with one commit; tells how many are written."""
    for first in range(0, len(units), AT_ONCE):
        batch = units[first : first + AT_ONCE]
        await asyncio.gather(*(store.write("backlog", unit) for unit in batch))
        done(first + len(batch))
