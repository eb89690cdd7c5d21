"""Two or more centers' ledgers, and the roads between them under a test's control."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.internal.v1.peer_services_pb2 import LimitsChange
from duohuo.v1.operator_service_pb2 import AccountStatus
from runtime.store import SqliteStore, query
from sync_bus import inbox, log
from sync_bus.homes import Homes
from sync_bus.inbox import Arrival, Outcome
from sync_bus.log import Road
from sync_bus.site import Site
from tests.fakes import FakeClock, site, temporary_store
from transfer_svc import app, controls, holds, ledger, reservations, transfers
from transfer_svc.holds import HoldRow
from transfer_svc.inbound import Inbound
from transfer_svc.reservations import Capture
from transfer_svc.rules import AMOUNT_MINOR_UNITS_MAX, Order
from transfer_svc.transfers import TransferRow


@dataclass
class Center:
    """One center's transfer service, without its RPCs and tasks."""

    site: Site
    store: SqliteStore
    slots: Homes

    @property
    def inbound(self) -> Inbound:
        return Inbound(self.site)

    async def balance(self, account: str) -> int:
        """What this center thinks that the account has."""
        found = await self.store.read(ledger.find(account))
        return found.balance if found else 0

    async def available(self, account: str) -> int:
        """What this center thinks that the account may spend."""
        held = await self.store.read(holds.held_at(account, self.site.clock.wall_ms()))
        return await self.balance(account) - held

    async def transfer(self, payer: str, transfer_id: str) -> TransferRow | None:
        return await self.store.read(transfers.find(payer, transfer_id))

    async def kinds(self) -> list[str]:
        """What the ledger's log tells the other centers, in order."""
        entries = await self.store.read(log.read_after("ledger", 0, 1000))
        bodies = [LogRecord.FromString(entry.record).WhichOneof("body") for entry in entries]
        return [body or "" for body in bodies]

    async def books(self) -> dict[str, int]:
        """The sum of all accounts this center keeps, by currency."""
        rows = await self.store.read(
            query(
                "SELECT currency, sum(balance) FROM ledger_account WHERE center = ? GROUP BY currency",
                self.site.here,
            )
        )
        return dict(rows)

    async def user_balances(self) -> dict[str, int]:
        rows = await self.store.read(
            query(
                "SELECT account_id, balance FROM ledger_account WHERE center = ?"
                " AND account_id NOT LIKE '%.%'",
                self.site.here,
            )
        )
        return dict(rows)


