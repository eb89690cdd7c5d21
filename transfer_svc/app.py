"""Puts the transfer service together: the only place that wires it."""

import asyncio
from dataclasses import dataclass

from runtime.dispatcher import Dispatcher
from runtime.store import Store
from sync_bus import audit
from sync_bus.bus import Bus
from sync_bus.node import ServiceNode
from sync_bus.site import Site
from transfer_svc import applications, attempts, dispatch, histories, ledger, refusals, transfers
from transfer_svc.audit import Audit
from transfer_svc.inbound import Inbound
from transfer_svc.payees import Payees
from transfer_svc.service import TransferService

ROLE = "transfer"
SCHEMA = "".join(
    part.SCHEMA for part in (ledger, transfers, refusals, applications, attempts, histories)
)
TOPICS = (ledger.LEDGER, applications.APPLICATIONS, audit.topic(ROLE))


@dataclass(frozen=True, slots=True)
class TransferNode:
    """Replication, and the queue's worker; `run` for as long as the service lives."""

    node: ServiceNode
    queue: dispatch.QueueWorker

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.run())
            await self.node.wait_alive()
            tasks.create_task(self.queue.run())


def build(site: Site, database: Store, bus: Bus, dispatcher: Dispatcher) -> TransferNode:
    """Serves the transfer role from `dispatcher`; the returned node's tasks keep it moving."""
    inbound = Inbound(site)
    node = ServiceNode(
        ROLE,
        TOPICS,
        site,
        database,
        bus,
        inbound.apply,
        Audit(site, database, TOPICS),
        inbound.reconcile,
    )
    service = TransferService(
        site,
        database,
        Payees(site, database),
        lambda source: node.current_ms(source, ledger.LEDGER),
    )
    dispatcher.add("duohuo.v1.TransferService", service, refusal=node.refusal)
    dispatcher.add(
        "duohuo.internal.v1.TransferPeerService",
        service,
        histories.Histories(database),
        *node.servicers,
        refusal=node.refusal,
    )
    return TransferNode(node, dispatch.QueueWorker(site, database))
