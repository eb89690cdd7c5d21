"""Puts the transfer service together: the only place that wires it."""

import asyncio
from dataclasses import dataclass

from runtime.dispatcher import Dispatcher
from runtime.store import Store
from sync_bus.bus import Bus
from sync_bus.node import ServiceNode
from sync_bus.site import Site
from transfer_svc import applications, dispatch, ledger, notifications, transfers
from transfer_svc.audit import Audit
from transfer_svc.courier import Courier
from transfer_svc.dead_letters import DeadLetters
from transfer_svc.inbound import Inbound
from transfer_svc.notifier import Notifier
from transfer_svc.payees import Payees
from transfer_svc.service import TransferService

ROLE = "transfer"
SCHEMA = ledger.SCHEMA + transfers.SCHEMA + applications.SCHEMA + notifications.SCHEMA
TOPICS = (ledger.LEDGER, applications.APPLICATIONS)


@dataclass(frozen=True, slots=True)
class TransferNode:
    """Replication, the queue's worker and the notifier; `run` for as long as the service lives."""

    node: ServiceNode
    queue: dispatch.QueueWorker
    notifier: Notifier

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.run())
            await self.node.wait_alive()
            tasks.create_task(self.queue.run())
            tasks.create_task(self.notifier.run())


def build(
    site: Site, database: Store, bus: Bus, dispatcher: Dispatcher, courier: Courier
) -> TransferNode:
    """Serves the transfer role from `dispatcher`; the returned node's tasks keep it moving."""
    inbound = Inbound(site)
    node = ServiceNode(
        ROLE,
        TOPICS,
        site,
        database,
        bus,
        inbound.apply,
        Audit(site, database),
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
        DeadLetters(database, site.clock),
        *node.servicers,
        refusal=node.refusal,
    )
    return TransferNode(
        node, dispatch.QueueWorker(site, database), Notifier(site, database, courier)
    )
