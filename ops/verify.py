"""`duohuo verify`: proves on a running mesh that money is conserved and that the copies agree.

Each center reads its facts on one snapshot per service, a consistent cut (`transfer_svc.invariants`);
`judge`, a plain function, compares them. Copies must be what their owner had at the same position. On a
mesh at rest one look shows that. On a busy one no look finds all at the same positions: what owners had is
remembered, and a copy counts once it was seen where its owner was; if that never happens, the center
compares its rows with the owner's itself. What is on its way is named, and no fault.
"""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from duohuo.v1 import operator_service_pb2
from duohuo.v1.operator_service_pb2 import CenterFacts, CopyName, GetFactsRequest, TransitFact
from ops import mesh_file
from ops.client import ask_operator
from ops.plain import plain
from runtime.errors import RpcError

RETRY_INTERVAL_S = 0.5
FACTS_TIMEOUT_S = 250.0
PROGRESS_INTERVAL_S = 1.0
REMEMBERED_MAX = 64
OVERDUE_AFTER_MS = 60_000
"""What is on its way for longer than this is listed by itself."""

Tell = Callable[[str], None]


class Held(NamedTuple):
    """One topic of one center, or of all for `*`, as some center has it."""

    topic: str
    source: str
    holder: str


class Violation(NamedTuple):
    """A broken invariant: in whose database it shows, and which account and transfer it is about."""

    invariant: str
    what: str
    center: str = ""
    account_id: str = ""
    transfer_id: str = ""
    number: int = 0

    def __str__(self) -> str:
        about = [
            f"{name} {value}"
            for name, value in (
                ("center", self.center),
                ("account", self.account_id),
                ("transfer", self.transfer_id),
            )
            if value
        ]
        return f"{self.invariant}: {', '.join(about)}{': ' if about else ''}{self.what}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    `in_flight` names what could not be compared yet, `unmatched` the copies of it. `moving` names what is
    on its way although everything could be compared: somebody uses the mesh.
    """

    violations: Sequence[Violation]
    in_flight: Sequence[str]
    missing: Sequence[str]
    checked: Sequence[str]
    unmatched: Collection[Held] = ()
    differing: Collection[Held] = ()
    overdue: Sequence[tuple[str, TransitFact]] = ()
    moving: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        return not self.violations and not self.missing and not self.in_flight

    def concluded(self) -> "Report":
        """The verdict on a mesh that does not come to rest: passed, if every copy was compared."""
        if self.violations or self.missing or self.unmatched:
            return self
        return replace(self, in_flight=(), moving=self.in_flight)

    def text(self) -> str:
        lines = [f"ok    {line}" for line in self.checked]
        lines += [f"FAIL  {line}" for line in self.violations]
        lines += [f"FAIL  center {center} does not answer" for center in self.missing]
        lines += [f"LATE  {overdue_line(home, transit)}" for home, transit in self.overdue]
        lines += [f"WAIT  {line}" for line in self.in_flight]
        lines += [f"MOVES {line}" for line in self.moving]
        lines.append("verify: passed" if self.passed else "verify: FAILED")
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "violations": [{**one._asdict(), "line": str(one)} for one in self.violations],
            "missing_centers": list(self.missing),
            "in_flight": list(self.in_flight),
            "moving": list(self.moving),
            "overdue": [{"payer_home": home, **plain(one)} for home, one in self.overdue],
            "checked": list(self.checked),
        }


@dataclass(slots=True)
class Memory:
    """What was seen before: digests by position, and which copies were compared."""

    seen: dict[tuple[str, str], OrderedDict[str, dict[str, str]]] = field(
        default_factory=lambda: defaultdict(OrderedDict)
    )
    matched: set[Held] = field(default_factory=set)

    def remember(self, one: Held, position: str, digest: str) -> Mapping[str, str]:
        """Everybody's digests at this position; forgets the positions that were seen first."""
        positions = self.seen[one.topic, one.source]
        holders = positions.setdefault(position, {})
        holders[one.holder] = digest
        while len(positions) > REMEMBERED_MAX:
            positions.popitem(last=False)
        return holders


