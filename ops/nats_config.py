"""The configuration of one center's NATS server.

One server and one JetStream domain per center, leaf links in both directions, and one account per
peer, so that no loop can form: `EV` holds what this center publishes, `IN_<peer>` what it receives.
A center dials its peers through its own links; as seen by the peer it is the user `peer-<center>`,
which may do no more than durable sourcing needs (NATS ADR-60). The services' users may publish,
fetch, make their streams again and join what they receive to its source anew, but not delete, purge or
restore anything.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ops.ports import address


@dataclass(frozen=True, slots=True)
class NatsServer:
    """What one server must know. `links` are the local ports that lead to each peer's leaf port."""

    center: str
    client_port: int
    leaf_port: int
    monitor_port: int
    links: Mapping[str, int]
    store_dir: Path
    password: str = field(repr=False)


def render(server: NatsServer) -> str:
    """The server's configuration file. It holds the password: write it for the owner only."""
    center = server.center
    leaf_users = "\n      ".join(
        _user(f"peer-{peer}", server.password, "LEAFNODE", _leaf_permissions(center, peer))
        for peer in server.links
    )
    received = "\n  ".join(
        f"IN_{peer} {{ jetstream: enabled, users: [ "
        f"{_user(f'in-{peer}', server.password, 'STANDARD', _in_permissions(center, peer))} ] }}"
        for peer in server.links
    )
    remotes = "\n    ".join(
        f'{{ url: "nats://peer-{center}:{server.password}@{address(port)}", account: IN_{peer} }}'
        for peer, port in server.links.items()
    )
    return f"""\
server_name: {center}
listen: {address(server.client_port)}
http: {address(server.monitor_port)}
ping_interval: "2s"
ping_max: 2
max_payload: 1MB
reconnect_error_reports: 60
jetstream {{ store_dir: {json.dumps(str(server.store_dir), ensure_ascii=False)}, domain: {center} }}
accounts {{
  EV {{ jetstream: enabled, users: [
      {_user("ev", server.password, "STANDARD", _ev_permissions(center))}
      {leaf_users}
  ] }}
  {received}
  SYS {{ users: [ {_user("sys", server.password, "STANDARD")} ] }}
}}
system_account: SYS
leafnodes {{
  listen: {address(server.leaf_port)}
  reconnect: "1s"
  no_advertise: true
  remotes: [
    {remotes}
  ]
}}
"""


def _user(name: str, password: str, connection: str, *permissions: str) -> str:
    """A user. All have one password: the connection type keeps a peer from being any other user."""
    parts = [
        f"user: {json.dumps(name)}",
        f"password: {json.dumps(password)}",
        f'allowed_connection_types: ["{connection}"]',
        *permissions,
    ]
    return "{ " + ", ".join(parts) + " }"


def _ev_permissions(center: str) -> str:
    stream = f"OUT_{center}"
    return _permissions([f"ev.{center}.>", *_stream_api(stream)], ["_INBOX.>"])


def _in_permissions(center: str, peer: str) -> str:
    stream = f"IN_{peer}"
    return _permissions(
        [
            *_stream_api(stream),
            f"$JS.API.STREAM.UPDATE.{stream}",
            f"$JS.{peer}.API.CONSUMER.RESET.OUT_{peer}.to-{center}",
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
            f"$JS.ACK.{stream}.>",
            f"$JS.ACK.*.*.{stream}.>",
        ],
        ["_INBOX.>"],
    )


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
    return [
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.CREATE.{stream}",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.*",
    ]


def _permissions(publish: Iterable[str], subscribe: Iterable[str]) -> str:
    return (
        f"permissions: {{ publish: {{ allow: {json.dumps(list(publish))} }}, "
        f"subscribe: {{ allow: {json.dumps(list(subscribe))} }} }}"
    )
