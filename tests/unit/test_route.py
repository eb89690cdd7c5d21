"""What is said of a user's route follows from what the .proto files declare."""

import pytest

from duohuo.v1.operator_service_pb2 import CenterStatus, RoadStatus, Route
from ops.route import Behind, behind, outlook, shown
from runtime.methods import PUBLIC_FILES, methods_in

NAMES = {declared.name for declared in methods_in(PUBLIC_FILES).values()}


@pytest.mark.parametrize("order", [("a", "b"), ("c", "a", "b")])
def test_each_call_goes_on_or_waits(order: tuple[str, ...]) -> None:
    found = outlook(order)
    assert sorted(name for names in found for name in names) == sorted(NAMES)
    assert {"Login", "ApplyTransfer", "GetAccount", "ListAnnouncements"} <= set(found.everywhere)
    assert {"Register", "Transfer", "ReserveFunds", "CaptureHold"} <= set(found.waiting)
    assert "GetSession" in found.by_origin


def test_with_two_centers_the_next_one_is_every_other_one() -> None:
    assert outlook(("a", "b")).at_next == []
    assert {"UpdateProfile", "ChangePassword", "GetBalance"} <= set(
        outlook(("a", "b", "c")).at_next
    )


def test_alone_there_is_nobody_to_go_on() -> None:
    found = outlook(("a",))
    assert {"Register", "UpdateProfile", "ApplyTransfer"} <= set(found.waiting)


def road(source: str, topic: str, cursor: int, head: int, heard: int | None) -> RoadStatus:
    return RoadStatus(
        source_center=source, topic=topic, cursor=cursor, head=head, heard_ago_ms=heard
    )


def test_how_far_behind_is_what_the_slowest_topic_says() -> None:
    roads = [road("a", "one", 5, 9, 100), road("a", "two", 7, 7, 300), road("c", "one", 0, 50, 9)]
    assert behind(CenterStatus(roads=roads), "a") == Behind(4, 300)
    never = [*roads, road("a", "three", 0, 0, None)]
    assert behind(CenterStatus(roads=never), "a") == Behind(4, None)
    assert behind(CenterStatus(), "a") == Behind(0, None)


def test_people_are_told_who_is_behind_and_who_says_nothing() -> None:
    route = Route(slot=7, account_id="u007-1", placement_epoch=1, centers=["a", "b", "c", "d"])
    text = shown("alice@example.com", route, {"b": Behind(4, 300), "d": Behind(0, None)})
    assert "account u007-1" in text
    assert "slot 7, home a, then b, then c, then d (placement epoch 1)" in text
    assert "b has followed a up to 0.3 s ago, 4 entries behind" in text
    assert "c does not answer." in text
    assert "d has never heard of a" in text
    nobody = shown("x@example.com", Route(centers=["a"]), {})
    assert "no account that is known here" in nobody
