"""Where a user's calls go, and what becomes of them if the user's home dies now. Plain functions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from duohuo.v1.operator_service_pb2 import CenterStatus, MoveSlotResponse, RoadStatus, Route
from duohuo.v1.routing_pb2 import ACCESS_USER, POLICY_LOCAL, POLICY_ORIGIN
from gateway import routes
from ops.output import table
from ops.status import duration
from runtime.ids import Place
from runtime.methods import PUBLIC_FILES, Method, methods_in
from runtime.placement import SLOTS, Placement


class Outlook(NamedTuple):
    """What becomes of the users' calls, by their names."""

    everywhere: list[str]
    """They go on at every center that is there."""
    at_next: list[str]
    """They go on at the next center in order."""
    waiting: list[str]
    """They wait until home is back."""
    by_origin: list[str]
    """They go on unless what they are about was made at the lost center."""


class Behind(NamedTuple):
    """How far one center's copy of another one's data reaches."""

    entries: int
    heard_ago_ms: int | None
    """None if nothing was ever heard of it."""


def outlook(order: Sequence[str], calls: Iterable[Method] | None = None) -> Outlook:
    """If the first center of an order dies: where calls about its users go, from any other gateway."""
    found = Outlook([], [], [], [])
    if calls is None:
        calls = methods_in(PUBLIC_FILES).values()
    lost, rest = order[0], order[1:]
    placement = Placement(0, tuple(order), [tuple(order)] * SLOTS)
    for call in calls:
        if call.access != ACCESS_USER and call.policy == POLICY_LOCAL:
            found.everywhere.append(call.name)
            continue
        if call.policy == POLICY_ORIGIN:
            found.by_origin.append(call.name)
            continue
        left = []
        for here in rest:
            targets = routes.targets(call.policy, Place(slot=0, origin=here), here, placement)
            left.append(next((one.center for one in targets if one.center != lost), None))
        if not rest or None in left:
            found.waiting.append(call.name)
        elif left == list(rest):
            found.everywhere.append(call.name)
        else:
            found.at_next.append(call.name)
    return found


def behind(status: CenterStatus, source: str) -> Behind:
    """How far a center is behind another one, over all topics."""
    roads: list[RoadStatus] = [road for road in status.roads if road.source_center == source]
    heard = [road.heard_ago_ms for road in roads if road.HasField("heard_ago_ms")]
    entries = sum(road.head - road.cursor for road in roads)
    return Behind(entries, max(heard) if roads and len(heard) == len(roads) else None)


def shown(user: str, route: Route, copies: Mapping[str, Behind]) -> str:
    """For people. `copies` says how far the other centers that answer have followed home."""
    home, *rest = route.centers
    whose = f"account {route.account_id}" if route.account_id else "no account that is known here"
    lines = [
        f"{user}: {whose}",
        f"slot {route.slot}, home {home}"
        + "".join(f", then {center}" for center in rest)
        + f" (placement epoch {route.placement_epoch})",
        "",
        f"If {home} died now:",
    ]
    found = outlook(route.centers)
    next_center = rest[0] if rest else ""
    rows = [
        ("go on everywhere", found.everywhere),
        (f"go on at {next_center}", found.at_next),
        (f"wait for {home}", found.waiting),
        (f"go on unless made at {home}", found.by_origin),
    ]
    lines.append(
        table(("CALLS", ""), [(what, ", ".join(sorted(names))) for what, names in rows if names])
    )
    for center in rest:
        copy = copies.get(center)
        if copy is None:
            lines.append(f"{center} does not answer.")
        elif copy.heard_ago_ms is None:
            lines.append(f"{center} has never heard of {home}: nobody knows how far behind it is.")
        else:
            lines.append(
                f"{center} has followed {home} up to {duration(copy.heard_ago_ms)} ago, "
                f"{copy.entries} entries behind what it has heard of."
            )
    return "\n".join(lines)


def moved(done: MoveSlotResponse) -> str:
    """What came of moving a slot, for people."""
    if done.before == done.home:
        return f"slot {done.slot} was at home at {done.home} already (epoch {done.epoch})"
    state = (
        f"center {done.home} acts for it"
        if done.taken_over
        else f"center {done.home} has not said yet that it acts for it; until then its users wait"
    )
    return (
        f"slot {done.slot} went from {done.before} to {done.home} (epoch {done.epoch}), with"
        f" {done.accounts_moved} accounts that have money: {state}"
    )
