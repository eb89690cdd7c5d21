"""The configuration of one center's NATS server.

One server and one JetStream domain per center, leaf links in both directions, and one account per
peer, so that no loop can form: `EV` holds what this center publishes, `IN_<peer>` what it receives.
Everybody shows a certificate of the mesh. A process logs in to an account as a user of its own, with its
password; it may publish, fetch, make the streams again and join what they receive to its source anew, for
its own roles, but not delete, purge or restore anything. A center dials its peers through its own links;
the peer knows it by the name in its certificate, and lets it do no more than durable sourcing needs (NATS
ADR-60).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ops.ports import address
from runtime.identity import name_of
from sync_bus.jetstream import user_of


@dataclass(frozen=True, slots=True)
class NatsClient:
    """A process of the center that uses the server: which roles it serves, and its password."""

    roles: Sequence[str]
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NatsServer:
    """What one server must know. `links` are the local ports that lead to each peer's leaf port."""

    center: str
    client_port: int
    leaf_port: int
    monitor_port: int
    links: Mapping[str, int]
    store_dir: Path
    certificate_files: tuple[Path, Path, Path]
    """Its certificate, its key, and whom it trusts."""
    clients: Sequence[NatsClient]


def render(server: NatsServer) -> str:
    """The server's configuration file. It holds passwords: write it for the owner only."""
    center, peers = server.center, list(server.links)
    users = [
        *(_client("EV", one, _ev_permissions(center, one.roles, peers)) for one in server.clients),
        *(_leaf(peer, _leaf_permissions(center, peer)) for peer in peers),
    ]
    received = "\n  ".join(
        _account(
            f"IN_{peer}",
            [
                _client(f"IN_{peer}", one, _in_permissions(center, peer, one.roles))
                for one in server.clients
            ],
        )
        for peer in peers
    )
    certificate, key, authorities = map(_text, server.certificate_files)
    tls = (
        f"cert_file: {certificate}, key_file: {key}, ca_file: {authorities}, handshake_first: true"
    )
    remotes = "\n    ".join(
        f'{{ url: "tls://{address(port)}", account: IN_{peer}, tls {{ {tls} }} }}'
        for peer, port in server.links.items()
    )
    return f"""\
server_name: {center}
listen: {address(server.client_port)}
http: {address(server.monitor_port)}
tls {{ {tls}, verify: true, timeout: {TLS_TIMEOUT_S} }}
ping_interval: "2s"
ping_max: 2
max_payload: 1MB
reconnect_error_reports: 60
jetstream {{ store_dir: {_text(server.store_dir)}, domain: {center} }}
accounts {{
  {_account("EV", users)}
  {received}
  SYS {{}}
}}
system_account: SYS
leafnodes {{
  listen: {address(server.leaf_port)}
  tls {{ {tls}, verify_and_map: true, timeout: {TLS_TIMEOUT_S} }}
  reconnect: "1s"
  no_advertise: true
  remotes: [
    {remotes}
  ]
}}
"""


TLS_TIMEOUT_S = 5


def _text(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _account(name: str, users: Sequence[str]) -> str:
    listed = "".join(f"\n      {user}" for user in users)
    return f"{name} {{ jetstream: enabled, users: [{listed}\n  ] }}"


def _client(account: str, client: NatsClient, permissions: str) -> str:
    return (
        f"{{ user: {json.dumps(user_of(account, client.roles))}, "
        f"password: {json.dumps(client.password)}, "
        f'allowed_connection_types: ["STANDARD"], {permissions} }}'
    )


def _leaf(peer: str, permissions: str) -> str:
    """A peer's server. Its certificate has to say so: there is no password, and no other way in."""
    return (
        f"{{ user: {json.dumps(name_of('nats', peer))}, "
        f'allowed_connection_types: ["LEAFNODE"], {permissions} }}'
    )


def _ev_permissions(center: str, roles: Sequence[str], peers: Sequence[str]) -> str:
    stream = f"OUT_{center}"
    return _permissions(
        [
            *(f"ev.{center}.{role}.>" for role in roles),
            *_stream_api(stream),
            f"$JS.API.STREAM.MSG.GET.{stream}",
            *(_consumer_api("INFO", stream, f"to-{peer}") for peer in peers),
            *(_consumer_api("CREATE", stream, f"to-{peer}") for peer in peers),
        ],
        ["_INBOX.>"],
    )


def _in_permissions(center: str, peer: str, roles: Sequence[str]) -> str:
    stream = f"IN_{peer}"
    publish = [
        *_stream_api(stream),
        f"$JS.API.STREAM.UPDATE.{stream}",
        f"$JS.{peer}.API.CONSUMER.RESET.OUT_{peer}.to-{center}",
    ]
    for role in roles:
        consumer = f"apply-{role}"
        publish += [
            _consumer_api("INFO", stream, consumer),
            f"{_consumer_api('CREATE', stream, consumer)}.ev.{peer}.{role}.>",
            _consumer_api("MSG.NEXT", stream, consumer),
            f"$JS.ACK.{stream}.{consumer}.>",
            f"$JS.ACK.*.*.{stream}.{consumer}.>",
        ]
    return _permissions(publish, ["_INBOX.>"])


def _leaf_permissions(center: str, peer: str) -> str:
    stream, consumer = f"OUT_{center}", f"to-{peer}"
    return _permissions(
        [
            f"$JS.{center}.API.CONSUMER.RESET.{stream}.{consumer}",
            f"$JS.FC.{stream}.{consumer}.>",
            f"$JS.FC.*.*.{stream}.{consumer}.>",
        ],
        [f"deliver.{center}.{peer}", "$JSC.R.>"],
    )


def _stream_api(stream: str) -> list[str]:
    return [f"$JS.API.STREAM.INFO.{stream}", f"$JS.API.STREAM.CREATE.{stream}"]


def _consumer_api(action: str, stream: str, consumer: str) -> str:
    return f"$JS.API.CONSUMER.{action}.{stream}.{consumer}"


def _permissions(publish: Iterable[str], subscribe: Iterable[str]) -> str:
    return (
        f"permissions: {{ publish: {{ allow: {json.dumps(list(publish))} }}, "
        f"subscribe: {{ allow: {json.dumps(list(subscribe))} }} }}"
    )
