"""Follows, in a process without the account service, which slots have other homes than at the beginning."""

import asyncio
from contextlib import suppress

from duohuo.internal.v1.peer_services_pb2 import ListHomesRequest, ListHomesResponse
from runtime.endpoint import Endpoint, ask
from runtime.errors import RpcError
from runtime.methods import peer_method
from runtime.placement import Placement

INTERVAL_S = 1.0
TIMEOUT_S = 2.0
_LIST_HOMES = peer_method("account", "ListHomes")


async def follow_homes(center: Endpoint, placement: Placement) -> None:
    """For as long as the process lives. Whoever is asked wrongly meanwhile says so."""
    asked = ListHomesRequest(first=True)
    while True:
        with suppress(RpcError):
            found = await ask(center, _LIST_HOMES, asked, ListHomesResponse, TIMEOUT_S)
            placement.begin_with([found.first_centers[one] for one in found.first_homes])
            asked.first = False
            for one in found.homes:
                placement.learn(one.slot, one.epoch, one.home)
        await asyncio.sleep(INTERVAL_S)
