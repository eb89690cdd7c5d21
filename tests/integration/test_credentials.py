"""Connections with certificates that change, between a real server and a real client."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ops.authority import Authority, now
from runtime import credentials as module
from runtime import grpc_client
from runtime.credentials import CredentialFiles, Credentials
from runtime.endpoint import CALLER, Call, Reply
from runtime.errors import RpcError
from runtime.grpc_client import GrpcEndpoint
from runtime.grpc_server import FROM_THE_MESH, FROM_USERS, GrpcServer
from runtime.identity import name_of
from runtime.methods import PEER_FILES, methods_in, peer_method
from tests.fakes import RecordingEndpoint

PROBE = Call(peer_method("gateway", "Probe"), b"", 5.0)
PULL = Call(peer_method("account", "Pull"), b"", 5.0)


class Served(RecordingEndpoint):
    """Streams one message, and then waits for ever."""

    def __init__(self) -> None:
        super().__init__(lambda _: Reply(b"", {}))

    async def stream(self, _call: Call) -> AsyncIterator[bytes]:
        yield b""
        await asyncio.Event().wait()


class Pair:
    """Center b calls center a."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.served = Served()
        self.credentials = {center: Credentials(_files(authority, center), "ab") for center in "ab"}
        self.server = GrpcServer(
            self.served,
            methods_in(PEER_FILES),
            "a",
            "mesh",
            FROM_THE_MESH,
            self.credentials["a"],
        )
        self.client: GrpcEndpoint

    async def start(self) -> None:
        port = await self.server.start("127.0.0.1:0")
        expected = name_of("gateway", "a")
        self.client = GrpcEndpoint("a", f"127.0.0.1:{port}", self.credentials["b"], expected)


def _files(authority: Authority, center: str) -> CredentialFiles:
    path = authority.directory / center / "serve.crt"
    return CredentialFiles(path, path.with_suffix(".key"), authority.authorities_file)


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(grpc_client, "CLOSE_GRACE_S", 0.01)
    authority = Authority(tmp_path / "certs", now())
    authority.init()
    for center in "ab":
        authority.ensure(center, "serve", ["gateway", "account"])
    made = Pair(authority)
    await made.start()
    watching = [asyncio.create_task(one.watch()) for one in made.credentials.values()]
    yield made
    for task in watching:
        task.cancel()
    await made.client.close()
    await made.server.stop(0)


async def _changed(credentials: Credentials, generation: int) -> None:
    async with asyncio.timeout(20):
        while credentials.generation == generation:  # noqa: ASYNC110 - nothing else waits for it
            await asyncio.sleep(0)


async def test_the_certificate_says_who_calls_whatever_metadata_claims(pair: Pair) -> None:
    await pair.client.unary(PROBE._replace(metadata={CALLER: "c gateway"}))
    assert pair.served.calls[-1].metadata[CALLER] == "b account,gateway"


async def test_users_need_no_certificate_and_are_no_callers_of_the_mesh(
    pair: Pair,
) -> None:
    own = _files(pair.authority, "a")
    public = Credentials(CredentialFiles(own.certificate, own.key))
    server = GrpcServer(pair.served, methods_in(PEER_FILES), "a", "gateway", FROM_USERS, public)
    port = await server.start("127.0.0.1:0")
    trusted = grpc.ssl_channel_credentials(pair.authority.authorities_file.read_bytes())
    options = [("grpc.ssl_target_name_override", name_of("gateway", "a"))]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted, options) as channel:
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            PROBE.method.path
        )
        assert await send(b"", timeout=5, metadata=((CALLER, "a gateway"),)) == b""
    assert CALLER not in pair.served.calls[-1].metadata
    await server.stop(0)


async def test_a_stream_over_an_old_connection_ends_as_one_that_may_go_on(pair: Pair) -> None:
    """Not as a center that is lost: two of those in a row would have others avoid it."""
    stream = pair.client.stream(PULL)
    assert await anext(stream) == b""
    generation = pair.credentials["b"].generation
    pair.authority.renew(everything=True)
    await _changed(pair.credentials["b"], generation)
    await pair.client.unary(PROBE)
    with pytest.raises(RpcError) as ended:
        await anext(stream)
    assert ended.value.reason == "CONNECTION_RENEWED"
    again = pair.client.stream(PULL)
    assert await anext(again) == b""
    await again.aclose()  # type: ignore[attr-defined] # it is a generator


async def test_unusable_files_are_not_taken(pair: Pair) -> None:
    certificate = pair.authority.directory / "b" / "serve.crt"
    good, generation = certificate.read_bytes(), pair.credentials["b"].generation
    certificate.write_bytes(b"half a certificate")
    pair.authority.issue("a", "serve", [name_of("gateway", "a")])
    await _changed(pair.credentials["a"], pair.credentials["a"].generation)
    assert pair.credentials["b"].generation == generation
    await pair.client.unary(PROBE)
    certificate.write_bytes(good)
    await _changed(pair.credentials["b"], generation)
    await pair.client.unary(PROBE)
