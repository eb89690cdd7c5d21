"""`duohuo status` says what is wrong with clocks and stores, and nothing when all is well."""

from duohuo.v1.operator_service_pb2 import (
    CenterStatus,
    LogStatus,
    PeerStatus,
    RecoveryStatus,
    RoadStatus,
)
from ops.status import _clocks, _stores


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
