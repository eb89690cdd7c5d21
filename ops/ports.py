"""Which port everything of a local mesh listens on: plain arithmetic, so that people can foresee it.

Center number i (from 0) owns the hundred ports from `port_base + 100 * (i + 1)`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HOST = "127.0.0.1"
CENTERS_MAX = 16
ROLES = ("gateway", "account", "session", "transfer")
PORT_MAX = 65_535
_CENTER_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class CenterPorts:
    """The ports of one center. Links are this center's way out to the named peer."""

    gateway: int
    operator: int
    nats: int
    nats_leaf: int
    nats_monitor: int
    mesh: dict[str, int]
    """Of each role when every role has its own process; the gateway's when they share one."""
    grpc_links: dict[str, int]
    nats_links: dict[str, int]


@dataclass(frozen=True, slots=True)
class PortPlan:
    """The ports of a whole mesh."""

    console: int
    supervisor: int
    centers: dict[str, CenterPorts]

    def listening(self, *, split: bool) -> Iterator[tuple[int, str]]:
        """Every port that the mesh takes, and what for."""
        yield self.supervisor, "the supervisor"
        for name, ports in self.centers.items():
            yield ports.gateway, f"the gateway of center {name}"
            yield ports.operator, f"the operator service of center {name}"
            yield ports.nats, f"NATS of center {name}"
            yield ports.nats_leaf, f"NATS of center {name}, for other centers"
            yield ports.nats_monitor, f"NATS of center {name}, monitoring"
            for role in ROLES if split else ROLES[:1]:
                yield ports.mesh[role], f"the {role} of center {name}, for other centers"
            for peer in ports.grpc_links:
                yield ports.grpc_links[peer], f"the link from {name} to {peer}"
                yield ports.nats_links[peer], f"the NATS link from {name} to {peer}"


def address(port: int) -> str:
    """host:port of a local port."""
    return f"{HOST}:{port}"


def plan(centers: Sequence[str], port_base: int) -> PortPlan:
    """The port plan of these centers. Raises ValueError with a sentence for people."""
    if not 1 <= len(centers) <= CENTERS_MAX:
        raise ValueError(f"a mesh has 1 to {CENTERS_MAX} centers, not {len(centers)}")
    for name in centers:
        if not _CENTER_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a center's name: it must be 1 to 16 lower-case letters and digits, "
                "a letter first"
            )
    if len(set(centers)) < len(centers):
        raise ValueError(f"every center needs its own name, unlike {','.join(centers)}")
    highest = PORT_MAX - 100 * (len(centers) + 1) + 1
    if not 1024 <= port_base <= highest:
        raise ValueError(f"--port-base must be from 1024 to {highest}, not {port_base}")
    return PortPlan(
        console=port_base + 80,
        supervisor=port_base + 81,
        centers={
            name: _center(port_base + 100 * (number + 1), number, centers)
            for number, name in enumerate(centers)
        },
    )


def _center(block: int, number: int, centers: Sequence[str]) -> CenterPorts:
    peers = [(j, peer) for j, peer in enumerate(centers) if j != number]
    return CenterPorts(
        gateway=block,
        operator=block + 1,
        nats=block + 3,
        nats_leaf=block + 4,
        nats_monitor=block + 5,
        mesh=dict(zip(ROLES, (block + 2, block + 6, block + 7, block + 8), strict=True)),
        grpc_links={peer: block + 20 + j for j, peer in peers},
        nats_links={peer: block + 40 + j for j, peer in peers},
    )
