"""The port on which centers and services call each other: who gets in, and what each may call there."""

import shutil
import socket
import ssl
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from duohuo.internal.v1.peer_services_pb2 import (
    ExchangeRequest,
    ProbeRequest,
    SealRequest,
    ShareFailuresRequest,
)
from ops.authority import Authority, Issued, now
from runtime.identity import name_of
from runtime.methods import PEER_FILES, PUBLIC_FILES, methods_in, peer_method
from tests.integration.conftest import RunningMesh, wait_until
from tests.integration.test_authorization import Metadata, _outcome

MESH = methods_in([*PEER_FILES, *PUBLIC_FILES])
PROBE = peer_method("gateway", "Probe")


class Door:
    """Center a's mesh port, and an authority to make certificates with: a copy of the mesh's."""

    def __init__(self, mesh: RunningMesh, copy: Path) -> None:
        self.mesh = mesh
        state = mesh.cli.state
        settings = tomllib.loads((state / "a" / "center.toml").read_text())
        self.address: str = settings["mesh_listen"]
        self.certificates = state / "certs"
        shutil.copytree(self.certificates, copy)
        self.authority = Authority(copy, now())

    def path(self, issued: Issued, suffix: str, authority: Authority | None = None) -> Path:
        directory = (authority or self.authority).directory
        return directory / issued.center / f"{issued.process}{suffix}"

    def certificate(self, role: str, center: str, days_from_now: int = 0) -> Issued:
        """One that lasts 90 days from that day on."""
        directory = self.authority.directory
        made = Authority(directory, now() + timedelta(days=days_from_now))
        return made.issue(center, f"test-{role}", [name_of(role, center)])

    def call(
        self,
        path: str,
        request: bytes,
        issued: Issued | None,
        authority: Authority | None = None,
        metadata: Metadata = (),
    ) -> tuple[str, str, str]:
        """What a call comes to: code, reason and message."""
        key = chain = None
        if issued is not None:
            key = self.path(issued, ".key", authority).read_bytes()
            chain = self.path(issued, ".crt", authority).read_bytes()
        trusted = (self.certificates / "ca.crt").read_bytes()
        credentials = grpc.ssl_channel_credentials(trusted, key, chain)
        options = [
            ("grpc.ssl_target_name_override", name_of("gateway", "a")),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        with grpc.secure_channel(self.address, credentials, options) as channel:
            make: Any = channel.unary_stream if MESH[path].streams else channel.unary_unary
            try:
                answer = make(path)(request, timeout=5, metadata=metadata)
                if MESH[path].streams:
                    next(answer, None)
            except grpc.RpcError as error:
                return _outcome(error)
        return "OK", "", ""

    def probe(self, issued: Issued | None, authority: Authority | None = None) -> tuple[str, ...]:
        return self.call(PROBE.path, ProbeRequest().SerializeToString(), issued, authority)

    def context(self) -> ssl.SSLContext:
        """What center b's process may connect with."""
        context = ssl.create_default_context(cafile=self.certificates / "ca.crt")
        own = self.certificates / "b" / "serve.crt"
        context.load_cert_chain(own, own.with_suffix(".key"))
        return context

    def shake_hands(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        host, _, port = self.address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=5)
        return context.wrap_socket(connection, server_hostname=name_of("gateway", "a"))


@pytest.fixture(scope="module")
def door(mesh: RunningMesh, tmp_path_factory: pytest.TempPathFactory) -> Door:
    return Door(mesh, tmp_path_factory.mktemp("authority") / "certs")


@pytest.fixture
def another_authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "certs", now())
    made.init()
    return made


def test_a_service_of_the_mesh_gets_in(door: Door) -> None:
    """Or else the others show nothing."""
    assert door.probe(door.certificate("gateway", "b"))[0] == "OK"


def test_without_a_good_certificate_there_is_no_connection(
    door: Door, another_authority: Authority
) -> None:
    foreign = another_authority.issue("b", "gateway", [name_of("gateway", "b")])
    refused = [
        door.probe(None),
        door.probe(foreign, another_authority),
        door.probe(door.certificate("gateway", "b", days_from_now=-91)),
        door.probe(door.certificate("gateway", "b", days_from_now=2)),
    ]
    for code, reason, message in refused:
        assert (code, reason) == ("UNAVAILABLE", "")
        assert "failed to connect" in message


