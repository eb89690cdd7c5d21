"""Puts the session service together: the only place that wires it."""

from dataclasses import dataclass

from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from runtime.dispatcher import Dispatcher
from runtime.store import Store
from session_svc import store
from session_svc.service import SessionService
from sync_bus.bus import Bus
from sync_bus.node import ServiceNode
from sync_bus.site import Site

ROLE = "session"
SCHEMA = store.SCHEMA
TOPICS = store.TOPICS


@dataclass(frozen=True, slots=True)
class _Inspection:
    site: Site
    database: Store

    async def counts(self) -> dict[str, int]:
        return await self.database.read(store.counts(self.site.clock.wall_ms()))

    async def facts(self) -> CollectFactsResponse:
        """Sessions are not copied: there is nothing to agree on."""
        return CollectFactsResponse()


def build(site: Site, database: Store, bus: Bus, dispatcher: Dispatcher) -> ServiceNode:
    """Serves the session role from `dispatcher`; the returned node's tasks replicate revocations."""
    node = ServiceNode(ROLE, TOPICS, site, database, bus, store.apply, _Inspection(site, database))
    service = SessionService(site, database)
    dispatcher.add("duohuo.v1.SessionService", service, refusal=node.refusal)
    dispatcher.add(
        "duohuo.internal.v1.SessionPeerService", service, *node.servicers, refusal=node.refusal
    )
    return node
