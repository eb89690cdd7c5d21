"""What a home says to whoever asks it to give a slot away, and what a center learns before it begins."""

from collections.abc import AsyncIterator
from unittest.mock import patch

import pytest

from duohuo.internal.v1.peer_services_pb2 import HandOverRequest, HandOverResponse
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.ids import account_slot
from runtime.methods import peer_method
from runtime.placement import SLOTS
from sync_bus import handover, homes
from tests.fakes import account, placement
from tests.unit.centers import Centers, centers
from tests.unit.test_moving import acting, move

ALICE, CAROL = account(0), account(2)


@pytest.fixture
async def three() -> AsyncIterator[Centers]:
    async with centers("a", "b", "c") as made:
        yield made


async def asked_to(
    made: Centers, source: str, slot: int, to: str, **given: int
) -> HandOverResponse:
    return await ask(
        made.service(source).dispatcher,
        peer_method("transfer", "HandOver"),
        HandOverRequest(slot=slot, home=to, **given),
        HandOverResponse,
        5.0,
    )


async def test_a_home_gives_nothing_to_who_is_behind(three: Centers) -> None:
    """Its users would wait for as long."""
    await three.deposit(ALICE, 100, "deposit-1")
    with patch.object(handover, "CATCH_UP_S_MAX", 0), pytest.raises(RpcError) as refused:
        await asked_to(three, "a", 0, "c")
    assert (refused.value.reason, refused.value.ran) == ("NEW_HOME_BEHIND", False)
    assert await acting(three, ALICE) == ["a"]


async def test_a_move_that_was_decided_on_what_has_changed_since_is_none(three: Centers) -> None:
    await three.settle()
    for name in three.names:  # they confirm what they have applied
        for peer in three.names:
            if peer != name:
                await three.service(name).exchange(peer)
    with patch.object(handover, "TAKE_OVER_S_MAX", 0):
        first = await asked_to(three, "a", 0, "c", epoch=1)
        assert (first.epoch, first.taken_over) == (2, False)
        with pytest.raises(RpcError, match="WRONG_HOME"):
            await asked_to(three, "a", 0, "c", epoch=1)
    for late in (1, 3):
        with pytest.raises(RpcError, match="STALE_EPOCH"):
            await asked_to(three, "a", 0, "b", epoch=late)
    await three.settle()
    again = await asked_to(three, "c", 0, "c", epoch=1)
    assert (again.epoch, again.taken_over) == (2, True)


async def test_only_the_new_home_says_that_a_move_is_done_already(three: Centers) -> None:
    """Who knows no better than that the slot is there may have missed that it has moved on."""
    with pytest.raises(RpcError, match="WRONG_HOME"):
        await asked_to(three, "b", 0, "a")
    assert (await asked_to(three, "a", 0, "a")).taken_over


@pytest.mark.parametrize(("slot", "to"), [(-1, "c"), (4096, "c"), (0, "x")])
async def test_there_must_be_such_a_slot_and_such_a_center(
    three: Centers, slot: int, to: str
) -> None:
    with pytest.raises(RpcError) as refused:
        await asked_to(three, "a", slot, to)
    assert refused.value.reason in ("INVALID_FIELD", "UNKNOWN_CENTER")


async def test_a_new_center_takes_the_homes_that_the_mesh_began_with() -> None:
    """Computed for three centers, a third of the slots would be at home at the new one at once."""
    async with centers("a", "b", "c") as three:
        began = placement("a", "b")
        for name in ("a", "b"):
            store = three.service(name).store
            await store.write("began", homes._replace_first([began.home(s) for s in range(SLOTS)]))
        assert await acting(three, CAROL) == ["a", "c"]
        c = await three.recover("c")
        assert await acting(three, CAROL) == ["a"]
        assert c.site.placement.home(account_slot(CAROL) or 0) == "a"
        await three.settle()
        await move(three, CAROL, "a", "c")
        assert await acting(three, CAROL) == ["c"]


async def test_a_new_center_waits_for_who_may_know_them() -> None:
    async with centers("a", "b") as two:
        b = two.service("b")
        two.hush("a")
        with pytest.raises(RpcError, match="CENTER_UNREACHABLE"):
            await b.slots.join(["a"])