def test_a_revoked_certificate_may_call_nothing(door: Door) -> None:
    revoked = Authority(door.certificates, now()).issue("b", "spare", [name_of("gateway", "b")])
    shutil.copytree(door.certificates / "b", door.authority.directory / "b", dirs_exist_ok=True)
    assert door.probe(revoked)[0] == "OK"
    door.mesh.cli.json("certs", "revoke", f"{revoked.serial:x}")
    wait_until(lambda: door.probe(revoked)[:2] == ("PERMISSION_DENIED", "ROLE"))
    assert door.probe(door.certificate("gateway", "b"))[0] == "OK"


def test_a_center_that_does_not_belong_here_may_call_nothing(door: Door) -> None:
    """Or no more, although its certificates are still good."""
    for role in ("gateway", "account", "session", "transfer"):
        retired = door.certificate(role, "z")
        assert door.probe(retired)[:2] == ("PERMISSION_DENIED", "ROLE")
    assert door.probe(door.certificate("gateway", "b"))[0] == "OK"


def test_a_center_speaks_for_itself_alone(door: Door) -> None:
    own = {role: door.certificate(role, "b") for role in ("account", "session", "transfer")}
    share = peer_method("session", "ShareFailures")
    for claimed, expected in (("b", ("OK", "")), ("a", MISMATCH), ("c", MISMATCH), ("", MISMATCH)):
        request = ShareFailuresRequest(center=claimed).SerializeToString()
        assert door.call(share.path, request, own["session"])[:2] == expected
        for role in ("account", "session", "transfer"):
            for name, message in (("Exchange", ExchangeRequest), ("Seal", SealRequest)):
                request = message(center=claimed).SerializeToString()
                refused = door.call(peer_method(role, name).path, request, own[role])
                assert (refused[:2] == MISMATCH) is (expected == MISMATCH)


MISMATCH = ("PERMISSION_DENIED", "ORIGIN_MISMATCH")


@pytest.mark.parametrize("path", MESH)
def test_each_role_may_call_what_is_declared_and_no_other(door: Door, path: str) -> None:
    """Whatever it claims in metadata: users' names and other services' are taken from gateways only."""
    claims = (("duohuo-account", "u000-" + "0" * 32), ("duohuo-caller", "a gateway"))
    for role in ("client", "gateway", "account", "session", "transfer"):
        certificate = door.certificate(role, "b")
        outcome = door.call(path, b"", certificate, metadata=claims)
        is_refused = outcome[:2] == ("PERMISSION_DENIED", "ROLE")
        assert is_refused is (role not in MESH[path].callers), f"{role}: {outcome}"


def test_a_certificate_that_names_no_center_may_call_nothing(door: Door) -> None:
    for names in (["gateway.example.net"], [name_of("gateway", "a"), name_of("gateway", "b")]):
        issued = door.authority.issue("b", "odd", names)
        assert door.probe(issued)[:2] == ("PERMISSION_DENIED", "ROLE")


def test_a_caller_notices_that_it_reaches_another_than_it_meant(door: Door) -> None:
    context = door.context()
    host, _, port = door.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as connection,
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        context.wrap_socket(connection, server_hostname=name_of("gateway", "b"))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
def test_old_TLS_is_not_spoken(door: Door) -> None:
    with door.shake_hands(door.context()) as connection:
        assert connection.version() == "TLSv1.3"
    old = door.context()
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|EOF"):
        door.shake_hands(old)


def test_nothing_but_HTTP_2_over_TLS_is_spoken(door: Door) -> None:
    with grpc.insecure_channel(door.address) as channel:
        plain: Any = channel.unary_unary(PROBE.path)
        with pytest.raises(grpc.RpcError) as refused:
            plain(b"", timeout=5)
    assert _outcome(refused.value)[:2] == ("UNAVAILABLE", "")
    context = door.context()
    context.set_alpn_protocols(["http/1.1"])
    with door.shake_hands(context) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not _read_all(connection).startswith(b"HTTP/1.1 2")


def _read_all(connection: ssl.SSLSocket) -> bytes:
    parts = b""
    try:
        while part := connection.recv(4096):
            parts += part
    except (ConnectionError, ssl.SSLError):
        pass
    return parts
