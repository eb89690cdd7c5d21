"""What does not work now, and why.

Raised by itself when a center is lost, and lifted when it is back; or raised by an operator at any center.
Both are kept here, so that they are answered whatever is away, this center's own services included.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Set
from contextlib import suppress

from duohuo.internal.v1.peer_services_pb2 import ListRaisedRequest, ListRaisedResponse
from duohuo.v1.announcement_service_pb2 import (
    Announcement,
    ListAnnouncementsRequest,
    ListAnnouncementsResponse,
    WatchAnnouncementsRequest,
)
from gateway.health import Health
from runtime.clock import Clock, milliseconds, timestamp
from runtime.dispatcher import Incoming
from runtime.endpoint import ask
from runtime.errors import RpcError, invalid
from runtime.ids import place_of
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.placement import Placement
from runtime.signal import Signal

INTERVAL_S = 1.0
TIMEOUT_S = 2.0
PAUSED = {
    "en": "For its users, registration and real-time transfers are paused; login, profile changes and"
    " transfer applications go on.",
    "zh": "其用户暂时不能注册和实时转账;登录、修改资料和提交转账申请不受影响。",
}
LOST = {"en": "Center {center} does not answer. ", "zh": "中心 {center} 没有响应。"}
FULL = {
    "en": "Center {center} cannot store anything now. ",
    "zh": "中心 {center} 暂时无法保存数据。",
}
"""By BCP 47 tag."""
_LIST_RAISED = peer_method("account", "ListRaised")


class Announcements:
    """Those in force, as this center knows them; `follow` must run for those of operators."""

    def __init__(self, mesh: Mesh, clock: Clock, health: Health) -> None:
        self._mesh = mesh
        self._health = health
        self._no_writes_since_ms: dict[str, int] = {}
        self._clock = clock
        self._raised: list[Announcement] = []
        self._told: list[Announcement] = []
        self.changed = Signal()
        mesh.on_change(lambda _center, _reachable: self.changed.notify())

    async def follow(self) -> None:
        """For as long as the process lives."""
        while True:
            await self.refresh()
            await asyncio.sleep(INTERVAL_S)

    async def refresh(self) -> None:
        """Asks the account service for those of operators. While it is away, the last ones stay."""
        with suppress(RpcError):
            asked = ListRaisedRequest()
            found = await ask(self._mesh.local, _LIST_RAISED, asked, ListRaisedResponse, TIMEOUT_S)
            self._raised = list(found.announcements)
        self._notice_full()
        before, self._told = self._told, self.in_force()
        if self._told != before:
            self.changed.notify()

    def _notice_full(self) -> None:
        for center in (self._mesh.here, *self._mesh.peers):
            if not self._health.cannot_store(center):
                self._no_writes_since_ms.pop(center, None)
            elif center not in self._no_writes_since_ms:
                self._no_writes_since_ms[center] = self._clock.wall_ms()

    def in_force(self, centers: Set[str] | None = None) -> list[Announcement]:
        """Oldest first; only those that affect users of some centers, if these are named."""
        now_ms = self._clock.wall_ms()
        found = [
            _of_itself("lost", LOST, center, self._mesh.since_ms(center))
            for center in self._mesh.peers
            if not self._mesh.reachable(center)
        ]
        found += [
            _of_itself("full", FULL, center, since_ms)
            for center, since_ms in self._no_writes_since_ms.items()
            if self._mesh.reachable(center)
        ]
        raised = [
            one
            for one in self._raised
            if not one.HasField("end_time") or milliseconds(one.end_time) > now_ms
        ]
        return sorted(
            (
                one
                for one in (*found, *raised)
                if centers is None or not one.center or one.center in centers
            ),
            key=lambda one: (milliseconds(one.start_time), one.announcement_id),
        )


class AnnouncementServicer:
    """Serves AnnouncementService."""

    def __init__(self, announcements: Announcements, placement: Placement) -> None:
        self._announcements = announcements
        self._placement = placement

    async def ListAnnouncements(
        self, request: ListAnnouncementsRequest, _incoming: Incoming
    ) -> ListAnnouncementsResponse:
        return self._in_force(request.user)

    async def WatchAnnouncements(
        self, request: WatchAnnouncementsRequest, _incoming: Incoming
    ) -> AsyncIterator[ListAnnouncementsResponse]:
        told: ListAnnouncementsResponse | None = None
        while True:
            changed = self._announcements.changed.next()
            present = self._in_force(request.user)
            if present != told:
                told = present
                yield present
            await self._announcements.changed.wait(changed)

    def _in_force(self, user: str) -> ListAnnouncementsResponse:
        centers = {self._home_of(user)} if user else None
        return ListAnnouncementsResponse(announcements=self._announcements.in_force(centers))

    def _home_of(self, user: str) -> str:
        place = place_of(user)
        if place is None or place.slot is None:
            raise invalid("user", "must be an account id or an identifier")
        return self._placement.home(place.slot)


def _of_itself(kind: str, said: Mapping[str, str], center: str, since_ms: int) -> Announcement:
    texts = {language: said[language].format(center=center) + PAUSED[language] for language in said}
    return Announcement(
        announcement_id=f"{kind}-{center}-{since_ms}",
        center=center,
        text=texts["en"],
        texts=texts,
        start_time=timestamp(since_ms),
    )
