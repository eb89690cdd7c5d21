"""What every service has besides its own work: a log that others read, copies of theirs, inspection."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.internal.v1.peer_services_pb2 import (
    CheckHealthRequest,
    CheckHealthResponse,
    CollectFactsRequest,
    CollectFactsResponse,
    InspectRequest,
    InspectResponse,
)
from duohuo.v1.operator_service_pb2 import (
    AuditAction,
    CopyName,
    DropParkedRequest,
    DropParkedResponse,
    EntryName,
    ListAuditRequest,
    ListAuditResponse,
    ListParkedRequest,
    ListParkedResponse,
    LogStatus,
    RetryParkedRequest,
    RetryParkedResponse,
    TransitFact,
    Violation,
)
from runtime.clock import milliseconds, timestamp
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, invalid
from runtime.store import Store, Unit, query
from sync_bus import audit, inbox, log, parked
from sync_bus.anti_entropy import AntiEntropy
from sync_bus.bus import Bus
from sync_bus.copies import CopiedTable, Found
from sync_bus.feed import FeedServicer
from sync_bus.growth import Growth
from sync_bus.inbox import Handler
from sync_bus.log import Stamp, Topic
from sync_bus.recovery import Join, Recovery, nothing_to_learn
from sync_bus.replicator import Replicator
from sync_bus.site import Site
from sync_bus.snapshot import Reconcile, Snapshots, SnapshotServicer

TRIED_WRITE = """
CREATE TABLE IF NOT EXISTS tried_write (only INTEGER NOT NULL PRIMARY KEY, times INTEGER NOT NULL) STRICT;
"""
SCHEMA = log.SCHEMA + inbox.SCHEMA + audit.SCHEMA + TRIED_WRITE
AUDIT_ACTIONS_DEFAULT, AUDIT_ACTIONS_MAX = 100, 1000


class Inspection(Protocol):
    """A service's own part of status and verify."""

    async def counts(self) -> dict[str, int]: ...

    async def overdue(self) -> list[TransitFact]:
        """What should have been done long ago."""
        ...

    async def facts(self) -> CollectFactsResponse: ...


def is_prepared(topics: Sequence[Topic], peers: Sequence[str]) -> Unit[bool]:
    """Is there nothing for `prepare` to write? Then a start works on a full disk too."""
    rows = yield from query(
        "SELECT (SELECT count(*) FROM life), (SELECT count(*) FROM log_head),"
        " (SELECT count(*) FROM confirmed), (SELECT count(*) FROM cursor)"
    )
    pairs = len(topics) * len(peers)
    return rows[0] == (1, len(topics), pairs, pairs)


def prepare(topics: Sequence[Topic], peers: Sequence[str]) -> Unit[None]:
    """Makes a new store ready for replication."""
    yield from log.prepare(topics, peers)
    yield from inbox.prepare(topics, peers)


def nothing_to_reconcile(_source: str, _topic: str) -> Unit[int]:
    """For services whose rows say everything: another center's entries cause nothing here."""
    yield from ()
    return 0


