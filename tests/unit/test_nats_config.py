"""The NATS configuration says who may do what, and nats-server itself accepts it."""

import subprocess
import sys
from pathlib import Path

import pytest

from ops.nats_config import NatsServer, render


def server(*peers: str, store_dir: Path = Path("/nowhere/nats")) -> NatsServer:
    return NatsServer(
        center="a",
        client_port=7103,
        leaf_port=7104,
        monitor_port=7105,
        links={peer: 7141 + number for number, peer in enumerate(peers)},
        store_dir=store_dir,
        password="c0ffee",
    )


def test_each_peer_has_an_account_and_is_dialled_through_its_link() -> None:
    text = render(server("b", "c"))
    assert "domain: a }" in text
    for peer, port in (("b", 7141), ("c", 7142)):
        assert f'IN_{peer} {{ jetstream: enabled, users: [ {{ user: "in-{peer}"' in text
        assert f'url: "nats://peer-a:c0ffee@127.0.0.1:{port}", account: IN_{peer}' in text
        leaf = f'user: "peer-{peer}", password: "c0ffee", allowed_connection_types: ["LEAFNODE"]'
        assert leaf in text
        assert f'"deliver.a.{peer}"' in text


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
def test_nats_server_accepts_it(peers: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    store_dir = tmp_path / 'a "store" of 数据'
    config.write_text(render(server(*peers, store_dir=store_dir)), encoding="utf-8")
    program = Path(sys.executable).with_name("nats-server")
    tried = subprocess.run(
        [program, "-t", "-c", config], capture_output=True, text=True, timeout=20, check=False
    )
    assert tried.returncode == 0, tried.stderr
