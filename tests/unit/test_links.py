"""Links carry bytes in order, can be cut, healed and slowed down, and never hold more than a bound."""

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ops.links import IN_FLIGHT_BYTES_MAX, Link, Links
from ops.ports import ROLES, plan

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def linked(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = echo,
    delay_ms: int = 0,
) -> AsyncIterator[tuple[Link, Callable[[], Awaitable[Streams]]]]:
    """A link to a server, and a way to dial through it."""
    target = await asyncio.start_server(serve, "127.0.0.1", 0)
    listen_port = free_port()
    link = Link(listen_port, target.sockets[0].getsockname()[1], delay_ms)
    await link.open()
    writers: list[asyncio.StreamWriter] = []

    async def dial() -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", listen_port)
        writers.append(writer)
        return reader, writer

    try:
        yield link, dial
    finally:
        await link.close()
        target.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def ping(streams: Streams, payload: bytes = b"ping") -> float:
    """Seconds until the payload is back."""
    reader, writer = streams
    started = time.monotonic()
    writer.write(payload)
    async with asyncio.timeout(5):
        assert await reader.readexactly(len(payload)) == payload
    return time.monotonic() - started


async def assert_refused(dial: Callable[[], Awaitable[Streams]]) -> None:
    try:
        reader, writer = await dial()
        writer.write(b"hello")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
    except ConnectionError:
        pass


async def test_bytes_pass_in_order_both_ways() -> None:
    async with linked() as (_, dial):
        payload = bytes(itertools.islice(itertools.cycle(range(251)), 3_000_000))
        reader, writer = await dial()
        writer.write(payload)
        async with asyncio.timeout(10):
            assert await reader.readexactly(len(payload)) == payload


async def test_the_end_of_one_side_reaches_the_other() -> None:
    async def say_goodbye(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")
        writer.close()

    async with linked(say_goodbye, delay_ms=20) as (_, dial):
        reader, _writer = await dial()
        async with asyncio.timeout(5):
            assert await reader.read() == b"goodbye"


async def test_a_cut_breaks_connections_and_refuses_new_ones_until_healed() -> None:
    async with linked() as (link, dial):
        streams = await dial()
        await ping(streams)
        link.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await ping(streams)
        await assert_refused(dial)
        link.heal()
        await ping(await dial())


async def test_nothing_that_was_on_its_way_survives_a_cut() -> None:
    received: list[bytes] = []

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received.append(await reader.read())
        except ConnectionError:
            received.append(b"")
        writer.close()

    async with linked(keep, delay_ms=100) as (link, dial):
        _, writer = await dial()
        writer.write(b"too late")
        await asyncio.sleep(0)
        link.cut()
        async with asyncio.timeout(5):
            while not received:  # noqa: ASYNC110 - the deadline bounds it
                await asyncio.sleep(0.005)
        assert received == [b""]


async def test_a_peer_that_is_not_there_breaks_the_connection() -> None:
    listen_port, nobody = free_port(), free_port()
    link = Link(listen_port, nobody)
    await link.open()

    async def dial() -> Streams:
        return await asyncio.open_connection("127.0.0.1", listen_port)

    await assert_refused(dial)
    await link.close()


async def test_delay_is_added_each_way_and_changes_open_connections() -> None:
    async with linked() as (link, dial):
        streams = await dial()
        assert await ping(streams) < 0.5
        link.delay_ms = 250
        assert await ping(streams) >= 0.5
        link.delay_ms = 0
        assert await ping(streams) < 0.5


async def test_a_shorter_delay_does_not_overtake() -> None:
    async with linked(delay_ms=80) as (link, dial):
        reader, writer = await dial()
        await ping((reader, writer))
        for number in range(8):
            link.delay_ms = 80 - 10 * number
            writer.write(bytes([number]))
            await asyncio.sleep(0.002)
        async with asyncio.timeout(5):
            assert await reader.readexactly(8) == bytes(range(8))


async def test_a_link_that_nobody_empties_stops_reading() -> None:
    sleeping = asyncio.Event()

    async def never_read(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await sleeping.wait()
        writer.close()

    async with linked(never_read, delay_ms=1) as (_, dial):
        _, writer = await dial()
        chunk, taken = bytes(1024 * 1024), 0
        # Socket buffers take some megabytes as well; without a bound all of it would be taken.
        for _ in range(64):
            writer.write(chunk)
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                break
            taken += len(chunk)
        assert taken < 32 * IN_FLIGHT_BYTES_MAX
        sleeping.set()


async def test_a_slow_link_does_not_limit_throughput_below_its_bound() -> None:
    async with linked(delay_ms=20) as (_, dial):
        streams = await dial()
        took_s = await ping(streams, bytes(4_000_000))
        assert took_s < 2.0


class TestLinks:
    async def test_one_link_is_every_way_between_two_centers(self) -> None:
        links = Links(plan(["a", "b", "c"], 7000), base_delay_ms=5)
        assert list(links.view()) == ["a-b", "a-c", "b-c"]
        links.cut("b", "a")
        links.delay("c", "b", 40)
        assert {name: (view.state, view.delay_ms) for name, view in links.view().items()} == {
            "a-b": ("cut", 5),
            "a-c": ("up", 5),
            "b-c": ("up", 40),
        }
        links.heal("a", "b")
        links.heal("b", "c")
        assert all((view.state, view.delay_ms) == ("up", 5) for view in links.view().values())

    @pytest.mark.parametrize("delay_ms", [-1, 60_001, "20", None, 1.5, True])
    async def test_a_delay_has_bounds(self, delay_ms: object) -> None:
        links = Links(plan(["a", "b"], 7000), base_delay_ms=0)
        with pytest.raises(ValueError, match="a delay must be"):
            links.delay("a", "b", delay_ms)

    async def test_a_link_that_does_not_exist_is_named(self) -> None:
        links = Links(plan(["a", "b"], 7000), base_delay_ms=0)
        with pytest.raises(ValueError, match="there is no link a-z; there is a-b"):
            links.cut("z", "a")


class TestPorts:
    def test_centers_have_the_ports_that_people_are_told(self) -> None:
        ports = plan(["a", "b"], 7000)
        assert (ports.console, ports.supervisor) == (7080, 7081)
        assert [center.gateway for center in ports.centers.values()] == [7100, 7200]
        assert ports.centers["b"].grpc_links == {"a": 7220}
        assert ports.centers["b"].nats_links == {"a": 7240}

    def test_no_port_is_taken_twice_in_the_largest_mesh(self) -> None:
        names = [chr(ord("a") + number) for number in range(16)]
        ports = [port for port, _ in plan(names, 7000).listening(split=True)]
        assert len(ports) == len(set(ports))
        assert len(ports) == 1 + 16 * (5 + len(ROLES) + 2 * 15)

    @pytest.mark.parametrize(
        ("centers", "port_base", "problem"),
        [
            ([], 7000, "1 to 16 centers"),
            ([f"c{number}" for number in range(17)], 7000, "1 to 16 centers"),
            (["a", "a"], 7000, "its own name"),
            (["A"], 7000, "not a center's name"),
            (["../x"], 7000, "not a center's name"),
            (["a"], 80, "--port-base must be"),
            (["a", "b"], 65_400, "--port-base must be"),
        ],
    )
    def test_impossible_plans_are_refused(
        self, centers: list[str], port_base: int, problem: str
    ) -> None:
        with pytest.raises(ValueError, match=problem):
            plan(centers, port_base)
