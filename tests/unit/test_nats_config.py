"""The NATS configuration says who may do what, and nats-server itself accepts it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ops.authority import Authority, now
from ops.nats_config import NatsClient, NatsServer, render

FILES = (Path("/nowhere/nats.crt"), Path("/nowhere/nats.key"), Path("/nowhere/ca.crt"))
ALL_IN_ONE = [NatsClient(["account", "session", "transfer"], "c0ffee")]
EACH_ITS_OWN = [NatsClient([role], f"c0ffee-{role}") for role in ("account", "session")]


def server(
    *peers: str,
    clients: list[NatsClient] = ALL_IN_ONE,
    store_dir: Path = Path("/nowhere/nats"),
    files: tuple[Path, Path, Path] = FILES,
) -> NatsServer:
    return NatsServer(
        center="a",
        client_port=7103,
        leaf_port=7104,
        monitor_port=7105,
        links={peer: 7141 + number for number, peer in enumerate(peers)},
        store_dir=store_dir,
        certificate_files=files,
        clients=clients,
    )


def users(text: str) -> dict[str, str]:
    """The line of each user."""
    return dict(re.findall(r'\{ user: "([^"]+)", (.+)', text))


def test_each_peer_has_an_account_and_is_dialled_through_its_link() -> None:
    text = render(server("b", "c"))
    assert "domain: a }" in text
    for peer, port in (("b", 7141), ("c", 7142)):
        assert f"IN_{peer} {{ jetstream: enabled" in text
        assert f'url: "tls://127.0.0.1:{port}", account: IN_{peer}, tls {{' in text
        leaf = users(text)[f"nats.{peer}.duohuo.internal"]
        assert leaf.startswith('allowed_connection_types: ["LEAFNODE"]')
        assert f'"deliver.a.{peer}"' in leaf


def test_nobody_gets_in_without_a_certificate_or_in_clear() -> None:
    text = render(server("b"))
    client, leaf = re.findall(r"^ *tls \{ (.+) \}$", text, re.MULTILINE)
    assert "verify: true" in client
    assert "verify_and_map: true" in leaf
    assert text.count("tls {") == text.count("handshake_first: true") == 3
    for name, line in users(text).items():
        # Who has no password is known by a certificate, and on the port for that alone.
        assert ("password" in line) is ('["STANDARD"]' in line) is not name.startswith("nats.")


def test_a_process_publishes_and_takes_what_is_its_own_alone() -> None:
    found = users(render(server("b", clients=EACH_ITS_OWN)))
    assert found.keys() == {
        *(f"{account}-{role}" for account in ("ev", "in-b") for role in ("account", "session")),
        "nats.b.duohuo.internal",
    }
    for role, other in (("account", "session"), ("session", "account")):
        for line in (found[f"ev-{role}"], found[f"in-b-{role}"]):
            assert f'"c0ffee-{role}"' in line
            assert other not in line
        assert f'"ev.a.{role}.>"' in found[f"ev-{role}"]
        assert f"IN_b.apply-{role}" in found[f"in-b-{role}"]
    together = users(render(server("b")))
    for role in ("account", "session", "transfer"):
        assert f'"ev.a.{role}.>"' in together["ev-account-session-transfer"]


def test_nothing_listens_beyond_this_machine() -> None:
    listening = [line for line in render(server("b")).splitlines() if "listen:" in line]
    assert len(listening) == 2
    assert all("127.0.0.1:" in line for line in listening)
    assert "http: 127.0.0.1:7105" in render(server("b"))


def test_no_user_of_a_service_may_destroy_anything() -> None:
    text = render(server("b"))
    for forbidden in ("DELETE", "PURGE", "RESTORE", "SNAPSHOT", '"$JS.API.>"', '">"'):
        assert forbidden not in text
    assert "UPDATE.IN_b" in text
    assert "UPDATE.OUT_" not in text


def test_the_password_is_not_in_the_description() -> None:
    assert "c0ffee" not in repr(server("b"))


@pytest.mark.parametrize("peers", [(), ("b",), ("b", "c", "d")], ids=["alone", "two", "four"])
@pytest.mark.parametrize("clients", [ALL_IN_ONE, EACH_ITS_OWN], ids=["together", "split"])
def test_nats_server_accepts_it(
    peers: tuple[str, ...], clients: list[NatsClient], tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "the certificates", now())
    authority.init()
    authority.ensure_center("a", {})
    own = authority.directory / "a" / "nats"
    files = own.with_suffix(".crt"), own.with_suffix(".key"), authority.authorities_file
    config = tmp_path / "nats.conf"
    store_dir = tmp_path / 'a "store" of 数据'
    text = render(server(*peers, clients=clients, store_dir=store_dir, files=files))
    config.write_text(text, encoding="utf-8")
    program = Path(sys.executable).with_name("nats-server")
    tried = subprocess.run(
        [program, "-t", "-c", config], capture_output=True, text=True, timeout=20, check=False
    )
    assert tried.returncode == 0, tried.stderr
