"""Puts the transfer service together: the only place that wires it."""

import asyncio
from dataclasses import dataclass

from runtime.dispatcher import Dispatcher
from runtime.store import Store
from sync_bus import audit, homes
from sync_bus.bus import Bus
from sync_bus.handover import HandoverServicer
from sync_bus.homes import Homes
from sync_bus.node import ServiceNode
from sync_bus.site import Site
from transfer_svc import (
    applications,
    attempts,
    controls,
    dispatch,
    histories,
    holds,
    ledger,
    notifications,
    refusals,
    transfers,
)
from transfer_svc.audit import Audit
from transfer_svc.control_service import ControlService
from transfer_svc.courier import Courier
from transfer_svc.dead_letters import DeadLetters
from transfer_svc.hold_service import HoldExpiry, HoldService
from transfer_svc.inbound import Inbound
from transfer_svc.notifier import Notifier
from transfer_svc.payees import Payees
from transfer_svc.service import TransferService

ROLE = "transfer"
SCHEMA = homes.SCHEMA + "".join(
    part.SCHEMA
    for part in (
        ledger,
        transfers,
        refusals,
        holds,
        controls,
        applications,
        attempts,
        histories,
        notifications,
    )
)
TOPICS = (ledger.LEDGER, applications.APPLICATIONS, audit.topic(ROLE))


@dataclass(frozen=True, slots=True)
class TransferNode:
    """Replication, and the workers on the queue, on holds and on notifications; `run` for as long as the
    service lives."""

    node: ServiceNode
    homes: Homes
    queue: dispatch.QueueWorker
    expiry: HoldExpiry
    notifier: Notifier

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.run())
            await self.node.wait_alive()
            tasks.create_task(self.homes.run())
            tasks.create_task(self.queue.run())
            tasks.create_task(self.expiry.run())
            tasks.create_task(self.notifier.run())


def slots_of(site: Site, database: Store) -> Homes:
    """The slots of this service."""
    return Homes(ROLE, ledger.LEDGER, site, database, Inbound(site))


def build(
    site: Site, database: Store, bus: Bus, dispatcher: Dispatcher, courier: Courier
) -> TransferNode:
    """Serves the transfer role from `dispatcher`; the returned node's tasks keep it moving."""
    slots = slots_of(site, database)
    inbound = Inbound(site)
    node = ServiceNode(
        ROLE,
        TOPICS,
        site,
        database,
        bus,
        slots.before(inbound.apply),
        Audit(site, database, TOPICS),
        inbound.reconcile,
        slots.join,
    )
    payees = Payees(site, database)
    queue = dispatch.QueueWorker(site, database)
    service = TransferService(
        site,
        database,
        payees,
        lambda source: node.current_ms(source, ledger.LEDGER),
        queue.notice,
        slots,
    )
    slots.on_change = queue.homes_changed
    held = HoldService(site, database, payees, service.settled, slots)
    dispatcher.add("duohuo.v1.TransferService", service, held, refusal=node.refusal)
    dispatcher.add(
        "duohuo.internal.v1.TransferPeerService",
        service,
        ControlService(site, database, slots),
        HandoverServicer((ledger.LEDGER,), site, database, slots),
        DeadLetters(site, database),
        histories.Histories(database),
        *node.servicers,
        refusal=node.refusal,
    )
    return TransferNode(
        node, slots, queue, HoldExpiry(site, database), Notifier(site, database, courier)
    )
