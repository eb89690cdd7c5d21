"""Users are told which center does not answer, from when it is lost until it is back."""

import asyncio

import pytest

from duohuo.internal.v1.peer_services_pb2 import ListRaisedResponse
from duohuo.v1.announcement_service_pb2 import (
    Announcement,
    ListAnnouncementsRequest,
    ListAnnouncementsResponse,
    WatchAnnouncementsRequest,
)
from gateway.announcements import Announcements, AnnouncementServicer
from gateway.health import Health
from runtime.clock import milliseconds, timestamp
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from tests.fakes import (
    NOON_MS,
    FakeClock,
    RecordingEndpoint,
    account,
    fails,
    in_turn,
    mesh,
    placement,
    says,
    see,
)

INCOMING = Incoming("", 1.0)


def centers(response: ListAnnouncementsResponse) -> list[str]:
    return [announcement.center for announcement in response.announcements]


def servicer_of(seen: Mesh, clock: FakeClock | None = None) -> AnnouncementServicer:
    """That of a mesh where all users of slot 0 are at home at a, and of slot 1 at b."""
    clock = clock or FakeClock()
    announcements = Announcements(seen, clock, Health(seen, clock))
    return AnnouncementServicer(announcements, placement(seen.here, *seen.peers))


async def listed(servicer: AnnouncementServicer) -> ListAnnouncementsResponse:
    return await servicer.ListAnnouncements(ListAnnouncementsRequest(), INCOMING)


async def test_nothing_is_announced_while_every_center_answers() -> None:
    assert centers(await listed(servicer_of(mesh("a", "a", "b")))) == []


async def test_lost_centers_are_announced_oldest_first_until_they_are_back() -> None:
    clock = FakeClock()
    seen = mesh("a", "a", "b", "c", clock=clock)
    servicer = servicer_of(seen, clock)
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
    servicer = servicer_of(seen, clock)
    found = []
    for _ in range(2):
        clock.advance(1000)
        see(seen, "b", answering=False)
        found.append((await listed(servicer)).announcements[0].announcement_id)
        see(seen, "b", answering=True)
    assert len(set(found)) == 2


async def test_who_watches_hears_what_is_in_force_and_then_of_every_change() -> None:
    seen = mesh("a", "a", "b")
    watch = servicer_of(seen).WatchAnnouncements(WatchAnnouncementsRequest(), INCOMING)
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
    watch = servicer_of(seen).WatchAnnouncements(WatchAnnouncementsRequest(), INCOMING)
    await anext(watch)
    see(seen, "b", answering=False)
    assert centers(await anext(watch)) == ["b"]


async def test_a_user_sees_only_what_affects_the_users_of_his_home() -> None:
    seen = mesh("a", "a", "b")
    servicer = servicer_of(seen)
    see(seen, "b", answering=False)
    for user, affected in ((account(0), []), (account(1), ["b"])):
        request = ListAnnouncementsRequest(user=user)
        assert centers(await servicer.ListAnnouncements(request, INCOMING)) == affected
    with pytest.raises(RpcError, match="must be an account id or an identifier"):
        await servicer.ListAnnouncements(ListAnnouncementsRequest(user="nobody"), INCOMING)


async def test_a_lost_center_is_announced_in_several_languages() -> None:
    seen = mesh("a", "a", "b")
    see(seen, "b", answering=False)
    (lost,) = (await listed(servicer_of(seen))).announcements
    assert set(lost.texts) == {"en", "zh"}
    assert lost.text == lost.texts["en"]
    assert all("b" in text for text in lost.texts.values())


async def test_what_operators_raise_is_told_until_it_ends_also_while_their_service_is_away() -> (
    None
):
    clock = FakeClock()
    ends = Announcement(announcement_id="ends", end_time=timestamp(NOON_MS + 1000))
    stays = Announcement(announcement_id="stays", center="b", start_time=timestamp(NOON_MS))
    answer = in_turn(
        says(ListRaisedResponse(announcements=[ends, stays])), fails(unreachable("a", ran=False))
    )
    seen = Mesh("a", {"a": RecordingEndpoint(answer), "b": RecordingEndpoint(answer)}, clock)
    announcements = Announcements(seen, clock, Health(seen, clock))

    def told(*users_of: str) -> list[str]:
        return [one.announcement_id for one in announcements.in_force(set(users_of) or None)]

    changed = announcements.changed.next()
    assert told() == []
    await announcements.refresh()
    await asyncio.wait_for(announcements.changed.wait(changed), 1)
    assert told() == told("b") == ["ends", "stays"]
    assert told("a") == ["ends"]
    changed = announcements.changed.next()
    clock.advance(1000)
    await announcements.refresh()
    await asyncio.wait_for(announcements.changed.wait(changed), 1)
    assert told() == ["stays"]
