"""`duohuo verify`: proves on a running mesh that money is conserved and that the copies agree.

Each center reads its facts on one snapshot per service; `judge`, a plain function, compares them.
Entries in flight between centers are no fault: they are asked for again until they have arrived.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duohuo.v1.operator_service_pb2 import CenterFacts, GetFactsRequest
from ops import mesh_file
from ops.client import ask_operator
from runtime.errors import RpcError

RETRY_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `in_flight` names what could not be compared yet."""

    violations: Sequence[str]
    in_flight: Sequence[str]
    missing: Sequence[str]
    checked: Sequence[str]

    @property
    def passed(self) -> bool:
        return not self.violations and not self.missing and not self.in_flight

    def text(self) -> str:
        lines = [f"ok    {line}" for line in self.checked]
        lines += [f"FAIL  {line}" for line in self.violations]
        lines += [f"FAIL  center {center} does not answer" for center in self.missing]
        lines += [f"WAIT  {line}" for line in self.in_flight]
        lines.append("verify: passed" if self.passed else "verify: FAILED")
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "violations": list(self.violations),
            "missing_centers": list(self.missing),
            "in_flight": list(self.in_flight),
            "checked": list(self.checked),
        }


async def verify(state: Path, wait_s: float) -> Report:
    """Compares all centers, again and again until nothing is in flight or time is up."""
    names = list(mesh_file.read(state).centers)
    deadline = asyncio.get_running_loop().time() + wait_s
    while True:
        answers = await asyncio.gather(*(_ask(state, name) for name in names))
        facts = {name: answer for name, answer in zip(names, answers, strict=True) if answer}
        report = judge(facts, names)
        settled = report.violations or report.missing or not report.in_flight
        if settled or asyncio.get_running_loop().time() > deadline:
            return report
        await asyncio.sleep(RETRY_INTERVAL_S)


def judge(facts: Mapping[str, CenterFacts], expected: Sequence[str]) -> Report:
    """What the facts of all centers say together."""
    violations = [
        f"center {name}: {violation}" for name, one in facts.items() for violation in one.violations
    ]
    missing = [name for name in expected if name not in facts]
    missing += [
        f"{name} ({', '.join(one.silent_roles)})" for name, one in facts.items() if one.silent_roles
    ]
    in_flight = [
        f"transfer {transit.transfer_id} of {transit.payer_account_id} is on its way from {name}"
        f" to {transit.payee_home}"
        for name, one in facts.items()
        for transit in one.transits
    ]
    digest_violations, digest_in_flight, compared = _compare_digests(facts)
    violations += digest_violations
    in_flight += digest_in_flight
    sum_violations, sums = _compare_sums(facts, complete=not missing and not in_flight)
    violations += sum_violations
    return Report(violations, in_flight, missing, [*sums, *compared])


def _compare_digests(
    facts: Mapping[str, CenterFacts],
) -> tuple[list[str], list[str], list[str]]:
    """Copies at the same position must be the same; copies at another are on their way."""
    violations, in_flight, compared = [], [], []
    by_topic: dict[tuple[str, str], dict[str, tuple[str, str]]] = defaultdict(dict)
    for name, one in facts.items():
        for digest in one.digests:
            by_topic[digest.topic, digest.source_center][name] = digest.position, digest.digest
    for (topic, source), held in sorted(by_topic.items()):
        whose = "all centers" if source == "*" else f"center {source}"
        positions = {position for position, _ in held.values()}
        for position in sorted(positions):
            digests = {digest for at, digest in held.values() if at == position}
            if len(digests) > 1:
                holders = ", ".join(name for name, (at, _) in held.items() if at == position)
                violations.append(
                    f"CONVERGE: {topic} of {whose} differ between centers {holders} at {position}"
                )
        if len(positions) > 1:
            in_flight.append(f"{topic} of {whose} are at {' / '.join(sorted(positions))}")
        else:
            compared.append(f"CONVERGE: {topic} of {whose} are the same at {len(held)} centers")
    return violations, in_flight, compared


def _compare_sums(
    facts: Mapping[str, CenterFacts], *, complete: bool
) -> tuple[list[str], list[str]]:
    """Each center's books sum to zero; so does all transit once nothing is on its way."""
    violations, fine = [], []
    transit: dict[str, int] = defaultdict(int)
    for name, one in facts.items():
        for sums in one.ledger_sums:
            transit[sums.currency_code] += sums.transit
            total = sums.users + sums.transit + sums.external + sums.compensation
            if total:
                violations.append(
                    f"CONSERVE: the books of center {name} are off by {total} {sums.currency_code}"
                )
            else:
                fine.append(
                    f"CONSERVE: the books of center {name} sum to zero;"
                    f" its users hold {sums.users} {sums.currency_code}"
                )
    if complete:
        violations += [
            f"CONSERVE: {amount} {currency} are in transit although nothing is on its way"
            for currency, amount in sorted(transit.items())
            if amount
        ]
    return violations, fine


async def _ask(state: Path, center: str) -> CenterFacts | None:
    try:
        return await ask_operator(state, center, "GetFacts", GetFactsRequest(), CenterFacts)
    except RpcError:
        return None
