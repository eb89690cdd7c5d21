"""What `duohuo status` and `duohuo verify` ask of the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass

from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import LedgerSum, TransitFact, Violation
from runtime.clock import timestamp
from runtime.store import Store, Unit, query
from sync_bus import homes, inbox, log
from sync_bus.facts import digests
from sync_bus.log import Topic
from sync_bus.site import Site
from transfer_svc import applications, holds, invariants, ledger, notifications, transfers
from transfer_svc.moving import move_id

TRANSITS_MAX = 1000
VIOLATIONS_MAX = 100
OVERDUE_MAX = 20
OVERDUE_AFTER_MS = 60_000
"""A transfer between two homes takes seconds. What takes longer is told to operators."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The transfer role's part of status and verify."""

    site: Site
    database: Store
    topics: Sequence[Topic]

    async def counts(self) -> dict[str, int]:
        return await self.database.read(self._counts())

    async def overdue(self) -> list[TransitFact]:
        return await self.database.read(self._overdue())

    async def facts(self) -> CollectFactsResponse:
        with self.database.frozen() as frozen:
            return await frozen.read(self._facts())

    def _counts(self) -> Unit[dict[str, int]]:
        rows = yield from query(
            # Of all currencies together: total() does not overflow.
            "SELECT count(*), CAST(total(minor_units) AS INTEGER) FROM transfer WHERE state = 2"
            " AND center = ?",
            self.site.here,
        )
        queued = yield from applications.open_count()
        told = yield from notifications.counts()
        return {
            "transfers_in_transit": rows[0][0],
            "money_in_transit": rows[0][1],
            "applications_open": queued,
            **told,
        }

    def _facts(self) -> Unit[CollectFactsResponse]:
        facts = CollectFactsResponse()
        facts.ledger_sums.extend((yield from _sums(self.site.here)))
        facts.violations.extend(
            (yield from invariants.violations(self.site.here, self.site.mesh.peers))
        )
        facts.violations.extend(
            Violation(
                invariant="NO-OVERDRAFT",
                center=self.site.here,
                account_id=account_id,
                what=f"keeps {kept} back, its holds {held}",
            )
            for account_id, kept, held in (yield from holds.unequal(VIOLATIONS_MAX))
        )
        facts.digests.extend((yield from digests(self.site, self.topics)))
        facts.transits.extend((yield from self._transits(TRANSITS_MAX)))
        return facts

    def _overdue(self) -> Unit[list[TransitFact]]:
        transits = yield from self._transits(OVERDUE_MAX)
        return [one for one in transits if one.waiting_ms > OVERDUE_AFTER_MS]

    def _transits(self, limit: int) -> Unit[list[TransitFact]]:
        """What is on its way from here, the oldest first."""
        now_ms = self.site.clock.wall_ms()
        rows = yield from transfers.in_transit(self.site.here, limit)
        moving = yield from homes.in_progress(self.site.here)
        waits_for = {}
        for peer in {row.payee_home for row in rows}:
            waits_for[peer] = yield from self._waits_for(peer)
        return [
            TransitFact(
                transfer_id=row.transfer_id,
                payer_account_id=row.payer_account_id,
                payee_home=row.payee_home,
                amount=Money(currency_code=row.currency, minor_units=row.minor_units),
                debit_time=timestamp(row.create_ms),
                waiting_ms=max(0, now_ms - row.create_ms),
                waits_for=waits_for[row.payee_home],
            )
            for row in rows
        ] + [
            TransitFact(
                transfer_id=move_id(one.slot, one.epoch),
                payee_home=one.home,
                waits_for=f"center {one.home}, to take over slot {one.slot}",
            )
            for one in moving
        ]

    def _waits_for(self, peer: str) -> Unit[str]:
        """Why nothing has come of a debit for a center's account, as far as it is known here."""
        if peer not in self.site.mesh.peers:
            return f"center {peer}, which is not of this mesh"
        if not self.site.mesh.reachable(peer):
            return f"center {peer}, which does not answer"
        copy = yield from inbox.copy_of(peer, ledger.LEDGER.name)
        if copy.parked:
            return f"{copy.parked} parked entries of center {peer} (duohuo parked list {self.site.here})"
        if copy.installing:
            return f"a snapshot of center {peer}, which is being installed"
        confirmed = yield from log.confirmations(peer)
        head = (yield from log.position(ledger.LEDGER.name)).seq
        behind = head - confirmed.get(ledger.LEDGER.name, 0)
        if behind > 0:
            return f"center {peer}, which is {behind} entries behind"
        return f"the answer of center {peer}"


def _sums(center: str) -> Unit[list[LedgerSum]]:
    """Balances of the accounts this center is home of, by kind and currency."""
    rows = yield from query(
        "SELECT currency,"
        " sum(CASE WHEN account_id NOT LIKE '%.%' THEN balance ELSE 0 END),"
        " sum(CASE WHEN account_id LIKE 'transit.%' THEN balance ELSE 0 END),"
        " sum(CASE WHEN account_id LIKE 'external.%' THEN balance ELSE 0 END),"
        " sum(CASE WHEN account_id LIKE 'compensation.%' THEN balance ELSE 0 END)"
        " FROM ledger_account WHERE center = ? GROUP BY currency ORDER BY currency",
        center,
    )
    return [
        LedgerSum(
            currency_code=row[0], users=row[1], transit=row[2], external=row[3], compensation=row[4]
        )
        for row in rows
    ]
