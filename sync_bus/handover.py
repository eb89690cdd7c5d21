"""Giving a slot away while users go on.

Its home waits until the new one has all that it had when it was asked, then gives it away in one unit. From
that until the new home has applied the last of it, nobody acts for the slot.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    HandOverRequest,
    HandOverResponse,
    ListHomesRequest,
    ListHomesResponse,
    SlotHome,
)
from runtime.dispatcher import Incoming
from runtime.errors import RpcError, invalid
from runtime.placement import SLOTS
from runtime.signal import Signal
from runtime.store import Store
from sync_bus import homes
from sync_bus.followers import Followers
from sync_bus.homes import Homes, Present
from sync_bus.log import Topic
from sync_bus.site import Site

CATCH_UP_S_MAX = 5.0
TAKE_OVER_S_MAX = 5.0


class HandoverServicer:
    """Serves HandOver and ListHomes of a service's peer interface."""

    def __init__(self, topics: Sequence[Topic], site: Site, database: Store, own: Homes) -> None:
        self._topics = [topic.name for topic in topics]
        self._site = site
        self._store = database
        self._homes = own
        self._followers = {peer: Followers([peer], database) for peer in site.mesh.peers}
        self._committed = Signal()
        database.on_commit(self._committed.notify)

    async def HandOver(self, request: HandOverRequest, incoming: Incoming) -> HandOverResponse:
        slot, to = request.slot, request.home
        if not 0 <= slot < SLOTS:
            raise invalid("slot", f"must be from 0 to {SLOTS - 1}")
        if to not in self._site.mesh.peers and to != self._site.here:
            raise invalid("home", "must be a center of this mesh", "UNKNOWN_CENTER")
        before = await self._store.read(homes.present(slot))
        if request.HasField("epoch") and _is_late(before, request):
            raise RpcError(
                StatusCode.ABORTED,
                "STALE_EPOCH",
                f"slot {slot} is in epoch {before.epoch} by now",
                advice="See where it is (`duohuo route show`), and decide anew.",
            )
        if before.home != to or to != self._site.here:
            # What was given away, its new home may have given away since: that is for it to say.
            await self._store.read(homes.require(self._site.here, slot))
            await self._require_near(to)
            unit = self._homes.hand_over(slot, to, incoming.operator, self._site.stamps.now())
            before, moved = await self._store.write("hand over", unit)
        else:
            moved = 0
        taken = await self._taken_over(slot, before.epoch)
        return HandOverResponse(epoch=before.epoch, taken_over=taken, accounts_moved=moved)

    async def ListHomes(self, request: ListHomesRequest, _incoming: Incoming) -> ListHomesResponse:
        found = await self._store.read(homes.moved())
        first = await self._store.read(homes.first()) if request.first else []
        centers = sorted(set(first))
        return ListHomesResponse(
            homes=[SlotHome(slot=one.slot, epoch=one.epoch, home=one.home) for one in found],
            first_centers=centers,
            first_homes=[centers.index(home) for home in first],
        )

    async def _require_near(self, to: str) -> None:
        """Users of the slot wait for as long as its new home is behind."""
        is_near = self._site.mesh.reachable(to)
        for topic in self._topics if is_near else ():
            is_near = is_near and not await self._followers[to].wait(topic, CATCH_UP_S_MAX)
        if not is_near:
            raise RpcError(
                StatusCode.UNAVAILABLE,
                "NEW_HOME_BEHIND",
                f"center {to} does not answer, or has not caught up with center {self._site.here}",
                retry_after_ms=5000,
                advice="Nothing was moved. See `duohuo status`; try again once it has caught up.",
            )

    async def _taken_over(self, slot: int, epoch: int) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(TAKE_OVER_S_MAX):
                while True:
                    committed = self._committed.next()
                    found = await self._store.read(homes.present(slot))
                    if found.epoch > epoch or found.acts:
                        return True
                    await self._committed.wait(committed)
        return False


def _is_late(before: Present, request: HandOverRequest) -> bool:
    """Has the slot been moved since the operator looked? Not if that was this very move."""
    done = before.home == request.home and before.epoch == request.epoch + 1
    return before.epoch != request.epoch and not done
