"""What the users' port takes from one client, at a real server; and what the others notice of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from duohuo.v1.account_service_pb2 import GetAccountRequest
from duohuo.v1.session_service_pb2 import Session
from gateway.announcements import Announcements
from gateway.authenticator import Authenticator
from gateway.health import Health
from gateway.limits import Limiter, Limits
from gateway.router import Router
from runtime.clock import SystemClock
from runtime.endpoint import Call, Reply
from runtime.grpc_server import FROM_USERS, Accepts, GrpcServer
from runtime.mesh import Mesh
from runtime.methods import PUBLIC_FILES, methods_in
from tests.fakes import SEAL, RecordingEndpoint, account, placement

PATH = "/duohuo.v1.AccountService/GetAccount"
ALICE, BOB = account(0, 1), account(0, 2)
TOKENS = {SEAL.token("a", "a" * 43): ALICE, SEAL.token("a", "b" * 43): BOB}
FLOOD = 400


class Held(RecordingEndpoint):
    """Answers once it may."""

    def __init__(self) -> None:
        super().__init__(_answer)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked_by_bob = asyncio.Event()

    async def unary(self, call: Call) -> Reply:
        if BOB.encode() in call.request:
            self.asked_by_bob.set()
        reply = await super().unary(call)
        if call.method.path == PATH:
            await self.may_answer.wait()
        return reply


def _answer(call: Call) -> Reply:
    if call.method.name == "GetSession":
        asked = call.method.request_type.FromString(call.request)
        found = Session(account_id=TOKENS[asked.token])  # type: ignore[attr-defined] # GetSessionRequest
        return Reply(found.SerializeToString(), {})
    return Reply(b"", {})


class Edge:
    """A gateway of one center on a real port."""

    def __init__(self, accepts: Accepts = FROM_USERS) -> None:
        clock = SystemClock()
        self.center = Held()
        mesh = Mesh("a", {"a": self.center}, clock)
        limiter = Limiter(Limits(user_calls_per_s=20, address_calls_per_s=100_000), clock)
        authenticator = Authenticator("a", clock, SEAL)
        health = Health(mesh, clock)
        announced = Announcements(mesh, clock, health)
        router = Router(mesh, placement("a"), authenticator, clock, limiter, announced, health)
        self.server = GrpcServer(router, methods_in(PUBLIC_FILES), "a", "gateway", accepts)
        self.port = 0

    def channel(self, **options: int) -> grpc.aio.Channel:
        own = [("grpc.use_local_subchannel_pool", 1), *options.items()]
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=own)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    made = Edge()
    made.port = await made.server.start("127.0.0.1:0")
    yield made
    await made.server.stop(0)


async def ask(
    channel: grpc.aio.Channel,
    token: str,
    padding: int = 0,
    header: int = 0,
    timeout: float | None = 20,
    compression: grpc.Compression | None = None,
) -> str:
    """The name of the status."""
    request = GetAccountRequest(account_id=TOKENS[token]).SerializeToString()
    send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(PATH)
    # An unknown field, so that only the size counts.
    request += b"\xfa\x3f" + _length(padding) + bytes(padding) if padding else b""
    metadata = (("authorization", f"Bearer {token}"), ("x-padding", "x" * header))
    try:
        await send(request, timeout=timeout, metadata=metadata, compression=compression)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def _length(size: int) -> bytes:
    return bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])


async def test_what_is_served_is_told_unless_that_is_switched_off(edge: Edge) -> None:
    assert await _lists_rpcs(edge.port)
    quiet = Edge(FROM_USERS._replace(reflection=False))
    quiet.port = await quiet.server.start("127.0.0.1:0")
    assert not await _lists_rpcs(quiet.port)
    async with quiet.channel() as channel:
        assert await ask(channel, next(iter(TOKENS))) == "OK"
    await quiet.server.stop(0)


async def _lists_rpcs(port: int) -> bool:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type] # aio
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        asking = stub.ServerReflectionInfo(iter([asked]), timeout=20)
        with suppress(grpc.aio.AioRpcError):
            assert [answer async for answer in asking]
        return await asking.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("given", "least_s", "most_s"), [(None, 9, 10), (5, 4, 5), (1e9, 59, 60)], ids=str
)
async def test_every_call_gets_a_deadline(
    edge: Edge, given: float | None, least_s: int, most_s: int
) -> None:
    async with edge.channel() as channel:
        assert await ask(channel, next(iter(TOKENS)), timeout=given) == "OK"
    (call,) = (call for call in edge.center.calls if call.method.path == PATH)
    assert least_s <= call.timeout_s <= most_s


async def test_what_is_packed_small_counts_by_its_real_size(edge: Edge) -> None:
    async with edge.channel() as channel:
        packed = grpc.Compression.Gzip
        alice = next(iter(TOKENS))
        assert await ask(channel, alice, padding=60_000, compression=packed) == "OK"
        bomb = await ask(channel, alice, padding=2_000_000, compression=packed)
        assert bomb == "RESOURCE_EXHAUSTED"
    assert sum(call.method.path == PATH for call in edge.center.calls) == 1


async def test_messages_and_metadata_have_a_size(edge: Edge) -> None:
    alice = next(iter(TOKENS))
    async with edge.channel() as channel:
        assert await ask(channel, alice, padding=60_000) == "OK"
        assert await ask(channel, alice, padding=70_000) == "RESOURCE_EXHAUSTED"
        assert await ask(channel, alice, header=8_000) == "OK"
        assert await ask(channel, alice, header=40_000) == "RESOURCE_EXHAUSTED"
    # Nothing of what was refused has come any further.
    assert sum(call.method.path == PATH for call in edge.center.calls) == 2


async def test_a_flood_by_one_user_is_refused_and_another_is_served(edge: Edge) -> None:
    alice, bob = TOKENS
    async with edge.channel() as flooding, edge.channel() as calm:
        flood = [asyncio.ensure_future(ask(flooding, alice)) for _ in range(FLOOD)]
        assert [await ask(calm, bob) for _ in range(20)] == ["OK"] * 20
        answers = await asyncio.gather(*flood)
    assert set(answers) == {"OK", "RESOURCE_EXHAUSTED"}


async def test_calls_that_hang_on_one_connection_do_not_hold_up_another(edge: Edge) -> None:
    alice, bob = TOKENS
    edge.center.may_answer.clear()
    async with edge.channel() as hanging, edge.channel() as calm:
        many = [asyncio.ensure_future(ask(hanging, alice)) for _ in range(FLOOD)]
        one = asyncio.ensure_future(ask(calm, bob))
        await asyncio.wait_for(edge.center.asked_by_bob.wait(), 20)
        edge.center.may_answer.set()
        assert await one == "OK"
        await asyncio.gather(*many)