async def verify(state: Path, wait_s: float, tell: Tell | None = None) -> Report:
    """Compares all centers, again and again until nothing is in flight or time is up.

    When time is up, what could never be compared at the same position is compared row by row.
    """
    names = list(mesh_file.read(state).centers)
    clock = asyncio.get_running_loop().time
    deadline_s = clock() + wait_s
    memory = Memory()
    while True:
        report = judge(await _collect(state, names, {}, tell), names, memory)
        if report.passed or report.missing or report.violations or clock() > deadline_s:
            break
        await asyncio.sleep(RETRY_INTERVAL_S)
    wanted: dict[str, list[CopyName]] = defaultdict(list)
    for one in [*report.differing, *(report.unmatched if wait_s and not report.missing else ())]:
        sources = [name for name in names if name != one.holder and one.source in ("*", name)]
        wanted[one.holder] += [CopyName(source_center=name, topic=one.topic) for name in sources]
    if wanted:
        answers = await _collect(state, names, wanted, tell)
        compared = judge(answers, names, memory)
        # What was seen before counts, even if it has been repaired meanwhile.
        violations = dict.fromkeys([*report.violations, *compared.violations])
        report = replace(compared, violations=list(violations))
    return report.concluded() if wait_s else report


def judge(
    facts: Mapping[str, CenterFacts], expected: Sequence[str], memory: Memory | None = None
) -> Report:
    """What the facts of all centers say together, and together with what was seen before."""
    violations = [_of(one) for facts_ in facts.values() for one in facts_.violations]
    missing = [name for name in expected if name not in facts]
    missing += [
        f"{name} ({', '.join(one.silent_roles)})" for name, one in facts.items() if one.silent_roles
    ]
    transits = [(name, transit) for name, one in facts.items() for transit in one.transits]
    in_flight = [
        f"transfer {transit.transfer_id} of {transit.payer_account_id} is on its way from {name}"
        f" to {transit.payee_home}"
        for name, transit in transits
    ]
    copies = _compare_digests(facts, memory or Memory())
    violations += copies.violations
    in_flight += copies.in_flight
    sum_violations, sums = _compare_sums(facts, complete=not missing and not in_flight)
    violations += sum_violations
    return Report(
        violations,
        in_flight,
        missing,
        [*sums, *copies.compared],
        copies.unmatched,
        copies.differing,
        [one for one in transits if one[1].waiting_ms > OVERDUE_AFTER_MS],
    )


def overdue_line(home: str, transit: TransitFact) -> str:
    """A transfer that is on its way for too long, for people."""
    return (
        f"transfer {transit.transfer_id} of {transit.payer_account_id}:"
        f" {transit.amount.minor_units} {transit.amount.currency_code} on the way from {home} to"
        f" {transit.payee_home} since {transit.debit_time.ToJsonString()}"
        f" ({transit.waiting_ms // 1000} s); waits for {transit.waits_for}"
    )


def _of(one: operator_service_pb2.Violation) -> Violation:
    return Violation(
        one.invariant, one.what, one.center, one.account_id, one.transfer_id, one.number
    )


@dataclass(slots=True)
class _Copies:
    violations: list[Violation] = field(default_factory=list)
    in_flight: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    unmatched: list[Held] = field(default_factory=list)
    differing: list[Held] = field(default_factory=list)


