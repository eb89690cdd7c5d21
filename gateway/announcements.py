"""What does not work now, and why: raised by itself when a center is lost, lifted when it is back."""

from collections.abc import AsyncIterator

from duohuo.v1.announcement_service_pb2 import (
    Announcement,
    ListAnnouncementsRequest,
    ListAnnouncementsResponse,
    WatchAnnouncementsRequest,
)
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.mesh import Mesh
from runtime.signal import Signal


class AnnouncementServicer:
    """Serves AnnouncementService from what this center sees of the others."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._changed = Signal()
        mesh.on_change(lambda _center, _reachable: self._changed.notify())

    async def ListAnnouncements(
        self, _request: ListAnnouncementsRequest, _incoming: Incoming
    ) -> ListAnnouncementsResponse:
        return self._in_force()

    async def WatchAnnouncements(
        self, _request: WatchAnnouncementsRequest, _incoming: Incoming
    ) -> AsyncIterator[ListAnnouncementsResponse]:
        while True:
            changed = self._changed.next()
            yield self._in_force()
            await self._changed.wait(changed)

    def _in_force(self) -> ListAnnouncementsResponse:
        lost = sorted(
            (self._mesh.since_ms(center), center)
            for center in self._mesh.peers
            if not self._mesh.reachable(center)
        )
        return ListAnnouncementsResponse(
            announcements=[
                Announcement(
                    announcement_id=f"lost-{center}-{since_ms}",
                    center=center,
                    text=f"Center {center} does not answer. For its users, registration and real-time"
                    " transfers are paused; login, profile changes and transfer applications go on.",
                    start_time=timestamp(since_ms),
                )
                for since_ms, center in lost
            ]
        )
