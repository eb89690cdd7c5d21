"""Puts the account service together: the only place that wires it."""

import asyncio
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from account_svc import draining, registry, store
from account_svc.announcement_service import AnnouncementService
from account_svc.draining import DrainingServicer
from account_svc.identifier_service import IdentifierService
from account_svc.memory import Memory
from account_svc.passwords import Passwords
from account_svc.revoker import Revoker
from account_svc.service import AccountService
from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from duohuo.v1.operator_service_pb2 import TransitFact, Violation
from runtime.destinations import Destinations
from runtime.dispatcher import Dispatcher
from runtime.ids import account_slot
from runtime.placement import slot_of
from runtime.store import Store, Unit
from sync_bus import audit, homes, parked
from sync_bus.bus import Bus
from sync_bus.facts import digests
from sync_bus.followers import Followers
from sync_bus.handover import HandoverServicer
from sync_bus.homes import Homes
from sync_bus.log import Stamp
from sync_bus.node import ServiceNode
from sync_bus.site import Site

ROLE = "account"
SCHEMA = store.SCHEMA + draining.SCHEMA
TOPICS = (*store.TOPICS, audit.topic(ROLE))
VIOLATIONS_MAX = 100


@dataclass(frozen=True, slots=True)
class _Inspection:
    site: Site
    database: Store

    async def counts(self) -> dict[str, int]:
        return await self.database.read(store.counts())

    async def overdue(self) -> list[TransitFact]:
        return []

    async def facts(self) -> CollectFactsResponse:
        with self.database.frozen() as frozen:
            return await frozen.read(self._facts())

    def _facts(self) -> Unit[CollectFactsResponse]:
        violations = [
            Violation(
                invariant="UNIQUE",
                center=self.site.here,
                account_id=account_id,
                what="it does not stand at its identifier's slot",
            )
            for account_id in (yield from registry.misplaced(VIOLATIONS_MAX))
        ]
        violations += [
            Violation(
                invariant="UNIQUE",
                center=self.site.here,
                account_id=account_id,
                what=f"its identifier was also claimed for account {other}",
            )
            for account_id, other in (yield from registry.held_twice())
        ]
        violations += [
            Violation(
                invariant="UNIQUE",
                center=self.site.here,
                account_id=account_id,
                what=f"account {other}, which center {source} made, claims the same identifier",
            )
            for account_id, other, source in (yield from self._claimed_twice())
        ]
        return CollectFactsResponse(
            violations=violations,
            digests=(yield from digests(self.site, TOPICS)),
        )

    def _claimed_twice(self) -> Unit[list[tuple[str, str, str]]]:
        """Accounts here, and those that another center says have the same identifier."""
        found = []
        for one in (yield from parked.find(None)):
            try:
                record = LogRecord.FromString(one.record)
            except DecodeError:
                continue
            for claim in (record.account_created, record.identifier_claimed):
                present = yield from registry.holder(claim.identifier)
                if present is not None and present != claim.account_id:
                    found.append((present, claim.account_id, one.source))
        return found


@dataclass(frozen=True, slots=True)
class AccountNode:
    """Replication, and forgetting; `run` for as long as the service lives."""

    node: ServiceNode
    homes: Homes
    memory: Memory
    revoker: Revoker

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.node.run())
            await self.node.wait_alive()
            tasks.create_task(self.homes.run())
            tasks.create_task(self.memory.run())
            tasks.create_task(self.revoker.run())


def _told_of(record: LogRecord) -> list[int | None]:
    """The slots of which a center must be home to say this; None for what has none."""
    match record.WhichOneof("body"):
        case "account_created":
            created = record.account_created
            return [slot_of(created.identifier), account_slot(created.account_id)]
        case "identifier_claimed":
            claimed = record.identifier_claimed
            known = account_slot(claimed.account_id) is not None
            return [slot_of(claimed.identifier) if known else None]
        case "account_erased":
            return [account_slot(record.account_erased.account_id)]
    return []


def slots_of(site: Site, database: Store) -> Homes:
    """The slots of this service. Accounts and claims never change: only the right to make them moves."""
    return Homes(ROLE, registry.ACCOUNTS, site, database, homes.NothingMoves())


def build(
    site: Site,
    database: Store,
    bus: Bus,
    passwords: Passwords,
    dispatcher: Dispatcher,
    destinations: Destinations,
    *,
    email_offered: bool,
) -> AccountNode:
    """Serves the account role from `dispatcher`; the returned node's tasks keep it moving."""

    slots = slots_of(site, database)

    def apply(source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
        for slot in _told_of(record):
            if slot is None:
                raise ValueError("neither an account nor one of its identifiers")
            yield from homes.require_speaks(source, registry.ACCOUNTS.name, slot)
        yield from store.apply(source, record, stamp)
        if record.HasField("account_erased"):
            yield from registry.release(record.account_erased.account_id, site.here, stamp)

    def reconcile(_source: str, _topic: str) -> Unit[int]:
        """Of accounts whose erasure has come with a snapshot."""
        account_id = yield from registry.to_release()
        if account_id is None:
            return 0
        return (yield from registry.release(account_id, site.here, site.stamps.now()))

    inspection = _Inspection(site, database)
    node = ServiceNode(
        ROLE,
        TOPICS,
        site,
        database,
        bus,
        slots.before(apply),
        inspection,
        reconcile,
        slots.join,
    )
    revoker = Revoker(site, database)
    service = AccountService(
        site,
        database,
        passwords,
        lambda source: node.current_ms(source, registry.ACCOUNTS),
        destinations,
        revoker,
        Followers(list(site.mesh.peers), database),
        slots,
        email_offered=email_offered,
    )
    servicers = (service, IdentifierService(site, database, service, slots))
    dispatcher.add("duohuo.v1.AccountService", *servicers, refusal=node.refusal)
    handing = HandoverServicer(store.TOPICS, site, database, slots)
    drained = DrainingServicer(site, database, node)
    announcing = AnnouncementService(site, database)
    peers = (*servicers, announcing, drained, handing, *node.servicers)
    dispatcher.add("duohuo.internal.v1.AccountPeerService", *peers, refusal=node.refusal)
    return AccountNode(node, slots, Memory(site, database), revoker)
