"""`duohuo status` says what is wrong with the clocks, and nothing when they agree."""

from duohuo.v1.operator_service_pb2 import CenterStatus, PeerStatus
from ops.status import _clocks


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
