"""Puts the session service together: the only place that wires it."""

import asyncio
from dataclasses import dataclass

from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from duohuo.v1.operator_service_pb2 import TransitFact
from runtime.dispatcher import Dispatcher
from runtime.store import Store
from runtime.token_seal import TokenSeal
from session_svc import store
from session_svc.guard import Allowances, Guard
from session_svc.service import SessionService
from session_svc.sessions import Lifetimes, Sessions
from sync_bus import audit
from sync_bus.bus import Bus
from sync_bus.facts import digests
from sync_bus.node import ServiceNode
from sync_bus.site import Site

ROLE = "session"
SCHEMA = store.SCHEMA
TOPICS = (*store.TOPICS, audit.topic(ROLE))


@dataclass(frozen=True, slots=True)
class _Inspection:
    site: Site
    database: Store
    sessions: Sessions

    async def counts(self) -> dict[str, int]:
        return await self.sessions.counts()

    async def overdue(self) -> list[TransitFact]:
        return []

    async def facts(self) -> CollectFactsResponse:
        """Sessions are not copied: only revocations must be the same everywhere."""
        with self.database.frozen() as frozen:
            return CollectFactsResponse(digests=await frozen.read(digests(self.site, TOPICS)))


@dataclass(frozen=True, slots=True)
class SessionNode:
    """Replication, the sessions that wait for room, and what is told of failed logins; `run` for as long as
    the service lives."""

    node: ServiceNode
    sessions: Sessions
    guard: Guard

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.run())
            tasks.create_task(self.sessions.run())
            tasks.create_task(self.guard.run())


def build(
    site: Site,
    database: Store,
    bus: Bus,
    dispatcher: Dispatcher,
    lifetimes: Lifetimes,
    seal: TokenSeal,
    allowances: Allowances,
) -> SessionNode:
    """Serves the session role from `dispatcher`; the returned node's tasks keep it moving."""
    sessions = Sessions(site.here, database, site.stamps, lifetimes)
    node = ServiceNode(
        ROLE, TOPICS, site, database, bus, store.apply, _Inspection(site, database, sessions)
    )
    guard = Guard(site, seal, allowances)
    service = SessionService(site, sessions, seal, guard)
    dispatcher.add("duohuo.v1.SessionService", service, refusal=node.refusal)
    dispatcher.add(
        "duohuo.internal.v1.SessionPeerService",
        service,
        guard,
        *node.servicers,
        refusal=node.refusal,
    )
    return SessionNode(node, sessions, guard)
