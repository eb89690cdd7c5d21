"""Users are told which center does not answer, from when it is lost until it is back."""

import asyncio

from duohuo.v1.announcement_service_pb2 import (
    ListAnnouncementsRequest,
    ListAnnouncementsResponse,
    WatchAnnouncementsRequest,
)
from gateway.announcements import AnnouncementServicer
from runtime.clock import milliseconds
from runtime.dispatcher import Incoming
from tests.fakes import NOON_MS, FakeClock, mesh, see

INCOMING = Incoming("", 1.0)


def centers(response: ListAnnouncementsResponse) -> list[str]:
    return [announcement.center for announcement in response.announcements]


async def listed(servicer: AnnouncementServicer) -> ListAnnouncementsResponse:
    return await servicer.ListAnnouncements(ListAnnouncementsRequest(), INCOMING)


async def test_nothing_is_announced_while_every_center_answers() -> None:
    assert centers(await listed(AnnouncementServicer(mesh("a", "a", "b")))) == []


async def test_lost_centers_are_announced_oldest_first_until_they_are_back() -> None:
    clock = FakeClock()
    seen = mesh("a", "a", "b", "c", clock=clock)
    servicer = AnnouncementServicer(seen)
    for center in ("c", "b"):
        clock.advance(5)
        see(seen, center, answering=False)
    response = await listed(servicer)
    assert centers(response) == ["c", "b"]
    assert [milliseconds(one.start_time) for one in response.announcements] == [
        NOON_MS + 5,
        NOON_MS + 10,
    ]
    assert all(f"Center {one.center}" in one.text for one in response.announcements)
    see(seen, "c", answering=True)
    assert centers(await listed(servicer)) == ["b"]


async def test_each_loss_is_an_announcement_of_its_own() -> None:
    clock = FakeClock()
    seen = mesh("a", "a", "b", clock=clock)
    servicer = AnnouncementServicer(seen)
    found = []
    for _ in range(2):
        clock.advance(1000)
        see(seen, "b", answering=False)
        found.append((await listed(servicer)).announcements[0].announcement_id)
        see(seen, "b", answering=True)
    assert len(set(found)) == 2


async def test_who_watches_hears_what_is_in_force_and_then_of_every_change() -> None:
    seen = mesh("a", "a", "b")
    watch = AnnouncementServicer(seen).WatchAnnouncements(WatchAnnouncementsRequest(), INCOMING)
    assert centers(await anext(watch)) == []
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.wait([waiting], timeout=0)
    assert not waiting.done()
    see(seen, "b", answering=False)
    assert centers(await waiting) == ["b"]
    see(seen, "b", answering=True)
    assert centers(await anext(watch)) == []


async def test_a_change_while_the_watcher_is_busy_is_not_missed() -> None:
    seen = mesh("a", "a", "b")
    watch = AnnouncementServicer(seen).WatchAnnouncements(WatchAnnouncementsRequest(), INCOMING)
    await anext(watch)
    see(seen, "b", answering=False)
    assert centers(await anext(watch)) == ["b"]