def _compare_digests(facts: Mapping[str, CenterFacts], memory: Memory) -> _Copies:
    """Copies at the same position must be the same; copies at another are on their way."""
    found = _Copies()
    by_topic: dict[tuple[str, str], dict[str, tuple[str, str]]] = defaultdict(dict)
    for name, one in facts.items():
        for digest in one.digests:
            by_topic[digest.topic, digest.source_center][name] = digest.position, digest.digest
        for copy in one.compared:
            memory.matched |= {
                Held(copy.topic, copy.source_center, name),
                Held(copy.topic, "*", name),
            }
    for (topic, source), held in sorted(by_topic.items()):
        whose = "all centers" if source == "*" else f"center {source}"
        now: dict[str, list[str]] = defaultdict(list)
        for name, (position, _) in held.items():
            now[position].append(name)
        for position, names in sorted(now.items()):
            at: Mapping[str, str] = {}
            for name in names:
                at = memory.remember(Held(topic, source, name), position, held[name][1])
            if len(set(at.values())) > 1:
                found.violations.append(
                    Violation(
                        "CONVERGE",
                        f"{topic} of {whose} differ between centers {', '.join(at)} at {position}",
                    )
                )
                found.differing += [Held(topic, source, name) for name in at if name != source]
            elif len(at) > 1 and (source == "*" or source in at):
                memory.matched |= {Held(topic, source, name) for name in at}
        if len(now) > 1:
            found.in_flight.append(f"{topic} of {whose} are at {' / '.join(sorted(now))}")
            copies = (Held(topic, source, name) for name in held if name != source)
            found.unmatched += [one for one in copies if one not in memory.matched]
        else:
            found.compared.append(
                f"CONVERGE: {topic} of {whose} are the same at {len(held)} centers"
            )
    return found


def _compare_sums(
    facts: Mapping[str, CenterFacts], *, complete: bool
) -> tuple[list[Violation], list[str]]:
    """Each center's books sum to zero, so all do; so does all transit once nothing is on its way."""
    violations, fine = [], []
    transit: dict[str, int] = defaultdict(int)
    everywhere: dict[str, int] = defaultdict(int)
    for name, one in facts.items():
        for sums in one.ledger_sums:
            transit[sums.currency_code] += sums.transit
            total = sums.users + sums.transit + sums.external + sums.compensation
            everywhere[sums.currency_code] += total
            if total:
                violations.append(
                    Violation(
                        "CONSERVE",
                        f"the books of center {name} are off by {total} {sums.currency_code}",
                        name,
                    )
                )
            else:
                fine.append(
                    f"CONSERVE: the books of center {name} sum to zero;"
                    f" its users hold {sums.users} {sums.currency_code}"
                )
    fine += [
        f"CONSERVE: {currency} of all {len(facts)} centers sums to zero,"
        f" {transit[currency]} of it in transit"
        for currency, total in sorted(everywhere.items())
        if not total
    ]
    if complete:
        violations += [
            Violation(
                "CONSERVE", f"{amount} {currency} are in transit although nothing is on its way"
            )
            for currency, amount in sorted(transit.items())
            if amount
        ]
    return violations, fine


async def _collect(
    state: Path,
    names: Sequence[str],
    compare: Mapping[str, Iterable[CopyName]],
    tell: Tell | None,
) -> Mapping[str, CenterFacts]:
    """The facts of all centers that answer; says how far it is while it waits."""
    clock = asyncio.get_running_loop().time
    began_s = clock()
    asked = {name: asyncio.create_task(_ask(state, name, compare.get(name, ()))) for name in names}
    try:
        while waiting := [name for name, task in asked.items() if not task.done()]:
            await asyncio.wait(
                [asked[name] for name in waiting], timeout=PROGRESS_INTERVAL_S if tell else None
            )
            left = [name for name in waiting if not asked[name].done()]
            if tell is not None and left:
                tell(f"center {', '.join(left)} reads its books: {clock() - began_s:.0f} s")
    finally:
        for task in asked.values():
            task.cancel()
        if tell is not None:
            tell("")
    answers = {name: task.result() for name, task in asked.items()}
    return {name: answer for name, answer in answers.items() if answer is not None}


async def _ask(state: Path, center: str, compare: Iterable[CopyName]) -> CenterFacts | None:
    request = GetFactsRequest(compare=compare)
    try:
        return await ask_operator(state, center, "GetFacts", request, CenterFacts, FACTS_TIMEOUT_S)
    except RpcError:
        return None
