"""`duohuo status` says what is wrong, at a glance, and nothing of what is not."""

import re

import pytest

from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    CenterStatus,
    LogStatus,
    PeerStatus,
    RecoveryStatus,
    RoadStatus,
    TransitFact,
)
from ops.status import _clocks, _roads, _stores, duration
from runtime.clock import timestamp


def test_clocks_that_disagree_are_named_with_their_drift() -> None:
    ahead = PeerStatus(center="b", clock_drift_ms=600_049, clock_alarm=True)
    behind = PeerStatus(center="a", clock_drift_ms=-600_049, clock_alarm=True)
    fine = PeerStatus(center="c", clock_drift_ms=999)
    known = {
        "a": CenterStatus(peers=[ahead, fine]),
        "b": CenterStatus(peers=[behind], clock_wrong=True),
        "c": CenterStatus(peers=[fine, PeerStatus(center="d")]),
    }
    assert _clocks(known).splitlines() == [
        "! center a sees the clock of b 600.0 s ahead",
        "! center b sees the clock of a 600.0 s behind",
        "! the clock of center b is wrong: it refuses profile and password changes",
    ]
    assert _clocks({"c": known["c"]}) == ""


def test_what_is_in_transit_for_too_long_is_listed() -> None:
    late = TransitFact(
        transfer_id="transfer-1",
        payer_account_id="payer",
        payee_home="b",
        amount=Money(currency_code="CNY", minor_units=5),
        debit_time=timestamp(0),
        waiting_ms=61_000,
        waits_for="center b, which does not answer",
    )
    assert _stores({"a": CenterStatus(overdue=[late]), "b": CenterStatus()}) == (
        "! transfer transfer-1 of payer: 5 CNY on the way from a to b since 1970-01-01T00:00:00Z"
        " (61 s); waits for center b, which does not answer"
    )


def road(topic: str, cursor: int, head: int, lag_ms: int | None, heard_ago_ms: int) -> RoadStatus:
    return RoadStatus(
        source_center="a",
        topic=topic,
        cursor=cursor,
        head=head,
        lag_ms=lag_ms,
        heard_ago_ms=heard_ago_ms,
    )


def cells(*roads: RoadStatus) -> list[list[str]]:
    """The first columns of what is shown of the roads from a to b."""
    lines = _roads({"b": CenterStatus(roads=roads)}).splitlines()
    return [re.split(r"\s{2,}", line)[:6] for line in lines[1:]]


def test_topics_without_a_problem_share_a_line() -> None:
    assert cells(road("ledger", 7, 7, 0, 300), road("accounts", 5, 5, 0, 400)) == [
        ["a -> b", "all 2", "0", "0.0 s", "0.4 s ago", "12"]
    ]


def test_a_topic_that_lags_has_a_line_of_its_own_with_the_time_to_catch_up() -> None:
    lagging = road("ledger", 100, 64_310, 83_200, 300)
    lagging.catch_up_ms = 9_400
    stuck = road("changes", 0, 5, 3_600_000 * 3, 300)
    assert cells(lagging, stuck, road("accounts", 5, 5, 0, 300)) == [
        ["a -> b", "ledger", "64210", "83 s", "9.4 s", "0.3 s ago"],
        ["a -> b", "changes", "5", "3 h 0 min", "unknown", "0.3 s ago"],
        ["a -> b", "other 1", "0", "0.0 s", "0.3 s ago", "5"],
    ]


def test_a_silent_source_does_not_look_like_one_without_lag() -> None:
    assert cells(road("accounts", 5, 5, None, 34_000)) == [
        ["a -> b", "all 1", "unknown", "unknown", "SILENT, 34 s ago", "5"]
    ]
    assert cells(road("accounts", 5, 9, 90_000, 34_000)) == [
        ["a -> b", "accounts", "4 or more", "over 90 s", "unknown", "SILENT, 34 s ago"]
    ]
    never = RoadStatus(source_center="a", topic="accounts")
    assert cells(never) == [["a -> b", "all 1", "unknown", "unknown", "SILENT, never", "0"]]


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [
        (0, "0.0 s"),
        (40, "0.0 s"),
        (9_940, "9.9 s"),
        (10_000, "10 s"),
        (119_000, "119 s"),
        (120_000, "2 min"),
        (7_190_000, "2 h 0 min"),
    ],
)
def test_a_length_of_time_is_short(milliseconds: int, shown: str) -> None:
    assert duration(milliseconds) == shown


def test_stores_that_are_not_as_they_should_be_are_named() -> None:
    waits = RecoveryStatus(role="transfer", doing="has an empty store, and waits for b")
    away = LogStatus(
        topic="ledger", destination="c", head=5000, confirmed=1000, kept=2000, snapshot_needed=True
    )
    known = {
        "a": CenterStatus(recoveries=[waits], logs=[away]),
        "b": CenterStatus(
            roads=[
                RoadStatus(source_center="a", topic="ledger", installing=True),
                RoadStatus(source_center="a", topic="accounts", diverged=True),
                RoadStatus(source_center="c", topic="ledger", repaired=3),
            ]
        ),
    }
    assert _stores(known).splitlines() == [
        "! center a does not serve as transfer: it has an empty store, and waits for b",
        (
            "! center c has been away for too long: it will get a snapshot of ledger of center a"
            " (4000 entries behind, 2000 are kept)"
        ),
        "! center b installs a snapshot: ledger of center a",
        (
            "! center b has accounts of center a that center a has lost: it takes nothing more from"
            " there; see docs/recovery.md"
        ),
        "! center b has repaired 3 rows: ledger of center c",
    ]


def test_stores_that_are_well_are_not_mentioned() -> None:
    road = RoadStatus(source_center="a", topic="ledger", cursor=5, head=7)
    log = LogStatus(topic="ledger", destination="a", head=5, confirmed=1, kept=4)
    assert _stores({"b": CenterStatus(roads=[road], logs=[log])}) == ""
