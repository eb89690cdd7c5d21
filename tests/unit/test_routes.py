"""Which centers a call may go to, in which order: policy by policy, place by place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duohuo.v1.routing_pb2 import (
    POLICY_HOME,
    POLICY_HOME_FIRST,
    POLICY_LOCAL,
    POLICY_LOCAL_THEN_HOME,
    POLICY_ORIGIN,
    POLICY_ORIGIN_THEN_HOME,
    POLICY_UNSPECIFIED,
    Policy,
)
from gateway.routes import KeyMissing, Target, targets
from runtime.ids import Place
from tests.fakes import placement

ABC = placement("a", "b", "c")
AT_A, AT_B, AT_C = Place(slot=0), Place(slot=1), Place(slot=2)
FROM_B, FROM_C_AT_B = Place(origin="b"), Place(slot=1, origin="c")


# Seen from a; homes go in turn: slot 0 a-b-c, slot 1 b-c-a, slot 2 c-a-b.
@pytest.mark.parametrize(
    ("policy", "place", "wanted"),
    [
        (POLICY_LOCAL, None, "a/local"),
        (POLICY_LOCAL, AT_B, "a/local"),
        (POLICY_HOME, AT_A, "a/local"),
        (POLICY_HOME, AT_B, "b/forwarded"),
        (POLICY_HOME, FROM_C_AT_B, "b/forwarded"),
        (POLICY_HOME_FIRST, AT_A, "a/local b/failed-over c/failed-over"),
        (POLICY_HOME_FIRST, AT_B, "b/forwarded c/failed-over a/local"),
        (POLICY_HOME_FIRST, AT_C, "c/forwarded a/local b/failed-over"),
        (POLICY_LOCAL_THEN_HOME, AT_A, "a/local"),
        (POLICY_LOCAL_THEN_HOME, AT_B, "a/local b/second-read"),
        (POLICY_ORIGIN, FROM_B, "b/origin-read"),
        (POLICY_ORIGIN, Place(origin="a"), "a/local"),
        (POLICY_ORIGIN_THEN_HOME, FROM_C_AT_B, "c/origin-read b/failed-over a/local"),
        (POLICY_ORIGIN_THEN_HOME, Place(slot=1, origin="b"), "b/origin-read a/local"),
        (POLICY_ORIGIN_THEN_HOME, Place(slot=0, origin="b"), "b/origin-read a/local"),
        (POLICY_ORIGIN_THEN_HOME, Place(slot=1, origin="a"), "a/local b/failed-over"),
        (POLICY_ORIGIN_THEN_HOME, Place(slot=0, origin="a"), "a/local"),
    ],
    ids=str,
)
def test_a_call_goes_where_its_policy_says(
    policy: Policy.ValueType, place: Place | None, wanted: str
) -> None:
    found = targets(policy, place, "a", ABC)
    assert " ".join(f"{target.center}/{target.hop}" for target in found) == wanted


@pytest.mark.parametrize(
    ("policy", "place"),
    [
        (POLICY_HOME, None),
        (POLICY_HOME, FROM_B),
        (POLICY_HOME_FIRST, None),
        (POLICY_HOME_FIRST, FROM_B),
        (POLICY_LOCAL_THEN_HOME, None),
        (POLICY_LOCAL_THEN_HOME, FROM_B),
        (POLICY_ORIGIN, None),
        (POLICY_ORIGIN, AT_B),
        (POLICY_ORIGIN_THEN_HOME, None),
        (POLICY_ORIGIN_THEN_HOME, AT_B),
        (POLICY_ORIGIN_THEN_HOME, FROM_B),
        (POLICY_UNSPECIFIED, FROM_C_AT_B),
    ],
    ids=str,
)
def test_a_key_that_does_not_name_what_the_policy_needs_is_missing(
    policy: Policy.ValueType, place: Place | None
) -> None:
    with pytest.raises(KeyMissing):
        targets(policy, place, "a", ABC)


@given(
    st.sampled_from([policy for policy in Policy.values() if policy != POLICY_UNSPECIFIED]),
    st.integers(0, 4095),
    st.sampled_from("abc"),
    st.sampled_from("abc"),
)
def test_no_center_is_asked_twice_and_only_this_one_is_local(
    policy: Policy.ValueType, slot: int, origin: str, here: str
) -> None:
    found = targets(policy, Place(slot, origin), here, ABC)
    centers = [target.center for target in found]
    assert len(centers) == len(set(centers)) > 0
    assert all((target.hop == "local") == (target.center == here) for target in found)


def test_a_center_that_is_not_in_the_mesh_is_for_the_router_to_refuse() -> None:
    assert targets(POLICY_ORIGIN, Place(origin="z"), "a", ABC) == (Target("z", "origin-read"),)
