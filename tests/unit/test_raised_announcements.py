"""What operators tell users: the same at every center, once, and over when it is lifted."""

from collections.abc import Mapping

import pytest

from account_svc import announcement
from account_svc.announcement_service import IN_FORCE_MAX, AnnouncementService
from duohuo.internal.v1.log_pb2 import AnnouncementChanged, LogRecord
from duohuo.internal.v1.peer_services_pb2 import ListRaisedRequest
from duohuo.v1.announcement_service_pb2 import Announcement
from duohuo.v1.operator_service_pb2 import LiftAnnouncementRequest, RaiseAnnouncementRequest
from runtime.clock import timestamp
from runtime.dispatcher import Incoming
from runtime.errors import RpcError
from sync_bus import audit
from tests.fakes import NOON_MS
from tests.unit.centers import Centers, centers

OPERATOR = Incoming("", 5.0, operator="olga")
TEXTS = {"zh": "暂停", "en": "Paused."}


async def raised(
    made: Centers,
    name: str,
    announcement_id: str = "one",
    texts: Mapping[str, str] = TEXTS,
    end_ms: int = 0,
) -> Announcement:
    end = timestamp(end_ms) if end_ms else None
    request = RaiseAnnouncementRequest(
        announcement_id=announcement_id, center="b", texts=texts, end_time=end
    )
    return await at(made, name).RaiseAnnouncement(request, OPERATOR)


async def lifted(made: Centers, name: str, announcement_id: str = "one") -> Announcement:
    request = LiftAnnouncementRequest(announcement_id=announcement_id)
    return await at(made, name).LiftAnnouncement(request, OPERATOR)


async def told(made: Centers, name: str) -> list[str]:
    found = await at(made, name).ListRaised(ListRaisedRequest(), OPERATOR)
    return [one.announcement_id for one in found.announcements]


def at(made: Centers, name: str) -> AnnouncementService:
    one = made.service(name)
    return AnnouncementService(one.site, one.store)


async def test_it_is_told_at_every_center_until_any_of_them_lifts_it() -> None:
    async with centers("a", "b", role="account") as made:
        first = await raised(made, "a")
        assert (first.center, first.text, dict(first.texts)) == ("b", "Paused.", TEXTS)
        assert await told(made, "b") == []
        await made.settle()
        assert await told(made, "a") == await told(made, "b") == ["one"]
        made.clock.advance(1000)
        await lifted(made, "b")
        await made.settle()
        assert await told(made, "a") == await told(made, "b") == []
        actions = await made.service("a").store.read(audit.find())
        assert [(one.who, one.action, one.target) for one in actions] == [
            ("olga", "lift", "one"),
            ("olga", "announce", "one"),
        ]


async def test_asked_again_it_is_the_same_one_and_with_another_text_it_is_refused() -> None:
    async with centers("a", "b", role="account") as made:
        first = await raised(made, "a")
        made.clock.advance(1000)
        assert await raised(made, "a") == first
        with pytest.raises(RpcError, match="IDEMPOTENCY_CONFLICT"):
            await raised(made, "a", texts={"en": "Not paused."})
        await lifted(made, "a")
        await lifted(made, "a")
        with pytest.raises(RpcError, match="IDEMPOTENCY_CONFLICT"):
            await raised(made, "a")


async def test_raised_again_at_a_center_that_does_not_know_of_it_it_is_lifted_all_the_same() -> (
    None
):
    async with centers("a", "b", role="account") as made:
        await raised(made, "a")
        made.clock.advance(1000)
        await lifted(made, "a")
        made.clock.advance(1000)
        await raised(made, "b")
        await made.settle()
        assert await told(made, "a") == await told(made, "b") == []


async def test_it_ends_by_itself() -> None:
    async with centers("a", "b", role="account") as made:
        await raised(made, "a", end_ms=NOON_MS + 10_000)
        assert await told(made, "a") == ["one"]
        made.clock.advance(10_000)
        assert await told(made, "a") == []
        with pytest.raises(RpcError, match="must be in the future"):
            await raised(made, "a", "two", end_ms=NOON_MS)


async def test_what_nobody_has_raised_cannot_be_lifted() -> None:
    async with centers("a", "b", role="account") as made:
        with pytest.raises(RpcError, match="ANNOUNCEMENT_NOT_FOUND"):
            await lifted(made, "a")


async def test_no_more_than_so_many_are_in_force() -> None:
    async with centers("a", "b", role="account") as made:
        for number in range(IN_FORCE_MAX):
            await raised(made, "a", f"one-{number}")
        with pytest.raises(RpcError, match="TOO_MANY_ANNOUNCEMENTS"):
            await raised(made, "a", "one-more")
        await lifted(made, "a", "one-0")
        await raised(made, "a", "one-more")


@pytest.mark.parametrize("announcement_id", ["", "Fire", "-", "fire at b"])
async def test_an_id_is_one_that_can_be_typed(announcement_id: str) -> None:
    async with centers("a", role="account") as made:
        with pytest.raises(RpcError, match="must be of small letters"):
            await raised(made, "a", announcement_id)


async def test_without_english_the_first_language_is_shown() -> None:
    async with centers("a", "b", role="account") as made:
        assert (await raised(made, "a", texts={"zh": "暂停"})).text == "暂停"


async def test_an_entry_that_says_nothing_is_not_taken() -> None:
    async with centers("a", "b", role="account") as made:
        record = LogRecord(announcement_changed=AnnouncementChanged(announcement_id="one"))
        one = made.service("a")
        with pytest.raises(ValueError, match="without a text"):
            announcement.of(record.announcement_changed)
        assert await one.store.read(announcement.find("one")) is None
