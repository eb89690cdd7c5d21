"""What `duohuo status` and `duohuo verify` ask of the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass

from duohuo.internal.v1.peer_services_pb2 import CollectFactsResponse
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import LedgerSum, TransitFact
from runtime.clock import timestamp
from runtime.store import Store, Unit, query
from sync_bus.facts import digests
from sync_bus.log import Topic
from sync_bus.site import Site
from transfer_svc import applications, holds, transfers

VIOLATIONS_MAX = 100
TRANSITS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Audit:
    """The transfer role's part of status and verify."""

    site: Site
    database: Store
    topics: Sequence[Topic]

    async def counts(self) -> dict[str, int]:
        return await self.database.read(self._counts())

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
        return {
            "transfers_in_transit": rows[0][0],
            "money_in_transit": rows[0][1],
            "applications_open": queued,
        }

    def _facts(self) -> Unit[CollectFactsResponse]:
        facts = CollectFactsResponse()
        facts.ledger_sums.extend((yield from _sums(self.site.here)))
        facts.violations.extend((yield from _violations()))
        facts.digests.extend((yield from digests(self.site, self.topics)))
        for row in (yield from transfers.in_transit(self.site.here, TRANSITS_MAX)):
            facts.transits.append(
                TransitFact(
                    transfer_id=row.transfer_id,
                    payer_account_id=row.payer_account_id,
                    payee_home=row.payee_home,
                    amount=Money(currency_code=row.currency, minor_units=row.minor_units),
                    debit_time=timestamp(row.create_ms),
                )
            )
        return facts


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


def _violations() -> Unit[list[str]]:
    """Broken invariants in this center's own database, each named."""
    found = []
    rows = yield from query(
        "SELECT account_id, balance FROM ledger_account"
        " WHERE balance < 0 AND account_id NOT LIKE '%.%' LIMIT ?",
        VIOLATIONS_MAX,
    )
    found += [f"NO-OVERDRAFT: account {row[0]} has {row[1]}" for row in rows]
    unequal = yield from holds.unequal(VIOLATIONS_MAX)
    found += [
        f"NO-OVERDRAFT: account {row[0]} keeps {row[1]} back, its holds {row[2]}" for row in unequal
    ]
    rows = yield from query(
        "SELECT a.account_id, a.balance, coalesce(sum(e.minor_units), 0), a.last_number, count(e.number)"
        " FROM ledger_account a LEFT JOIN entry e ON e.account_id = a.account_id"
        " GROUP BY a.account_id HAVING a.balance <> coalesce(sum(e.minor_units), 0)"
        " OR a.last_number <> count(e.number) LIMIT ?",
        VIOLATIONS_MAX,
    )
    found += [
        f"CONSERVE: account {row[0]} has {row[1]}, its {row[4]} of {row[3]} entries sum to {row[2]}"
        for row in rows
    ]
    rows = yield from query(
        "SELECT e.center, e.transfer_id, e.kind, sum(e.minor_units) FROM entry e"
        " GROUP BY e.center, e.transfer_id, e.kind HAVING sum(e.minor_units) <> 0 LIMIT ?",
        VIOLATIONS_MAX,
    )
    found += [
        f"CONSERVE: the entries of transfer {row[1]} at center {row[0]} sum to {row[3]}"
        for row in rows
    ]
    return found
