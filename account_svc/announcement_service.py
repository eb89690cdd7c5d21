"""What operators tell users: raising, lifting and listing it."""

import re

from grpc import StatusCode

from account_svc import announcement, store
from account_svc.announcement import Raised
from duohuo.internal.v1.log_pb2 import LogRecord
from duohuo.internal.v1.peer_services_pb2 import ListRaisedRequest, ListRaisedResponse
from duohuo.v1.announcement_service_pb2 import Announcement
from duohuo.v1.operator_service_pb2 import LiftAnnouncementRequest, RaiseAnnouncementRequest
from runtime.clock import milliseconds
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, invalid
from runtime.store import Store, Unit
from sync_bus import audit, log
from sync_bus.log import Stamp
from sync_bus.merge import Version
from sync_bus.site import Site

IN_FORCE_MAX = 50
_ID = re.compile(r"[a-z0-9][a-z0-9-]*")


class AnnouncementService:
    """Serves the announcements of AccountPeerService."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database

    async def RaiseAnnouncement(
        self, request: RaiseAnnouncementRequest, incoming: Incoming
    ) -> Announcement:
        if not _ID.fullmatch(request.announcement_id):
            raise invalid(
                "announcement_id", "must be of small letters, digits and -, such as fire-2"
            )
        if not request.texts:
            raise invalid("texts", "must say something, in one language at least")
        self._site.require_believable_clock()
        stamp = self._site.stamps.now()
        wanted = Raised(
            request.announcement_id,
            request.center,
            announcement.encoded(request.texts),
            stamp.time_ms,
            milliseconds(request.end_time),
            lifted=0,
        )
        unit = _raise(wanted, self._site.here, incoming.operator, stamp)
        return (await self._store.write("announce", unit)).shown()

    async def LiftAnnouncement(
        self, request: LiftAnnouncementRequest, incoming: Incoming
    ) -> Announcement:
        self._site.require_believable_clock()
        stamp = self._site.stamps.now()
        unit = _lift(request.announcement_id, self._site.here, incoming.operator, stamp)
        return (await self._store.write("lift", unit)).shown()

    async def ListRaised(
        self, _request: ListRaisedRequest, _incoming: Incoming
    ) -> ListRaisedResponse:
        found = await self._store.read(announcement.in_force(self._site.clock.wall_ms()))
        return ListRaisedResponse(announcements=[one.shown() for one in found])


def _raise(wanted: Raised, center: str, who: str, stamp: Stamp) -> Unit[Raised]:
    """Returns what is told; that which was asked for before, if it is the same. Raises RpcError."""
    present = yield from announcement.find(wanted.announcement_id)
    if present is not None:
        if present._replace(start_ms=wanted.start_ms) != wanted:
            raise RpcError(
                StatusCode.ABORTED,
                "IDEMPOTENCY_CONFLICT",
                "this announcement was lifted, or says something else",
                advice="Use a new id.",
            )
        return present
    if wanted.end_ms and wanted.end_ms <= stamp.time_ms:
        raise invalid("end_time", "must be in the future")
    if len((yield from announcement.in_force(stamp.time_ms))) >= IN_FORCE_MAX:
        raise RpcError(
            StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_ANNOUNCEMENTS",
            f"{IN_FORCE_MAX} announcements are in force",
            advice="Lift one that is over: see `duohuo announce list`.",
        )
    yield from _put(wanted, center, stamp)
    yield from audit.record(
        "account", center, who, "announce", wanted.announcement_id, "", wanted.texts, stamp
    )
    return wanted


def _lift(announcement_id: str, center: str, who: str, stamp: Stamp) -> Unit[Raised]:
    """Returns what is told no more. Raises RpcError."""
    present = yield from announcement.find(announcement_id)
    if present is None:
        raise RpcError(
            StatusCode.NOT_FOUND,
            "ANNOUNCEMENT_NOT_FOUND",
            "no operator has raised this announcement, as far as this center knows",
            advice="What was raised by itself is lifted by itself. See `duohuo announce list`.",
        )
    if not present.lifted:
        yield from _put(present._replace(lifted=1), center, stamp)
        yield from audit.record(
            "account", center, who, "lift", announcement_id, present.texts, "", stamp
        )
    return present


def _put(raised: Raised, center: str, stamp: Stamp) -> Unit[None]:
    yield from announcement.merge(raised, Version(stamp.hlc, center))
    yield from log.append(store.CHANGES, stamp, LogRecord(announcement_changed=raised.record()))