@dataclass
class Bank:
    """Centers by name."""

    centers: dict[str, Center] = field(default_factory=dict)
    clock: FakeClock = field(default_factory=FakeClock)

    def home(self, account: str) -> Center:
        anywhere = next(iter(self.centers.values()))
        return self.centers[anywhere.site.home_of(account)]

    async def deposit(
        self, account: str, minor_units: int, deposit_id: str, currency: str = "CNY"
    ) -> TransferRow:
        home = self.home(account)
        outside = ledger.outside(home.site.here)
        order = Order(deposit_id, outside, account, currency, minor_units, "", b"body")
        stamp = home.site.stamps.now()
        return await home.store.write(
            "deposit", transfers.decide(home.site.here, order, home.site.here, "", stamp)
        )

    async def fill(self, account: str, minor_units: int, currency: str = "CNY") -> None:
        """Puts in so much, as deposits of no more than may be moved at once."""
        number = 0
        while minor_units > 0:
            part = min(minor_units, AMOUNT_MINOR_UNITS_MAX)
            await self.deposit(account, part, f"fill-{number}", currency)
            minor_units, number = minor_units - part, number + 1

    async def pay(
        self,
        payer: str,
        payee: str,
        minor_units: int,
        transfer_id: str,
        currency: str = "CNY",
        *,
        body: bytes = b"body",
        refused: str = "",
        application: str = "",
        asked: str = "",
    ) -> TransferRow:
        """Has the payer's home decide."""
        home, payee_home = self.home(payer), self.home(payee).site.here
        order = Order(
            transfer_id, payer, payee, currency, minor_units, "", body, application, asked
        )
        unit = transfers.decide(home.site.here, order, payee_home, refused, home.site.stamps.now())
        return await home.store.write("decide", unit)

    async def reserve(
        self,
        payer: str,
        payee: str,
        minor_units: int,
        hold_id: str,
        lasts_ms: int = 1000,
        *,
        currency: str = "CNY",
        body: bytes = b"hold",
    ) -> HoldRow:
        """Has the payer's home hold money back."""
        home = self.home(payer)
        order = Order("", payer, payee, currency, minor_units, "", body)
        stamp = home.site.stamps.now()
        unit = reservations.reserve(
            home.site.here, hold_id, order, "", stamp.time_ms + lasts_ms, stamp
        )
        return await home.store.write("reserve", unit)

    async def capture(
        self,
        payer: str,
        hold_id: str,
        transfer_id: str,
        minor_units: int | None = None,
        *,
        currency: str = "CNY",
    ) -> Capture:
        """Has the payer's home pay from what is held."""
        home = self.home(payer)
        unit = reservations.capture(
            home.site.here,
            payer,
            hold_id,
            transfer_id,
            None if minor_units is None else (currency, minor_units),
            f"capture {hold_id} {minor_units}".encode(),
            home.site.stamps.now(),
        )
        return await home.store.write("capture", unit)

    async def release(self, payer: str, hold_id: str) -> HoldRow | None:
        home = self.home(payer)
        unit = reservations.release(payer, hold_id, home.site.stamps.now())
        return await home.store.write("release", unit)

    async def expire(self) -> int:
        """What each home does from time to time; returns how many holds ended."""
        return sum(
            [
                await center.store.write(
                    "expire",
                    holds.expire_all_due(center.site.here, center.site.stamps.now(), 100),
                )
                for center in self.centers.values()
            ]
        )

    async def set_status(
        self, account: str, status: AccountStatus.ValueType, version: int | None = None
    ) -> controls.Change:
        """Has an operator freeze, unfreeze or close it."""
        home = self.home(account)
        unit = controls.set_status(
            home.site.here, account, status, version, "operator", home.site.stamps.now()
        )
        return await home.store.write("set status", unit)

    async def limit(
        self, account: str, per_transfer: int | None = None, per_day: int | None = None
    ) -> controls.Change:
        home = self.home(account)
        limits = LimitsChange(
            per_transfer_minor_units_max=per_transfer, per_day_minor_units_max=per_day
        )
        unit = controls.set_limits(
            home.site.here, account, limits, None, "operator", home.site.stamps.now()
        )
        return await home.store.write("set limits", unit)

    async def deliver(
        self, source: str, target: str, limit: int = 1000, again: int = 0
    ) -> list[Outcome]:
        """Brings entries that come next, or `again` earlier ones, from one center to another."""
        here = self.centers[target]
        cursor = (await here.store.read(inbox.cursors(source)))["ledger"]
        entries = await self.centers[source].store.read(
            log.read_after("ledger", max(0, cursor - again), limit)
        )
        arrivals = [
            Arrival(entry, LogRecord.FromString(entry.record), here.site.stamps.now())
            for entry in entries
        ]
        unit = inbox.apply(source, arrivals, Road.JETSTREAM, here.slots.before(here.inbound.apply))
        return await here.store.write("apply", unit)

    async def settle(self) -> None:
        """Delivers until nothing is on its way."""
        pairs = [(a, b) for a in self.centers for b in self.centers if a != b]
        while [moved for pair in pairs for moved in await self.deliver(*pair)]:
            pass

    async def transit(self) -> dict[str, int]:
        """What is on its way, summed over all centers, by currency; nothing is left out."""
        found: dict[str, int] = defaultdict(int)
        for center in self.centers.values():
            rows = await center.store.read(
                query(
                    "SELECT currency, balance FROM ledger_account WHERE center = ?"
                    " AND account_id LIKE 'transit.%'",
                    center.site.here,
                )
            )
            for currency, balance in rows:
                found[currency] += balance
        return dict(found)


@asynccontextmanager
async def bank(*names: str) -> AsyncIterator[Bank]:
    """A bank whose centers have never heard of each other's entries."""
    clock = FakeClock()
    made = Bank(clock=clock)
    async with AsyncExitStack() as stack:
        for name in names:
            peers = [other for other in names if other != name]
            here = site(name, *names, clock=clock)
            opened = temporary_store(app.SCHEMA, app.TOPICS, peers, first=here.placement)
            store = await stack.enter_async_context(opened)
            made.centers[name] = Center(here, store, app.slots_of(here, store))
        yield made
