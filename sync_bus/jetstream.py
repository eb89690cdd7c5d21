"""The fast road over NATS JetStream.

Each center has one server (or cluster) with its own JetStream domain, joined by leaf links in both
directions, with one NATS account per peer so that no loop can form: `EV` holds what this center
publishes (stream OUT_<center>), `IN_<peer>` what it receives (stream IN_<peer>, sourced from the
peer's OUT stream through a consumer made beforehand; NATS ADR-60, server 2.14 or later).

A publish acknowledgement means page cache, the deduplication window drops re-used message ids, and a
wiped stream comes back empty: so no `Nats-Msg-Id` is sent, streams and consumers are made again
whenever they are missing, and nothing is ever forgotten because JetStream has it.

Servers and clients show certificates; what a process may publish and take goes by its user (`user_of`).

A stream that was wiped or rolled back numbers its messages from further back. A server that sources it
ignores them until they pass the number reached before, and acknowledges what it has not seen. Only
joining the source anew mends that: it is done when nothing arrives although there is something (`doubt`).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import nats.errors
import nats.js.errors
import structlog
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    ExternalStream,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamConsumerSource,
    StreamSource,
)

from duohuo.internal.v1.log_pb2 import LogEntry, LogRecord
from runtime import telemetry
from runtime.credentials import Credentials
from runtime.identity import name_of
from sync_bus.bus import BusFault, Delivery

_logger = structlog.get_logger()

CONNECT_TIMEOUT_S = 5.0
FETCH_ENTRIES_MAX = 500
FETCH_TIMEOUT_S = 1.0
PROVISION_EVERY_IDLE_FETCHES = 5
PUBLISH_TIMEOUT_S = 3.0
STREAM_AGE_S_MAX = 3600
STREAM_BYTES_MAX = 256 * 1024 * 1024
_FAULTS = (nats.errors.Error, OSError, TimeoutError)


def user_of(account: str, roles: Iterable[str]) -> str:
    """The user, in a NATS account, of a process with these roles: it publishes and takes theirs alone."""
    return "-".join((account.replace("_", "-").lower(), *sorted(roles)))


@dataclass(slots=True)
class NatsAccess:
    """How a process reaches its center's NATS server. One connection per NATS account, made when needed."""

    center: str
    url: str
    roles: Sequence[str]
    """Those of this process that use the bus."""
    password: str = field(repr=False)
    credentials: Credentials
    connections: dict[str, "_Connection"] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def jetstream(self, account: str) -> JetStreamContext:
        """The JetStream of an account, the same object until certificates change. Raises BusFault."""
        async with self.lock:
            connection = self.connections.get(account)
            if connection is None or not self.is_current(connection.context):
                if connection is not None:
                    await connection.client.close()
                connection = self.connections[account] = await self._connect(account)
        if not connection.client.is_connected:
            # nats-py would keep what is published now, and send it again on top of our own retries.
            raise BusFault
        return connection.context

    def is_current(self, context: JetStreamContext) -> bool:
        """Is its connection open, and with the certificates of now?"""
        return any(
            each.context is context
            and each.generation == self.credentials.generation
            and not each.client.is_closed
            for each in self.connections.values()
        )

    async def close(self) -> None:
        for connection in self.connections.values():
            await connection.client.close()

    async def _connect(self, account: str) -> "_Connection":
        user = user_of(account, self.roles)

        async def tell(error: Exception) -> None:
            """Faults show as time-outs of what was asked; but what is not allowed shows nowhere else."""
            if isinstance(error, ssl.SSLError) or "violation" in str(error).lower():
                _logger.error("NATS does not allow this", user=user, error=str(error))

        host, _, port = self.url.removeprefix("tls://").partition(":")
        generation = self.credentials.generation
        try:
            # nats-py waits two seconds and logs when nobody listens; a plain connect knows at once.
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            context = self.credentials.for_client()
        except _FAULTS as error:
            raise BusFault from error
        client = Client()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):  # by itself it would try for ever
                await client.connect(
                    self.url,
                    tls=context,
                    tls_hostname=name_of("nats", self.center),
                    # Or else a server that asks for no TLS would be shown the password.
                    tls_handshake_first=True,
                    user=user,
                    password=self.password,
                    name=f"duohuo {self.center} {user}",
                    error_cb=tell,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type] # which a float may be
                    ping_interval=2,
                    max_outstanding_pings=2,
                )
        except _FAULTS as error:
            await client.close()
            raise BusFault from error
        # Each context subscribes to its own acknowledgements for ever: never one per use.
        return _Connection(client, client.jetstream(timeout=2), generation)