class ServiceNode:
    """The replication and inspection of one service; `run` for as long as it lives.

    Until its store is alive the service refuses its calls with `refusal`, but for those that recovering
    needs.
    """

    def __init__(
        self,
        role: str,
        topics: Sequence[Topic],
        site: Site,
        database: Store,
        bus: Bus,
        handler: Handler,
        inspection: Inspection,
        reconcile: Reconcile = nothing_to_reconcile,
        join: Join = nothing_to_learn,
    ) -> None:
        self.role = role
        snapshots = Snapshots(role, topics, database, site.mesh, site.stamps, reconcile)
        self._recovery = Recovery(
            role,
            topics,
            database,
            site.mesh,
            site.stamps,
            snapshots,
            reconcile,
            lone_start=site.lone_start,
            join=join,
        )
        self.refusal = self._recovery.refusal
        self.wait_alive = self._recovery.wait_alive
        self._growth = Growth(database)
        self._replicator = Replicator(
            role, topics, database, site, bus, _with_audit(handler), snapshots, self._growth
        )
        self._anti_entropy = AntiEntropy(role, topics, database, site.mesh)
        self.current_ms = self._replicator.current_ms
        self._inspection = inspection
        self._store = database
        self._here = site.here
        self._stamps = site.stamps
        self._topics = {topic.name: topic for topic in topics}
        self._peers = site.mesh.peers
        self._clocks = site.mesh.clocks
        self.servicers = (
            FeedServicer(
                database,
                frozenset(site.mesh.peers),
                site.clock,
                self._recovery.mark_lost,
                self._growth,
            ),
            SnapshotServicer(topics, database, site.mesh),
            self,
        )

    async def run(self) -> None:
        await self._recovery.run()
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._growth.run()),
                tasks.create_task(self._replicator.run()),
                tasks.create_task(self._anti_entropy.run()),
            ]
            await self._recovery.wait_lost()
            for task in running:
                task.cancel()

    async def CheckHealth(
        self, _request: CheckHealthRequest, _incoming: Incoming
    ) -> CheckHealthResponse:
        # Nobody may write to a center that takes no writes: so it is tried here whether it does by now.
        with suppress(RpcError):
            if not self._store.takes_writes:
                await self._store.write("try", _try_write())
        return CheckHealthResponse(takes_writes=self._store.takes_writes)

    async def Inspect(self, _request: InspectRequest, _incoming: Incoming) -> InspectResponse:
        return InspectResponse(
            roads=await self._replicator.roads(),
            counts=await self._inspection.counts(),
            clock_drift_ms=self._clocks.drifts_ms(),
            clock_wrong=self._clocks.local_is_wrong(),
            logs=await self._logs(),
            recovering=self._recovery.doing,
            overdue=await self._inspection.overdue(),
        )

    async def _logs(self) -> list[LogStatus]:
        return [
            LogStatus(
                topic=one.topic,
                destination=one.center,
                head=one.head,
                confirmed=one.confirmed,
                kept=one.kept,
                snapshot_needed=one.snapshot_needed,
            )
            for one in await self._store.read(log.destinations())
        ]

    async def CollectFacts(
        self, request: CollectFactsRequest, _incoming: Incoming
    ) -> CollectFactsResponse:
        facts = await self._inspection.facts()
        waiting = await self._store.read(parked.find(None))
        facts.violations.extend(one.violation(self._here) for one in waiting)
        facts.violations.extend(
            Violation(
                invariant="AUDIT",
                center=self._here,
                number=number,
                what=f"the audit log of center {center} does not fit its chain",
            )
            for center, number in await self._store.read(audit.broken())
        )
        for name in request.compare:
            await self._compare(name, facts)
        return facts

    async def _compare(self, name: CopyName, facts: CollectFactsResponse) -> None:
        """Compares a copy with its owner row by row, if both are there to be compared now."""
        topic = self._topics.get(name.topic)
        if topic is None or name.source_center not in self._peers:
            return
        try:
            found = await self._anti_entropy.differences(name.source_center, topic)
        except RpcError:
            return
        facts.compared.append(name)
        facts.violations.extend(
            _difference(self._here, name.source_center, table, one) for table, one in found
        )

    async def ListParked(
        self, _request: ListParkedRequest, _incoming: Incoming
    ) -> ListParkedResponse:
        waiting = await self._store.read(parked.find(None))
        return ListParkedResponse(
            entries=[one.shown() for one in waiting],
            actions=await self._store.read(parked.actions(self._here)),
        )

    async def RetryParked(
        self, request: RetryParkedRequest, incoming: Incoming
    ) -> RetryParkedResponse:
        name: EntryName | None = request.name if request.HasField("name") else None
        waiting = await self._store.read(parked.find(name))
        actions = await self._replicator.retry(incoming.operator, waiting)
        return RetryParkedResponse(actions=[parked.shown(one) for one in actions])

    async def DropParked(
        self, request: DropParkedRequest, incoming: Incoming
    ) -> DropParkedResponse:
        done = DropParkedResponse()
        for one in await self._store.read(parked.find(request.name)):
            unit = parked.drop(self.role, self._here, incoming.operator, one, self._stamps.now())
            action = await self._store.write("drop parked", unit)
            if action is not None:
                audit.tell(self.role, action)
                done.actions.append(parked.shown(action))
        return done

    async def ListAudit(self, request: ListAuditRequest, _incoming: Incoming) -> ListAuditResponse:
        if not 0 <= request.limit <= AUDIT_ACTIONS_MAX:
            raise invalid("limit", f"must be from 1 to {AUDIT_ACTIONS_MAX}")
        found = await self._store.read(
            audit.find(
                request.target,
                request.action,
                milliseconds(request.since_time),
                request.limit or AUDIT_ACTIONS_DEFAULT,
            )
        )
        return ListAuditResponse(
            actions=[
                AuditAction(
                    time=timestamp(one.time_ms),
                    center=one.center,
                    who=one.who,
                    action=one.action,
                    target=one.target,
                    before=one.before,
                    after=one.after,
                    role=self.role,
                    number=one.number,
                )
                for one in found
            ]
        )


def _try_write() -> Unit[None]:
    """Changes something: SQLite writes no page that stays the same."""
    yield from query(
        "INSERT INTO tried_write VALUES (1, 1) ON CONFLICT (only) DO UPDATE SET times = times + 1"
    )


def _with_audit(handler: Handler) -> Handler:
    """The effect of another center's records: what its operators did is the same for all services."""

    def apply(source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
        if record.HasField("audit_recorded"):
            yield from audit.copy(record.audit_recorded)
        else:
            yield from handler(source, record, stamp)

    return apply


def _difference(here: str, owner: str, table: CopiedTable, found: Found) -> Violation:
    """A row of a copy that is not what its owner has; named by the ids in it."""
    named = dict(zip(table.columns, found.row, strict=True))
    what = f"{table.name} of center {owner}: {found.difference.value}"
    return Violation(
        invariant="CONVERGE",
        center=here,
        account_id=str(named.get("account_id", named.get("payer_account_id", ""))),
        transfer_id=str(named.get("transfer_id", "")),
        number=int(named.get("number", 0)),
        what=what if found.trusted else f"{what}, but its owner's row does not fit its chain",
    )
