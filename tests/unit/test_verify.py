"""`duohuo verify` names every planted fault, and takes nothing on its way for one."""

from collections.abc import Callable

import pytest

from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import CenterFacts, Digest, LedgerSum
from ops.verify import OVERDUE_AFTER_MS, REMEMBERED_MAX, Held, Memory, judge

CENTERS = ("a", "b", "c")
Facts = dict[str, CenterFacts]


def healthy() -> Facts:
    """Three centers that agree; a has received 50, of which 20 have gone on to b."""
    sums = {
        "a": LedgerSum(currency_code="CNY", users=30, transit=20, external=-50),
        "b": LedgerSum(currency_code="CNY", users=20, transit=-20),
        "c": LedgerSum(currency_code="USD", users=7, external=-7),
    }
    return {
        name: CenterFacts(
            center=name,
            ledger_sums=[sums[name]],
            digests=[
                *(
                    Digest(source_center=source, topic="ledger", position="9", digest=source)
                    for source in CENTERS
                ),
                Digest(source_center="*", topic="changes", position="a=1,b=2,c=3", digest="same"),
            ],
        )
        for name in CENTERS
    }


def on_its_way(facts: Facts) -> None:
    """A debit that b has not heard of yet."""
    facts["a"].ledger_sums[0].users -= 5
    facts["a"].ledger_sums[0].transit += 5
    facts["a"].transits.add(
        transfer_id="transfer-9",
        payer_account_id="payer",
        payee_home="b",
        amount=Money(currency_code="CNY", minor_units=5),
    )
    facts["a"].digests[0].position = "10"
    facts["a"].digests[0].digest = "newer"


def test_healthy_centers_pass_and_it_says_what_was_checked() -> None:
    report = judge(healthy(), CENTERS)
    assert report.passed
    assert not report.violations
    assert "CONVERGE: ledger of center a are the same at 3 centers" in report.checked
    assert "CONVERGE: changes of all centers are the same at 3 centers" in report.checked
    assert any("center a sum to zero; its users hold 30 CNY" in line for line in report.checked)
    assert "verify: passed" in report.text()


def lose_money(facts: Facts) -> None:
    facts["b"].ledger_sums[0].users -= 1


def make_money(facts: Facts) -> None:
    facts["c"].ledger_sums.add(currency_code="CNY", users=1)


def lose_money_between_centers(facts: Facts) -> None:
    facts["b"].ledger_sums[0].users -= 1
    facts["b"].ledger_sums[0].transit += 1


def change_a_copy(facts: Facts) -> None:
    facts["c"].digests[1].digest = "changed"


def change_a_password_at_one_center(facts: Facts) -> None:
    facts["b"].digests[3].digest = "changed"


def find_an_overdraft(facts: Facts) -> None:
    facts["a"].violations.add(
        invariant="NO-OVERDRAFT", center="a", account_id="x", what="its balance is -1"
    )


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lose_money, "CONSERVE: center b: the books of center b are off by -1 CNY"),
        (make_money, "CONSERVE: center c: the books of center c are off by 1 CNY"),
        (lose_money_between_centers, "CONSERVE: 1 CNY are in transit although nothing is on"),
        (change_a_copy, "CONVERGE: ledger of center b differ between centers a, b, c at 9"),
        (change_a_password_at_one_center, "CONVERGE: changes of all centers differ between"),
        (find_an_overdraft, "NO-OVERDRAFT: center a, account x: its balance is -1"),
    ],
)
def test_a_planted_fault_is_named(fault: Callable[[Facts], None], named: str) -> None:
    facts = healthy()
    fault(facts)
    report = judge(facts, CENTERS)
    assert not report.passed
    assert [one for one in report.violations if named in str(one)]
    assert f"FAIL  {report.violations[0]}" in report.text()
    shown = report.data()["violations"]
    assert [one["line"] for one in shown] == [str(one) for one in report.violations]
    assert all(one["invariant"] and one["what"] for one in shown)


@pytest.mark.parametrize("fault", [lose_money, change_a_copy, find_an_overdraft])
def test_a_fault_is_named_even_while_something_is_on_its_way(
    fault: Callable[[Facts], None],
) -> None:
    facts = healthy()
    on_its_way(facts)
    fault(facts)
    assert judge(facts, CENTERS).violations


def test_what_is_on_its_way_is_waited_for_and_no_fault() -> None:
    facts = healthy()
    on_its_way(facts)
    report = judge(facts, CENTERS)
    assert not report.violations
    assert not report.passed
    assert any("transfer-9" in line and "from a to b" in line for line in report.in_flight)
    assert any("ledger of center a are at 10 / 9" in line for line in report.in_flight)
    assert "WAIT" in report.text()