@dataclass(frozen=True, slots=True)
class _Connection:
    """`generation` is that of the certificates it was made with."""

    client: Client
    context: JetStreamContext
    generation: int


class JetStreamBus:
    """One service's use of its center's NATS server."""

    def __init__(self, access: NatsAccess, role: str, peers: Sequence[str]) -> None:
        self._access = access
        self._center = access.center
        self._role = role
        self._peers = peers
        self._doubted: set[str] = set()

    async def last_published(self, topic: str) -> LogEntry | None:
        jetstream = await self._access.jetstream("EV")
        try:
            await self._provision_out(jetstream)
            last = await jetstream.get_last_msg(f"OUT_{self._center}", self._subject(topic))
        except nats.js.errors.NotFoundError:
            return None
        except _FAULTS as error:
            raise BusFault from error
        with suppress(DecodeError):
            return LogEntry.FromString(last.data or b"")
        return None

    async def publish(self, topic: str, entries: Sequence[LogEntry]) -> None:
        jetstream = await self._access.jetstream("EV")
        subject = self._subject(topic)
        acknowledged: list[asyncio.Future[object]] = []
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                for entry in entries:
                    future = await self._publish_one(jetstream, subject, entry)
                    acknowledged.append(future)
                await asyncio.gather(*acknowledged)
        except _FAULTS as error:
            raise BusFault from error
        finally:
            for future in acknowledged:  # those still open hold slots that nats-py has few of
                future.cancel()

    async def deliveries(self, source: str) -> AsyncIterator[Delivery]:
        jetstream = await self._access.jetstream(f"IN_{source}")
        try:
            await self._provision_in(jetstream, source)
            subscription = await jetstream.pull_subscribe_bind(
                consumer=f"apply-{self._role}", stream=f"IN_{source}"
            )
        except _FAULTS as error:
            raise BusFault from error
        try:
            idle_fetches = 0
            while self._access.is_current(jetstream):
                try:
                    messages = await subscription.fetch(FETCH_ENTRIES_MAX, timeout=FETCH_TIMEOUT_S)
                except TimeoutError:  # nats-py's own subclass or, on some ways out, the plain one
                    idle_fetches += 1
                    if idle_fetches % PROVISION_EVERY_IDLE_FETCHES == 0:
                        if source in self._doubted:
                            await self._leave_source(jetstream, source)
                        self._doubted.discard(source)
                        await self._provision_in(jetstream, source)
                    continue
                idle_fetches = 0
                self._doubted.discard(source)
                if messages:
                    yield _delivery(messages)
            raise BusFault
        except _FAULTS as error:
            raise BusFault from error
        finally:
            # A forgotten subscription would go on taking messages that nobody applies.
            with suppress(*_FAULTS):
                await subscription.unsubscribe()

    def doubt(self, source: str) -> None:
        self._doubted.add(source)

    def _subject(self, topic: str) -> str:
        return f"ev.{self._center}.{self._role}.{topic}"

    async def _publish_one(
        self, jetstream: JetStreamContext, subject: str, entry: LogEntry
    ) -> "asyncio.Future[object]":
        traceparent = ""
        with suppress(DecodeError):  # the receivers' matter: they park it, and go on
            traceparent = LogRecord.FromString(entry.record).traceparent
        with telemetry.span(
            f"publish {entry.topic}",
            {
                "messaging.system": "nats",
                "messaging.operation.type": "send",
                "messaging.destination.name": subject,
                "duohuo.role": self._role,
                "duohuo.seq": entry.seq,
            },
            telemetry.SpanKind.PRODUCER,
            parent=traceparent or None,
        ):
            headers = {telemetry.TRACEPARENT: telemetry.traceparent() or traceparent}
            future: asyncio.Future[object] = await jetstream.publish_async(  # type: ignore[assignment]
                subject, entry.SerializeToString(), headers=headers if traceparent else None
            )
        return future

    async def _provision_out(self, jetstream: JetStreamContext) -> None:
        name = f"OUT_{self._center}"
        try:
            await jetstream.stream_info(name)
        except nats.js.errors.NotFoundError:
            await jetstream.add_stream(
                StreamConfig(
                    name=name,
                    subjects=[f"ev.{self._center}.>"],
                    retention=RetentionPolicy.LIMITS,
                    storage=StorageType.FILE,
                    discard=DiscardPolicy.OLD,
                    max_age=STREAM_AGE_S_MAX,
                    max_bytes=STREAM_BYTES_MAX,
                    duplicate_window=1,
                    deny_delete=True,
                )
            )
        for peer in self._peers:
            try:
                await jetstream.consumer_info(name, f"to-{peer}")
            except nats.js.errors.NotFoundError:
                await jetstream.add_consumer(
                    name,
                    ConsumerConfig(
                        name=f"to-{peer}",
                        durable_name=f"to-{peer}",
                        ack_policy=AckPolicy.FLOW_CONTROL,
                        deliver_policy=DeliverPolicy.ALL,
                        deliver_subject=f"deliver.{self._center}.{peer}",
                        flow_control=True,
                        idle_heartbeat=1,
                        max_ack_pending=10_000,
                        max_deliver=-1,
                    ),
                )

    async def _provision_in(self, jetstream: JetStreamContext, source: str) -> None:
        name = f"IN_{source}"
        joined = [
            StreamSource(
                name=f"OUT_{source}",
                external=ExternalStream(api=f"$JS.{source}.API"),
                consumer=StreamConsumerSource(
                    name=f"to-{self._center}",
                    deliver_subject=f"deliver.{source}.{self._center}",
                ),
            )
        ]
        try:
            if not (await jetstream.stream_info(name)).config.sources:
                await jetstream.update_stream(_received(source, joined))
        except nats.js.errors.NotFoundError:
            await jetstream.add_stream(_received(source, joined))
        durable = f"apply-{self._role}"
        try:
            await jetstream.consumer_info(name, durable)
        except nats.js.errors.NotFoundError:
            await jetstream.add_consumer(
                name,
                ConsumerConfig(
                    name=durable,
                    durable_name=durable,
                    filter_subject=f"ev.{source}.{self._role}.>",
                    ack_policy=AckPolicy.ALL,
                    deliver_policy=DeliverPolicy.ALL,
                    ack_wait=30,
                    max_ack_pending=10_000,
                    max_deliver=-1,
                ),
            )

    async def _leave_source(self, jetstream: JetStreamContext, source: str) -> None:
        """The first half of joining a source anew, from its first message; `_provision_in` is the
        other. The server takes the number reached before from what it has stored: that has to go."""
        with suppress(nats.js.errors.NotFoundError):
            await jetstream.update_stream(_received(source, [], bytes_max=1))
        # Without somewhere to reply to, the server does nothing; no reply can come back over the link.
        await self._access.connections[f"IN_{source}"].client.publish(
            f"$JS.{source}.API.CONSUMER.RESET.OUT_{source}.to-{self._center}",
            b'{"seq": 1}',
            reply=f"$JSC.R.to-{self._center}",
        )


def _received(
    source: str, joined: list[StreamSource], bytes_max: int = STREAM_BYTES_MAX
) -> StreamConfig:
    """The stream of what comes from a center."""
    return StreamConfig(
        name=f"IN_{source}",
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=STREAM_AGE_S_MAX,
        max_bytes=bytes_max,
        duplicate_window=1,
        sources=joined,
    )


def _delivery(messages: Sequence[Msg]) -> Delivery:
    async def acknowledge() -> None:
        await messages[-1].ack()

    entries = []
    for message in messages:
        # What is no entry at all is as good as lost: it shows as a gap, and the feed fills it.
        with suppress(DecodeError):
            entries.append(LogEntry.FromString(message.data))
    return Delivery(entries, acknowledge)
