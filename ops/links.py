"""The long-distance network between the centers of a local mesh: TCP links to cut, heal and slow down.

Every center dials its peers through its own local ports. Behind each is a `Link`, which copies bytes
to the peer's real port. What is on its way in one direction of a connection is bounded: a full
link stops reading, so back-pressure reaches the sender as it would on a real line.
"""

import asyncio
import socket
import struct
from collections import deque

from ops.mesh_file import LinkView, link_name
from ops.ports import HOST, PortPlan

IN_FLIGHT_BYTES_MAX = 1024 * 1024
DELAY_MS_MAX = 60_000
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def checked_delay_ms(delay_ms: object) -> int:
    """The delay, if it is one. Raises ValueError."""
    if type(delay_ms) is not int or not 0 <= delay_ms <= DELAY_MS_MAX:
        raise ValueError(f"a delay must be 0 to {DELAY_MS_MAX} milliseconds, not {delay_ms}")
    return delay_ms


class Link:
    """One local port that leads to another one."""

    def __init__(self, listen_port: int, target_port: int, delay_ms: int = 0) -> None:
        self.delay_ms = delay_ms
        self.is_cut = False
        self._listen_port = listen_port
        self._target_port = target_port
        self._ends: set[_End] = set()
        self._dials: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Starts to listen. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self), HOST, self._listen_port)

    def cut(self) -> None:
        """Resets every connection, and every new one, until the link is healed."""
        self.is_cut = True
        self._reset()

    def heal(self) -> None:
        """Lets connections through again."""
        self.is_cut = False

    async def close(self) -> None:
        """Stops listening and resets every connection."""
        if self._server is not None:
            self._server.close()
        self._reset()
        for dial in self._dials:
            dial.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)

    def _reset(self) -> None:
        for end in self._ends:
            end.reset()

    def accepted(self, end: "_End") -> None:
        """Takes in one end of a connection; dials the other if it is the caller's."""
        self._ends.add(end)
        if self.is_cut:
            end.reset()
        elif end.other is None:
            end.transport.pause_reading()
            dial = asyncio.get_running_loop().create_task(self._dial(end))
            self._dials.add(dial)
            dial.add_done_callback(self._dials.discard)

    def lost(self, end: "_End") -> None:
        """Forgets an end."""
        self._ends.discard(end)

    async def _dial(self, caller: "_End") -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _End(self, caller), HOST, self._target_port)
        except OSError:
            caller.reset()


class _End(asyncio.Protocol):
    """One of the two sockets of a connection. Holds what it has received until it is due at the other."""

    transport: asyncio.Transport

    def __init__(self, link: Link, other: "_End | None" = None) -> None:
        self.other = other
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._held: deque[tuple[float, bytes | None]] = deque()
        self._held_bytes = 0
        self._other_is_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP makes no other
        self.transport = transport
        self._link.accepted(self)
        if self.other is not None:
            if self.other.transport.is_closing():
                self.reset()
            self.other.other = self
            self.other.throttle()

    def data_received(self, data: bytes) -> None:
        self._send_later(data)
        self.throttle()

    def connection_lost(self, _error: Exception | None) -> None:
        self._link.lost(self)
        if self.other is not None:
            self._send_later(None)

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other._other_is_full = True  # noqa: SLF001 - both are of this class
            self.other.throttle()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other._other_is_full = False  # noqa: SLF001 - both are of this class
            self.other.throttle()

    def reset(self) -> None:
        """Breaks the connection, so that whoever is there notices at once."""
        opened: socket.socket = self.transport.get_extra_info("socket")
        if not self.transport.is_closing():
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.transport.abort()

    def throttle(self) -> None:
        """Reads on only while there is room for more."""
        if self.transport.is_closing():
            return
        if self._other_is_full or self._held_bytes >= IN_FLIGHT_BYTES_MAX:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def _send_later(self, data: bytes | None) -> None:
        """Passes data on when it is due, in order; None is the end of the connection."""
        due = self._loop.time() + self._link.delay_ms / 1000
        if not self._held and (self._link.delay_ms == 0 or self._link.is_cut):
            self._send(data)
            return
        if self._held:
            due = max(due, self._held[-1][0])
        else:
            self._loop.call_at(due, self._release)
        self._held.append((due, data))
        self._held_bytes += len(data or b"")

    def _release(self) -> None:
        now = self._loop.time()
        while self._held and self._held[0][0] <= now:
            _, data = self._held.popleft()
            self._held_bytes -= len(data or b"")
            self._send(data)
        if self._held:
            self._loop.call_at(self._held[0][0], self._release)
        self.throttle()

    def _send(self, data: bytes | None) -> None:
        if self.other is None or self.other.transport.is_closing():
            return
        if data is None:
            self.other.transport.close()
        else:
            self.other.transport.write(data)


class Links:
    """All links of a mesh. One between X and Y is four: each way, gRPC and NATS."""

    def __init__(self, ports: PortPlan, base_delay_ms: int) -> None:
        self._base_delay_ms = checked_delay_ms(base_delay_ms)
        self._links: dict[str, list[Link]] = {}
        for name, center in ports.centers.items():
            for peer in center.grpc_links:
                to = ports.centers[peer]
                self._links.setdefault(link_name(name, peer), []).extend(
                    (
                        Link(center.grpc_links[peer], to.mesh["gateway"], base_delay_ms),
                        Link(center.nats_links[peer], to.nats_leaf, base_delay_ms),
                    )
                )

    async def open(self) -> None:
        """Starts to listen. Raises OSError."""
        for link in self._all():
            await link.open()

    async def close(self) -> None:
        for link in self._all():
            await link.close()

    def cut(self, first: str, second: str) -> None:
        """Nothing passes between two centers, either way."""
        for link in self._between(first, second):
            link.cut()

    def heal(self, first: str, second: str) -> None:
        """Everything passes again, as slowly as the mesh was started with."""
        for link in self._between(first, second):
            link.heal()
            link.delay_ms = self._base_delay_ms

    def delay(self, first: str, second: str, delay_ms: object) -> None:
        """Everything takes this much longer, each way."""
        checked = checked_delay_ms(delay_ms)
        for link in self._between(first, second):
            link.delay_ms = checked

    def view(self) -> dict[str, LinkView]:
        """How each link is now."""
        return {
            name: LinkView("cut" if links[0].is_cut else "up", links[0].delay_ms)
            for name, links in self._links.items()
        }

    def _all(self) -> list[Link]:
        return [link for links in self._links.values() for link in links]

    def _between(self, first: str, second: str) -> list[Link]:
        name = link_name(first, second)
        if name not in self._links:
            raise ValueError(
                f"there is no link {name}; there is {', '.join(self._links) or 'none at all'}"
            )
        return self._links[name]
