"""`duohuo status`: who is up, how far each center is behind each other, what is queued and announced."""

import asyncio
from math import inf
from pathlib import Path
from typing import Any

from duohuo.v1.announcement_service_pb2 import ListAnnouncementsRequest, ListAnnouncementsResponse
from duohuo.v1.operator_service_pb2 import CenterStatus, GetStatusRequest, RoadStatus
from ops import mesh_file
from ops.client import ask_operator, connected
from ops.mesh_file import MeshView
from ops.output import table
from ops.plain import plain
from ops.verify import overdue_line
from runtime.errors import RpcError
from sync_bus.lag import SILENT_AFTER_MS


async def collect(state: Path) -> tuple[str, dict[str, Any]]:
    """The state of the whole mesh, for people and for programs."""
    mesh = mesh_file.read(state)
    names = list(mesh.centers)
    answers = await asyncio.gather(*(_ask(state, name) for name in names))
    known = {name: answer for name, answer in zip(names, answers, strict=True) if answer}
    announced = await _announcements(state)
    text = "\n\n".join(
        part
        for part in (
            _centers(mesh, known),
            _roads(known),
            _clocks(known),
            _stores(known),
            _paths(known),
            "\n".join(f"! {announcement.text}" for announcement in announced.announcements),
        )
        if part
    )
    data = {
        "centers": {
            name: {
                "state": mesh.centers[name].state,
                **({"status": plain(known[name])} if name in known else {}),
            }
            for name in names
        },
        "links": {
            name: {"state": link.state, "delay_ms": link.delay_ms}
            for name, link in mesh.links.items()
        },
        "announcements": [plain(one) for one in announced.announcements],
    }
    return text, data


def _centers(mesh: MeshView, known: dict[str, CenterStatus]) -> str:
    rows: list[tuple[object, ...]] = []
    for name, center in mesh.centers.items():
        status = known.get(name)
        if status is None:
            rows.append((name, center.state, "does not answer", "", "", "", "", ""))
            continue
        sees = ", ".join(
            f"{peer.center} {'up' if peer.reachable else 'LOST'}" for peer in status.peers
        )
        if status.silent_roles:
            sees += f"; silent: {', '.join(status.silent_roles)}"
        counts = status.counts
        rows.append(
            (
                name,
                f"{center.state}, drained" if status.draining else center.state,
                sees,
                status.slots,
                counts["accounts"],
                counts["sessions"],
                counts["applications_open"],
                counts["money_in_transit"],
            )
        )
    headings = ("CENTER", "STATE", "SEES", "SLOTS", "ACCOUNTS", "SESSIONS", "QUEUED", "IN TRANSIT")
    links = "".join(
        f"\nlink {name}: {link.state}{f', {link.delay_ms} ms each way' if link.delay_ms else ''}"
        for name, link in mesh.links.items()
    )
    return table(headings, rows) + links


def _paths(known: dict[str, CenterStatus]) -> str:
    return "\n".join(
        f"! as center {name} sees it, the {path.role} service of center {path.center} {path.what}"
        for name, status in known.items()
        for path in status.paths
    )


def _roads(known: dict[str, CenterStatus]) -> str:
    """A line for each road, and one for each of its topics that needs a look."""
    rows = []
    for name, status in known.items():
        by_source: dict[str, list[RoadStatus]] = {}
        for road in status.roads:
            by_source.setdefault(road.source_center, []).append(road)
        for source, roads in by_source.items():
            rows += [(f"{source} -> {name}", *cells) for cells in _lines(roads)]
    headings = ("ROAD", "TOPIC", "BEHIND", "LAG", "CATCH UP", "HEARD")
    counts = ("APPLIED", "BY JETSTREAM", "BY FEED", "PARKED")
    return table((*headings, *counts), rows) if rows else ""


def _lines(roads: list[RoadStatus]) -> list[tuple[object, ...]]:
    """The topics of one road: those that lag or have parked entries by themselves, the rest as one."""
    odd = [road for road in roads if road.head > road.cursor or road.parked]
    rest = [road for road in roads if road not in odd]
    lines = [_line(road.topic, [road]) for road in odd]
    if rest:
        lines.append(_line(f"other {len(rest)}" if odd else f"all {len(rest)}", rest))
    return lines


