"""NATS's two ports: who gets in, and what each may do there."""

import asyncio
import json
import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nats.errors
import pytest

from duohuo.internal.v1.log_pb2 import LogEntry
from ops.authority import Authority, Issued, now
from ops.serve import nats_access_of
from runtime.identity import name_of
from sync_bus.bus import BusFault
from sync_bus.jetstream import JetStreamBus, NatsAccess
from tests.integration.conftest import RunningMesh, start_mesh

ENTRY = LogEntry(topic="accounts", seq=1, record=b"")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh with one process for each role."""
    running = start_mesh(tmp_path_factory.mktemp("split") / "mesh", "--split")
    yield running
    assert running.stop() == 0


class Door:
    """A port of center a's NATS server, and a copy of the mesh's authority to make certificates with."""

    def __init__(self, mesh: RunningMesh, copy: Path, listening: str) -> None:
        state = mesh.cli.state
        conf = (state / "a" / "nats.conf").read_text()
        at = re.search(listening + r"listen: ([\d.]+):(\d+)", conf, re.MULTILINE)
        assert at is not None
        self.address = at[1], int(at[2])
        self.trusted = state / "certs" / "ca.crt"
        shutil.copytree(state / "certs", copy, dirs_exist_ok=True)
        self.authority = Authority(copy, now())

    def certificate(self, name: str) -> Issued:
        role, center, *_ = name.split(".")
        return self.authority.issue(center, f"test-{role}", [name])

    def says(self, issued: Issued | None, *lines: str, authority: Authority | None = None) -> str:
        """What the server says after its greeting, to who shows this certificate; empty if nothing."""
        said: list[str] = []
        context = ssl.create_default_context(cafile=self.trusted)
        if issued is not None:
            directory = (authority or self.authority).directory
            own = directory / issued.center / issued.process
            context.load_cert_chain(own.with_suffix(".crt"), own.with_suffix(".key"))
        with (
            suppress(ssl.SSLError, ConnectionError),
            socket.create_connection(self.address, timeout=5) as connection,
            context.wrap_socket(connection, server_hostname=name_of("nats", "a")) as secure,
        ):
            answer = secure.makefile("rb")
            if not answer.readline().startswith(b"INFO"):
                return ""
            secure.sendall("".join(f"{line}\r\n" for line in (*lines, "PING")).encode())
            while line := answer.readline().decode().strip():
                said.append(line)
                if line == "PONG":
                    break
        return "\n".join(said)


@pytest.fixture(scope="module")
def clients(split: RunningMesh, tmp_path_factory: pytest.TempPathFactory) -> Door:
    return Door(split, tmp_path_factory.mktemp("authority"), "^")


@pytest.fixture(scope="module")
def leaves(split: RunningMesh, tmp_path_factory: pytest.TempPathFactory) -> Door:
    return Door(split, tmp_path_factory.mktemp("authority"), r"^leafnodes \{\n  ")


def login(user: str, password: str = "") -> str:
    return "CONNECT " + json.dumps({"user": user, "pass": password, "verbose": False})


def leaf(**more: object) -> str:
    return "CONNECT " + json.dumps({"server_id": "L", "name": "test", "domain": "b", **more})


def password(mesh: RunningMesh, process: str) -> str:
    return (mesh.cli.state / "a" / f"{process}.nats-password").read_text().strip()


@pytest.fixture
def another_authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "certs", now())
    made.init()
    return made


def test_a_process_with_certificate_and_password_gets_in(split: RunningMesh, clients: Door) -> None:
    """Or else the others show nothing."""
    own = clients.certificate(name_of("account", "a"))
    assert "PONG" in clients.says(own, login("ev-account", password(split, "account")))


def test_nobody_gets_in_without_a_certificate_of_the_mesh(
    clients: Door, leaves: Door, another_authority: Authority
) -> None:
    foreign = another_authority.issue("b", "nats", [name_of("nats", "b")])
    for door in (clients, leaves):
        assert door.says(None, leaf()) == ""
        assert door.says(foreign, leaf(), authority=another_authority) == ""
        with socket.create_connection(door.address, timeout=5) as clear:
            clear.sendall(b'CONNECT {"verbose": false}\r\nPING\r\n')
            with suppress(ConnectionError):
                assert b"INFO" not in clear.recv(1024)  # not even who it is


def test_a_certificate_is_no_password(split: RunningMesh, clients: Door) -> None:
    own = clients.certificate(name_of("session", "a"))
    for user, given in (
        ("ev-account", ""),
        ("ev-account", password(split, "session")),
        ("nats.b.duohuo.internal", ""),  # a leaf's, which has none
        ("", ""),
    ):
        assert clients.says(own, login(user, given)).startswith("-ERR 'Authorization Violation'")


def test_a_center_s_server_is_known_by_its_certificate_alone(
    split: RunningMesh, leaves: Door
) -> None:
    assert "PONG" in leaves.says(leaves.certificate(name_of("nats", "b")), leaf())
    for name in (name_of("account", "b"), name_of("nats", "c"), name_of("nats", "a")):
        own = leaves.certificate(name)
        for said in (leaf(), leaf(user="nats.b.duohuo.internal"), leaf(user="ev-account")):
            answer = leaves.says(own, said)
            assert "PONG" not in answer, (name, said)
    own = leaves.certificate(name_of("gateway", "b"))
    secret = password(split, "account")
    assert "PONG" not in leaves.says(own, leaf(user="ev-account", **{"pass": secret}))


async def test_a_center_s_server_can_neither_publish_nor_destroy_here(
    split: RunningMesh, leaves: Door
) -> None:
    access = nats_access_of(split.cli.state / "a" / "account.toml")
    bus = JetStreamBus(access, "account", ["b"])
    try:
        await bus.last_published("accounts")
        await bus.publish("accounts", [ENTRY])
        stream = await access.jetstream("EV")
        before = (await stream.stream_info("OUT_a")).state.messages
        attacks = (
            "LMSG ev.a.account.accounts 2\r\n{}",
            "LMSG $JS.API.STREAM.PURGE.OUT_a 2\r\n{}",
            "LMSG $JS.a.API.STREAM.PURGE.OUT_a 2\r\n{}",
            "LMSG $JS.API.STREAM.DELETE.OUT_a 2\r\n{}",
        )
        own = leaves.certificate(name_of("nats", "b"))
        for attack in attacks:
            answer = await asyncio.to_thread(leaves.says, own, leaf(), attack)
            assert "-ERR 'Permissions Violation for Publish" in answer
        assert (await stream.stream_info("OUT_a")).state.messages == before
    finally:
        await access.close()


async def test_a_process_neither_publishes_nor_takes_what_is_another_s(split: RunningMesh) -> None:
    access = nats_access_of(split.cli.state / "a" / "session.toml")
    try:
        with pytest.raises(BusFault):
            await JetStreamBus(access, "account", ["b"]).publish("accounts", [ENTRY])
        await JetStreamBus(access, "session", ["b"]).publish("sessions", [ENTRY])
        received = await access.jetstream("IN_b")
        for consumer in ("apply-account", "apply-other"):
            with pytest.raises((nats.errors.Error, TimeoutError)):
                await received.consumer_info("IN_b", consumer, timeout=0.5)
        for account in ("EV", "IN_b"):
            client = access.connections[account].client
            for subject in ("ev.b.account.accounts", "$JS.ACK.IN_b.apply-account.1.1.1.1.1"):
                with pytest.raises((nats.errors.Error, TimeoutError)):
                    await client.request(subject, b"", timeout=0.5)
    finally:
        await access.close()


class Impostor:
    """Listens where a NATS server should, in clear or with a certificate, and keeps what it is told."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.context = context
        self.told = b""

    async def __aenter__(self) -> "Impostor":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(b'INFO {"server_id": "x", "max_payload": 1000000}\r\n')
            while got := await reader.read(4096):
                self.told += got
        writer.close()


async def tries_to_publish(state: Path, port: int) -> None:
    real = nats_access_of(state / "a" / "account.toml")
    access = NatsAccess(
        "a", f"tls://127.0.0.1:{port}", ["account"], real.password, real.credentials
    )
    with pytest.raises(BusFault):
        await JetStreamBus(access, "account", ["b"]).publish("accounts", [ENTRY])


async def test_who_only_claims_to_be_the_server_is_not_told_a_password(
    split: RunningMesh, clients: Door
) -> None:
    state = split.cli.state
    secret = password(split, "account").encode()
    async with Impostor(None) as in_clear:
        await tries_to_publish(state, in_clear.port)
        assert in_clear.told
        assert secret not in in_clear.told
        assert b"CONNECT" not in in_clear.told
    for name in (name_of("nats", "b"), name_of("account", "a")):
        issued = clients.certificate(name)
        own = clients.authority.directory / issued.center / issued.process
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(own.with_suffix(".crt"), own.with_suffix(".key"))
        async with Impostor(context) as named:
            await tries_to_publish(state, named.port)
            assert named.told == b""
