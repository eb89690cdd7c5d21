"""Clients that misuse HTTP/2 itself, by frames that no gRPC library sends; others are served meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamReset,
)
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, HeadersFrame

from duohuo.v1.account_service_pb2 import GetAccountRequest
from tests.integration.conftest import RunningMesh
from tests.integration.test_edge import PATH, TOKENS, Edge, ask, edge

__all__ = ["edge"]  # a fixture

ALICE, BOB = TOKENS
PATIENCE_S = 20.0
SLOW = 400
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", PATH),
    (":authority", "duohuo"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
    ("authorization", f"Bearer {ALICE}"),
]


@dataclass
class Attacker:
    """One connection, frame by frame."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    h2: H2Connection = field(
        default_factory=lambda: H2Connection(H2Configuration(client_side=True))
    )

    async def send(self, raw: bytes = b"") -> None:
        self.writer.write(self.h2.data_to_send() + raw)
        await self.writer.drain()

    async def until(self, *wanted: type[Event]) -> Event | None:
        """The first such event; None if the server ends the connection before. Raises TimeoutError."""
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                while received := await self.reader.read(65536):
                    for event in self.h2.receive_data(received):
                        if isinstance(event, wanted):
                            return event
                    await self.send()
        return None


@asynccontextmanager
async def attacker(port: int) -> AsyncIterator[Attacker]:
    made = Attacker(*await asyncio.open_connection("127.0.0.1", port))
    made.h2.initiate_connection()
    await made.send()
    try:
        yield made
    finally:
        await _closed(made.writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def others_are_served(edge: Edge) -> bool:
    async with edge.channel() as channel:
        return await ask(channel, BOB) == "OK"


async def test_a_connection_may_have_so_many_calls_and_says_so(edge: Edge) -> None:
    async with attacker(edge.port) as client:
        settings = await client.until(RemoteSettingsChanged)
        assert isinstance(settings, RemoteSettingsChanged)
        assert settings.changed_settings[SettingCodes.MAX_CONCURRENT_STREAMS].new_value == 1_000


async def test_streams_opened_and_reset_at_once_keep_nobody_from_being_served(edge: Edge) -> None:
    async with attacker(edge.port) as client:
        for _ in range(20):
            for _ in range(100):
                stream = client.h2.get_next_available_stream_id()
                client.h2.send_headers(stream, HEADERS)
                client.h2.reset_stream(stream)
            await client.send()
            assert await others_are_served(edge)


async def test_headers_without_end_are_answered_before_their_end(edge: Edge) -> None:
    """Every frame says that another one follows, to be kept until then."""
    async with attacker(edge.port) as client:
        first = HeadersFrame(1, client.h2.encoder.encode(HEADERS))
        await client.send(first.serialize())
        header = b"\x00\x01x\x7f\x81\x7c" + b"y" * 16_000  # RFC 7541, 6.2.2: x: yyy...
        more = ContinuationFrame(1, header).serialize()
        with suppress(ConnectionError):
            for _ in range(200):
                await client.send(more)
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                await client.reader.read(1)
    assert await others_are_served(edge)


@pytest.mark.parametrize("part", ["nothing", "half a greeting", "half of the headers"])
async def test_those_who_take_their_time_hold_up_nobody(edge: Edge, part: str) -> None:
    """Many connections, each of which will say the rest later."""
    h2 = H2Connection(H2Configuration(client_side=True))
    h2.initiate_connection()
    greeting = h2.data_to_send()
    headers = HeadersFrame(1, h2.encoder.encode(HEADERS)).serialize()
    said = {
        "nothing": b"",
        "half a greeting": greeting[:10],
        "half of the headers": greeting + headers[: len(headers) // 2],
    }
    slow = []
    try:
        for _ in range(SLOW):
            _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
            slow.append(writer)
            writer.write(said[part])
            await writer.drain()
        for _ in range(20):
            assert await others_are_served(edge)
        assert len([call for call in edge.center.calls if call.method.path == PATH]) == 20
    finally:
        for writer in slow:
            await _closed(writer)


async def test_a_flood_of_settings_holds_up_nobody(edge: Edge) -> None:
    """Each has to be acknowledged."""
    async with attacker(edge.port) as client:
        with suppress(ConnectionError):
            for number in range(20):
                for size in range(500):
                    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 70_000 + size})
                await client.send()
                assert await others_are_served(edge), number


async def test_who_takes_answers_a_byte_at_a_time_holds_up_nobody(edge: Edge) -> None:
    async with attacker(edge.port) as client:
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1})
        request = GetAccountRequest(account_id=TOKENS[ALICE]).SerializeToString()
        message = b"\x00" + len(request).to_bytes(4, "big") + request
        for _ in range(100):
            stream = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream, HEADERS)
            client.h2.send_data(stream, message, end_stream=True)
        await client.send()
        assert isinstance(await client.until(ResponseReceived), ResponseReceived)
        for _ in range(20):
            assert await others_are_served(edge)


async def test_a_flood_of_pings_ends_the_connection(edge: Edge) -> None:
    async with attacker(edge.port) as client:
        with suppress(ConnectionError):
            for number in range(1_000):
                client.h2.ping(number.to_bytes(8, "big"))
                await client.send()
        await client.until(ConnectionTerminated)  # or the end without a word
    assert await others_are_served(edge)


async def test_a_call_whose_deadline_is_over_does_nothing(edge: Edge) -> None:
    async with attacker(edge.port) as client:
        client.h2.send_headers(1, [*HEADERS, ("grpc-timeout", "0n")])
        client.h2.send_data(1, bytes(5), end_stream=True)
        await client.send()
        ended = await client.until(ResponseReceived, StreamReset)
    if isinstance(ended, ResponseReceived):
        assert dict(ended.headers)[b"grpc-status"] == b"4"
    else:
        assert isinstance(ended, StreamReset)
    assert not [call for call in edge.center.calls if call.method.path == PATH]


@pytest.mark.parametrize("opening", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", bytes(1000)])
async def test_what_is_not_http2_is_hung_up_on(edge: Edge, opening: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(opening)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
    await _closed(writer)
    assert await others_are_served(edge)


def test_a_header_that_is_no_text_is_not_logged(mesh: RunningMesh) -> None:
    """gRPC would log it whole; it may be a token with a slip in it."""

    async def call() -> None:
        port = int(mesh.described["centers"]["a"]["gateway"].rpartition(":")[2])
        async with attacker(port) as client:
            slip = ("authorization", b"Bearer kanarie\xff")
            client.h2.send_headers(1, [*HEADERS[:-1], slip])
            client.h2.send_data(1, bytes(5), end_stream=True)
            await client.send()
            assert await client.until(ResponseReceived, StreamReset) is not None

    asyncio.run(call())
    for log in mesh.cli.state.rglob("*.log"):
        content = log.read_bytes()
        assert b"kanarie" not in content
        assert b"Invalid encoding" not in content
