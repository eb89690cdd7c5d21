"""Puts the account service together: the only place that wires it."""

import asyncio
from dataclasses import dataclass

from account_svc import store
from account_svc.memory import Memory
from account_svc.passwords import Passwords
from account_svc.service import AccountService
from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from runtime.dispatcher import Dispatcher
from runtime.placement import slot_of
from runtime.store import Store, Unit
from sync_bus import audit
from sync_bus.bus import Bus
from sync_bus.facts import digests
from sync_bus.node import ServiceNode
from sync_bus.site import Site

ROLE = "account"
SCHEMA = store.SCHEMA
TOPICS = (*store.TOPICS, audit.topic(ROLE))


@dataclass(frozen=True, slots=True)
class _Inspection:
    site: Site
    database: Store

    async def counts(self) -> dict[str, int]:
        return await self.database.read(store.counts())

    async def facts(self) -> CollectFactsResponse:
        with self.database.frozen() as frozen:
            return await frozen.read(self._facts())

    def _facts(self) -> Unit[CollectFactsResponse]:
        accounts = yield from store.all_accounts()
        violations = [
            f"UNIQUE: account {row.account_id} does not stand at its identifier's slot"
            for row in accounts
            if self.site.slot_of(row.account_id) != slot_of(row.identifier)
        ]
        return CollectFactsResponse(
            violations=violations,
            digests=(yield from digests(self.site, TOPICS)),
        )


@dataclass(frozen=True, slots=True)
class AccountNode:
    """Replication, and forgetting; `run` for as long as the service lives."""

    node: ServiceNode
    memory: Memory

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.run())
            await self.node.wait_alive()
            tasks.create_task(self.memory.run())


def build(
    site: Site, database: Store, bus: Bus, passwords: Passwords, dispatcher: Dispatcher
) -> AccountNode:
    """Serves the account role from `dispatcher`; the returned node's tasks keep it moving."""
    node = ServiceNode(ROLE, TOPICS, site, database, bus, store.apply, _Inspection(site, database))
    service = AccountService(
        site, database, passwords, lambda source: node.current_ms(source, store.ACCOUNTS)
    )
    dispatcher.add("duohuo.v1.AccountService", service, refusal=node.refusal)
    dispatcher.add(
        "duohuo.internal.v1.AccountPeerService", service, *node.servicers, refusal=node.refusal
    )
    return AccountNode(node, Memory(site, database))
