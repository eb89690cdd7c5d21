"""`duohuo status`: who is up, how far each center is behind each other, what is queued and announced."""

import asyncio
from pathlib import Path
from typing import Any

from duohuo.v1.announcement_service_pb2 import ListAnnouncementsRequest, ListAnnouncementsResponse
from duohuo.v1.operator_service_pb2 import CenterStatus, GetStatusRequest
from ops import mesh_file
from ops.client import ask_operator, connected
from ops.mesh_file import MeshView
from ops.output import table
from ops.plain import plain
from runtime.errors import RpcError


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
                center.state,
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


def _roads(known: dict[str, CenterStatus]) -> str:
    rows = [
        (
            f"{road.source_center} -> {name}",
            road.topic,
            road.road,
            road.cursor,
            road.head - road.cursor,
            road.from_jetstream,
            road.from_feed,
            road.parked or "",
        )
        for name, status in known.items()
        for road in status.roads
    ]
    headings = (
        *("ROAD", "TOPIC", "BY", "APPLIED", "BEHIND"),
        *("FROM JETSTREAM", "FROM FEED", "PARKED"),
    )
    return table(headings, rows) if rows else ""


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