def _line(topic: str, roads: list[RoadStatus]) -> tuple[object, ...]:
    """Topics in the same state, with their entries added up; the one heard last speaks for all."""
    worst = max(roads, key=lambda road: road.heard_ago_ms if road.HasField("heard_ago_ms") else inf)
    behind = sum(road.head - road.cursor for road in roads)
    unknown = not worst.HasField("lag_ms")
    silent = not worst.HasField("heard_ago_ms") or worst.heard_ago_ms > SILENT_AFTER_MS
    lag = f"over {duration(worst.lag_ms)}" if silent else duration(worst.lag_ms)
    if not behind:
        catch_up = ""
    else:
        catch_up = duration(worst.catch_up_ms) if worst.HasField("catch_up_ms") else "unknown"
    heard = f"{duration(worst.heard_ago_ms)} ago" if worst.HasField("heard_ago_ms") else "never"
    return (
        topic,
        (f"{behind} or more" if behind else "unknown") if silent or unknown else behind,
        "unknown" if unknown else lag,
        catch_up,
        f"SILENT, {heard}" if silent else heard,
        sum(road.cursor for road in roads),
        sum(road.from_jetstream for road in roads),
        sum(road.from_feed for road in roads),
        sum(road.parked for road in roads) or "",
    )


def duration(milliseconds: int) -> str:
    """A length of time for people: tenths of a second at first, minutes and hours when it is long."""
    seconds = milliseconds / 1000
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _clocks(known: dict[str, CenterStatus]) -> str:
    """Alarms about clocks that disagree."""
    lines = [
        f"! center {name} sees the clock of {peer.center} {abs(peer.clock_drift_ms) / 1000:.1f} s"
        f" {'ahead' if peer.clock_drift_ms > 0 else 'behind'}"
        for name, status in known.items()
        for peer in status.peers
        if peer.clock_alarm
    ]
    lines += [
        f"! the clock of center {name} is wrong: it refuses profile and password changes"
        for name, status in known.items()
        if status.clock_wrong
    ]
    return "\n".join(lines)


def _stores(known: dict[str, CenterStatus]) -> str:
    """Alarms about data that is not where it should be."""
    lines = [
        f"! center {name} does not serve as {recovery.role}: it {recovery.doing}"
        for name, status in known.items()
        for recovery in status.recoveries
    ]
    lines += [
        f"! center {log.destination} has been away for too long: it will get a snapshot of {log.topic}"
        f" of center {name} ({log.head - log.confirmed} entries behind, {log.kept} are kept)"
        for name, status in known.items()
        for log in status.logs
        if log.snapshot_needed
    ]
    lines += [
        f"! {overdue_line(name, transit)}"
        for name, status in known.items()
        for transit in status.overdue
    ]
    lines += [
        f"! center {name} gave up {status.counts['notifications_dead']} notifications"
        f" (duohuo notifications list {name})"
        for name, status in known.items()
        if status.counts.get("notifications_dead")
    ]
    for name, status in known.items():
        for road in status.roads:
            what = f"{road.topic} of center {road.source_center}"
            if road.installing:
                lines.append(f"! center {name} installs a snapshot: {what}")
            if road.diverged:
                lines.append(
                    f"! center {name} has {what} that center {road.source_center} has lost: it takes"
                    " nothing more from there; see docs/recovery.md"
                )
            if road.repaired:
                lines.append(f"! center {name} has repaired {road.repaired} rows: {what}")
    return "\n".join(lines)


async def _ask(state: Path, center: str) -> CenterStatus | None:
    try:
        async with asyncio.timeout(2):
            return await ask_operator(state, center, "GetStatus", GetStatusRequest(), CenterStatus)
    except (RpcError, TimeoutError):
        return None


async def _announcements(state: Path) -> ListAnnouncementsResponse:
    try:
        async with connected(state) as client:
            return await client.call(
                "AnnouncementService/ListAnnouncements",
                ListAnnouncementsRequest(),
                ListAnnouncementsResponse,
            )
    except RpcError:
        return ListAnnouncementsResponse()
