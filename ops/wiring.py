"""Puts the roles of one process together, for real (`serve`) and in the simulator alike."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import structlog

import account_svc.app
import gateway.app
import session_svc.app
import session_svc.store
import transfer_svc.app
from account_svc.passwords import Passwords
from gateway.app import Gateway
from gateway.homes import follow_homes
from gateway.limits import Limits
from gateway.operator import Spans
from runtime.destinations import Destinations
from runtime.dispatcher import Dispatcher
from runtime.errors import RpcError
from runtime.store import Store
from runtime.token_seal import TokenSeal
from session_svc.guard import Allowances
from session_svc.sessions import Lifetimes
from sync_bus import homes, log, node
from sync_bus.bus import Bus
from sync_bus.log import Topic
from sync_bus.site import Site
from transfer_svc.courier import Courier

PREPARE_RETRY_S = 1.0
_logger = structlog.get_logger()

Duty = Callable[[], Coroutine[None, None, None]]


@dataclass(frozen=True, slots=True)
class Outside:
    """What the roles of a process get from outside besides their site."""

    open_store: Callable[[str, str], Awaitable[Store]]
    """Opens a role's store, with its schema."""
    bus: Callable[[str], Bus]
    """A role's use of the center's bus."""
    passwords: Passwords
    spans: Spans
    courier: Courier
    """What carries notifications."""
    destinations: Destinations
    """Where users may have notifications sent."""
    seal: TokenSeal
    email_offered: bool = False
    limits: Limits = field(default_factory=Limits)
    """Of one caller at this gateway."""
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    """Of sessions."""
    allowances: Allowances = field(default_factory=Allowances)
    """Of logins that fail."""


@dataclass(frozen=True, slots=True)
class Center:
    """The roles of one process, put together."""

    gateway: Gateway | None
    """If that is one of them."""
    duties: Sequence[Duty]
    """What must run from now on."""
    wait_alive: Sequence[Duty]
    """Each returns once a service may serve: its store has all that it should have."""


async def build(
    roles: Sequence[str], site: Site, outside: Outside, dispatcher: Dispatcher
) -> Center:
    """Serves the roles from `dispatcher`."""
    duties: list[Duty] = [site.mesh.run]
    wait_alive: list[Duty] = []
    if "account" in roles:
        store, bus = await _open(account_svc.app, site, outside)
        await _place(store, site)
        accounts = account_svc.app.build(
            site,
            store,
            bus,
            outside.passwords,
            dispatcher,
            outside.destinations,
            email_offered=outside.email_offered,
        )
        duties.append(accounts.run)
        wait_alive.append(accounts.node.wait_alive)
    if "session" in roles:
        store, bus = await _open(session_svc.app, site, outside)
        await _past(store.read(session_svc.store.latest_hlc()), site)
        sessions = session_svc.app.build(
            site, store, bus, dispatcher, outside.lifetimes, outside.seal, outside.allowances
        )
        duties.append(sessions.run)
        wait_alive.append(sessions.node.wait_alive)
    if "transfer" in roles:
        # Of a slot, money moves first and then accounts: where one is says nothing of the other.
        own = replace(site, placement=site.placement.copy())
        store, bus = await _open(transfer_svc.app, own, outside)
        await _place(store, own)
        transfers = transfer_svc.app.build(own, store, bus, dispatcher, outside.courier)
        duties.append(transfers.run)
        wait_alive.append(transfers.node.wait_alive)
    users = None
    if "gateway" in roles:
        users = gateway.app.build(
            site.mesh,
            site.placement,
            site.clock,
            outside.spans,
            dispatcher,
            outside.limits,
            outside.seal,
        )
        duties += users.duties
    if "account" not in roles and not {"gateway", "session"}.isdisjoint(roles):
        duties.append(partial(follow_homes, site.mesh.local, site.placement))
    return Center(users, duties, wait_alive)


class _App(Protocol):
    """A service's `app` module."""

    @property
    def ROLE(self) -> str: ...

    @property
    def SCHEMA(self) -> str: ...

    @property
    def TOPICS(self) -> Sequence[Topic]: ...


async def _place(store: Store, site: Site) -> None:
    """Stores the first placement, once; from then on it is what is stored, and what has moved since."""
    while not await store.read(homes.is_prepared()):
        try:
            await store.write("place", homes.prepare(site.placement))
        except RpcError as error:
            _logger.warning("a new store must wait", reason=error.reason)
            await asyncio.sleep(PREPARE_RETRY_S)
    site.placement.begin_with(await store.read(homes.first()))
    for one in await store.read(homes.moved()):
        site.placement.learn(one.slot, one.epoch, one.home)


async def _open(app: _App, site: Site, outside: Outside) -> tuple[Store, Bus]:
    """Opens a role's store, and moves the clock past everything that it has seen."""
    store = await outside.open_store(app.ROLE, node.SCHEMA + app.SCHEMA)
    while not await store.read(node.is_prepared(app.TOPICS, site.mesh.peers)):
        try:
            await store.write("prepare", node.prepare(app.TOPICS, site.mesh.peers))
        except RpcError as error:
            _logger.warning("a new store must wait", role=app.ROLE, reason=error.reason)
            await asyncio.sleep(PREPARE_RETRY_S)
    await _past(store.read(log.latest_hlc()), site)
    return store, outside.bus(app.ROLE)


async def _past(latest: Awaitable[int], site: Site) -> None:
    """Moves the hybrid clock past what a store holds: this machine's clock may have been set back."""
    site.stamps.hybrid.latest = max(site.stamps.hybrid.latest, await latest)
