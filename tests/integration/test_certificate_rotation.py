"""Certificates and their authority are exchanged while users work: no restart, no failed request."""

import json
import re
import shutil
import socket
import ssl
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import TransferRequest
from ops.authority import Authority, now
from ops.drill import identifier_of
from runtime.identity import name_of
from runtime.ids import RandomIds
from tests.integration.conftest import Cli, RunningMesh, start_mesh, wait_until

TRANSFER = "/duohuo.v1.TransferService/Transfer"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[RunningMesh]:
    """One process for each role, so that all kinds of connections are there."""
    running = start_mesh(tmp_path / "mesh", "--split")
    yield running
    assert running.stop() == 0


class Customer:
    """At home in center b, a customer of gateway a: each payment crosses between centers and processes."""

    def __init__(self, mesh: RunningMesh) -> None:
        cli, payer, payee = mesh.cli, *(identifier_of(center, ["a", "b"]) for center in "ba")
        self.account, self.payee = (
            cli.json("register", one)["account_id"] for one in (payer, payee)
        )
        cli.json("login", payer, "--center", "a")
        wait_until(lambda: _sees(cli, "a", "b"))
        cli.json("fund", payer, "10000")
        logins = json.loads((cli.state / "sessions.json").read_text())["logins"]
        self.token = logins[payer]["token"]
        self.gateway = mesh.described["centers"]["a"]["gateway"]
        self.paid = 0
        self.failed: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._pay_on)

    def __enter__(self) -> "Customer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=30)

    def _pay_on(self) -> None:
        metadata = (("authorization", f"Bearer {self.token}"),)
        with grpc.insecure_channel(self.gateway) as channel:
            pay: Any = channel.unary_unary(TRANSFER)
            while not self._done.is_set():
                request = TransferRequest(
                    transfer_id=RandomIds().unique(),
                    payer_account_id=self.account,
                    payee_account_id=self.payee,
                    amount=Money(currency_code="CNY", minor_units=1),
                )
                try:
                    pay(request.SerializeToString(), timeout=10, metadata=metadata)
                except grpc.RpcError as error:
                    self.failed.append(str(error))
                else:
                    self.paid += 1

    def pays_on(self) -> None:
        """Waits for a few payments more."""
        before = self.paid
        wait_until(lambda: self.paid > before + 10 or self.failed)


def _sees(cli: Cli, center: str, peer: str) -> bool:
    peers = cli.json("status")["centers"][center]["status"]["peers"]
    return any(one["center"] == peer and one["reachable"] for one in peers)


class Listener:
    """A port where certificates are shown and asked for: a process's mesh port, NATS's two."""

    def __init__(self, state: Path, name: str, address: str) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.name = name
        self.trusted = state / "certs" / "ca.crt"

    def takes(self, certificate: Path) -> bool:
        """Does it let the owner of this certificate in?"""
        try:
            self._serial(certificate)
        except (ssl.SSLError, ConnectionError):
            return False
        return True

    def serial(self, certificate: Path) -> str:
        """Of the certificate that it shows."""
        return self._serial(certificate)

    def _serial(self, certificate: Path) -> str:
        context = ssl.create_default_context(cafile=self.trusted)
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        with (
            socket.create_connection((self.host, int(self.port)), timeout=5) as connection,
            context.wrap_socket(connection, server_hostname=self.name) as secure,
        ):
            # With TLS 1.3 a refusal of our certificate arrives only after the handshake.
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            if not secure.recv(1):
                raise ConnectionError
            shown = secure.getpeercert()
            assert shown is not None
            return str(shown["serialNumber"])


def _listeners(state: Path) -> list[Listener]:
    found = []
    for settings in sorted(state.glob("[ab]/*.toml")):
        name = name_of(settings.stem, settings.parent.name)
        found.append(Listener(state, name, tomllib.loads(settings.read_text())["mesh_listen"]))
    for conf in sorted(state.glob("[ab]/nats.conf")):
        name = name_of("nats", conf.parent.name)
        addresses = re.findall(r"^ *listen: (\S+)$", conf.read_text(), re.MULTILINE)
        found += [Listener(state, name, address) for address in addresses]
    return found


def _by_jetstream(mesh: RunningMesh) -> dict[str, int]:
    """How many entries have come to each center that way."""
    return {
        name: sum(int(road["from_jetstream"]) for road in center["status"]["roads"])
        for name, center in mesh.cli.json("status")["centers"].items()
    }


def _jetstream_goes_on(mesh: RunningMesh) -> None:
    before = _by_jetstream(mesh)
    wait_until(lambda: all(_by_jetstream(mesh)[name] > count for name, count in before.items()))


def test_the_authority_is_exchanged_without_a_failed_request(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    cli, certificates = mesh.cli, mesh.cli.state / "certs"
    listeners = _listeners(cli.state)
    assert len(listeners) == 8 + 4
    pids = mesh.pids()
    before = tmp_path / "before"
    shutil.copytree(certificates, before)
    old = before / "b" / "gateway.crt"
    assert all(one.takes(old) for one in listeners)

    with Customer(mesh) as customer:
        customer.pays_on()
        assert cli.json("certs", "rotate-ca")["step"] == "trust"
        successor = tmp_path / "successor"
        shutil.copytree(certificates, successor)
        for suffix in ("crt", "key"):
            shutil.copy(successor / f"next.{suffix}", successor / f"ca.{suffix}")
        Authority(successor, now()).renew(everything=True)
        early = successor / "b" / "gateway.crt"
        wait_until(lambda: all(one.takes(early) for one in listeners))
        customer.pays_on()

        assert cli.json("certs", "rotate-ca")["step"] == "issue"
        issued = cli.json("certs", "show")["certificates"]
        assert len({one["serial"] for one in issued}) == 8 + 2
        serials = {one["serial"].upper().zfill(40) for one in issued}
        wait_until(lambda: {one.serial(early).zfill(40) for one in listeners} == serials)
        customer.pays_on()

        assert cli.json("certs", "rotate-ca")["step"] == "retire"
        wait_until(lambda: not any(one.takes(old) for one in listeners))
        customer.pays_on()
        _jetstream_goes_on(mesh)

        cli.json("certs", "renew", "--all")
        renewed = {
            one["serial"].upper().zfill(40) for one in cli.json("certs", "show")["certificates"]
        }
        assert not renewed & serials
        wait_until(lambda: {one.serial(early).zfill(40) for one in listeners} == renewed)
        customer.pays_on()
    assert not customer.failed
    assert mesh.pids() == pids
    # What connects from now on does so with nothing that the old authority has signed.
    cli.json("center", "stop", "b")
    cli.json("center", "start", "b")
    wait_until(lambda: _sees(cli, "a", "b"))
    with Customer(mesh) as another:
        another.pays_on()
        _jetstream_goes_on(mesh)
    assert not another.failed
    assert cli.json("verify")["passed"]