def test_copies_at_different_positions_may_differ_and_are_waited_for() -> None:
    facts = healthy()
    facts["c"].digests[3].position, facts["c"].digests[3].digest = "a=1,b=1,c=3", "older"
    report = judge(facts, CENTERS)
    assert not report.violations
    assert len(report.in_flight) == 1


@pytest.mark.parametrize("waiting", [False, True], ids=["settled", "on its way"])
def test_a_silent_center_is_named_and_its_part_of_the_money_is_not_called_lost(
    waiting: bool,
) -> None:
    facts = healthy()
    if waiting:
        on_its_way(facts)
    del facts["b"]
    report = judge(facts, CENTERS)
    assert not report.passed
    assert list(report.missing) == ["b"]
    assert not report.violations
    assert "FAIL  center b does not answer" in report.text()


def test_a_silent_role_is_named() -> None:
    facts = healthy()
    facts["c"].silent_roles.append("transfer")
    report = judge(facts, CENTERS)
    assert not report.passed
    assert list(report.missing) == ["c (transfer)"]


def moving(facts: Facts, source: str, positions: dict[str, int]) -> Facts:
    """What all say while somebody goes on writing at a source: each is where it happens to be."""
    for name, position in positions.items():
        for digest in facts[name].digests:
            if digest.source_center == source:
                digest.position, digest.digest = str(position), f"{source} at {position}"
    return facts


def test_a_busy_mesh_gets_its_verdict_from_what_owners_had_before() -> None:
    """No look finds a's copies where a is; over three looks each was once where a had been."""
    memory = Memory()
    looks = [{"a": 20, "b": 17, "c": 11}, {"a": 30, "b": 20, "c": 19}, {"a": 40, "b": 39, "c": 30}]
    verdicts = [judge(moving(healthy(), "a", look), CENTERS, memory) for look in looks]
    assert not any(report.violations for report in verdicts)
    assert not any(report.passed for report in verdicts)
    assert [len(report.unmatched) for report in verdicts] == [2, 1, 0]
    assert [report.concluded().passed for report in verdicts] == [False, False, True]
    assert verdicts[-1].concluded().moving == verdicts[-1].in_flight


def test_a_copy_that_differs_from_what_its_owner_had_before_is_a_violation() -> None:
    memory = Memory()
    judge(moving(healthy(), "a", {"a": 20, "b": 17, "c": 11}), CENTERS, memory)
    facts = moving(healthy(), "a", {"a": 30, "b": 20, "c": 19})
    facts["b"].digests[0].digest = "changed"
    report = judge(facts, CENTERS, memory)
    assert any("differ between centers a, b at 20" in str(one) for one in report.violations)
    assert report.differing == [Held("ledger", "a", "b")]
    assert not report.concluded().passed


def test_copies_that_agree_with_each_other_prove_nothing_of_their_owner() -> None:
    memory = Memory()
    report = judge(moving(healthy(), "a", {"a": 20, "b": 17, "c": 17}), CENTERS, memory)
    assert len(report.unmatched) == 2


def test_a_copy_that_was_compared_row_by_row_counts() -> None:
    facts = moving(healthy(), "a", {"a": 20, "b": 17, "c": 20})
    facts["b"].compared.add(source_center="a", topic="ledger")
    report = judge(facts, CENTERS, Memory())
    assert not report.unmatched
    assert report.concluded().passed


def test_the_memory_is_bounded() -> None:
    memory = Memory()
    for position in range(1000):
        judge(moving(healthy(), "a", {"a": position + 1, "b": position}), CENTERS, memory)
    assert all(len(positions) <= REMEMBERED_MAX for positions in memory.seen.values())


def test_what_is_on_its_way_for_too_long_is_listed_with_what_it_waits_for() -> None:
    facts = healthy()
    on_its_way(facts)
    transit = facts["a"].transits[0]
    transit.waiting_ms = OVERDUE_AFTER_MS
    assert not judge(facts, CENTERS).overdue
    transit.waiting_ms += 1
    transit.waits_for = "center b, which does not answer"
    report = judge(facts, CENTERS)
    (line,) = [line for line in report.text().splitlines() if line.startswith("LATE")]
    assert all(
        part in line
        for part in ("transfer-9", "payer", "5 CNY", "from a to b", "since", "60 s", "not answer")
    )
    (shown,) = report.data()["overdue"]
    assert (shown["transfer_id"], shown["payer_home"]) == ("transfer-9", "a")


def test_the_sum_over_all_centers_is_shown_and_transit_is_part_of_it() -> None:
    assert "CONSERVE: CNY of all 3 centers sums to zero, 0 of it in transit" in (
        judge(healthy(), CENTERS).checked
    )
