"""Our servers put up with the pings of our clients, by which a half-open link is noticed."""

import asyncio

import grpc
import grpc.aio
import pytest

from runtime.endpoint import Reply
from runtime.grpc_client import CHANNEL_OPTIONS
from runtime.grpc_server import FROM_USERS, GrpcServer
from tests.fakes import RecordingEndpoint

QUICK_PINGS = (("grpc.keepalive_time_ms", 1_100),)
"""As often as a server may be pinged, so that the third complaint, which ends it, comes soon."""
WATCHED_S = 6.0


async def test_an_idle_connection_stays_although_it_is_pinged() -> None:
    server = GrpcServer(RecordingEndpoint(lambda _: Reply(b"", {})), {}, "a", "gateway", FROM_USERS)
    port = await server.start("127.0.0.1:0")
    options = (*(one for one in CHANNEL_OPTIONS if one[0] != QUICK_PINGS[0][0]), *QUICK_PINGS)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(
                    channel.wait_for_state_change(grpc.ChannelConnectivity.READY), WATCHED_S
                )
    finally:
        await server.stop(0.0)
