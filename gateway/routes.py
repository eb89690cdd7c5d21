"""Which centers may answer a call, in which order. A plain function of policy, key and placement."""

from dataclasses import dataclass
from typing import TypeVar

from duohuo.v1.routing_pb2 import (
    POLICY_HOME,
    POLICY_HOME_FIRST,
    POLICY_LOCAL,
    POLICY_LOCAL_FIRST,
    POLICY_LOCAL_THEN_HOME,
    POLICY_ORIGIN,
    POLICY_ORIGIN_THEN_HOME,
    Policy,
)
from runtime.ids import Place
from runtime.placement import Placement

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """A center to ask, and what kind of hop it is (for traces and metrics)."""

    center: str
    hop: str


class KeyMissing(ValueError):
    """The policy needs a slot or an origin, and the key names none."""


def targets(
    policy: Policy.ValueType, place: Place | None, here: str, placement: Placement
) -> tuple[Target, ...]:
    """The centers to ask, first choice first; a center occurs once. Raises KeyMissing."""
    if policy == POLICY_LOCAL:
        return (Target(here, "local"),)
    place = place or Place()
    if policy == POLICY_LOCAL_FIRST:
        order = () if place.slot is None else placement.order[place.slot]
        return _distinct(
            Target(here, "local"), *(_target(one, here, "failed-over") for one in order)
        )
    if policy == POLICY_ORIGIN:
        return (_target(_required(place.origin), here, "origin-read"),)
    order = placement.order[_required(place.slot)]
    home = _target(order[0], here, "forwarded")
    if policy == POLICY_HOME:
        return (home,)
    if policy == POLICY_HOME_FIRST:
        return (home, *(_target(center, here, "failed-over") for center in order[1:]))
    if policy == POLICY_LOCAL_THEN_HOME:
        return _distinct(Target(here, "local"), _target(order[0], here, "second-read"))
    if policy == POLICY_ORIGIN_THEN_HOME:
        origin = _target(_required(place.origin), here, "origin-read")
        return _distinct(origin, _target(order[0], here, "failed-over"), Target(here, "local"))
    raise KeyMissing(f"no such policy: {policy}")


def _target(center: str, here: str, hop: str) -> Target:
    return Target(center, "local" if center == here else hop)


def _distinct(*wanted: Target) -> tuple[Target, ...]:
    found: dict[str, Target] = {}
    for target in wanted:
        found.setdefault(target.center, target)
    return tuple(found.values())


def _required(value: T | None) -> T:
    if value is None:
        raise KeyMissing
    return value
