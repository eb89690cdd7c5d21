"""A gRPC channel as an endpoint."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
from google.rpc import status_pb2

from runtime import telemetry
from runtime.credentials import Credentials
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, unreachable

MESSAGE_BYTES_MAX = 1_048_576
CLOSE_GRACE_S = 60.0
"""As long as any call may take."""
_DETAILS = "grpc-status-details-bin"
# Said by gRPC core of calls that no server has taken.
_NEVER_SENT = (
    "failed to connect to all addresses",
    "Endpoint closing",
    "DNS resolution failed",
    # REFUSED_STREAM: nothing has been done (RFC 9113, 8.7).
    "Stream removed (RST_STREAM (Received RST_STREAM with error code 7",
)

CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = (
    # A half-open link gives no error: only pings notice it.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),  # retries are ours to decide
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)


class GrpcEndpoint:
    """Calls a server at `address` and turns its failures into RpcError.

    `name` is what a failure to reach it is reported under. With credentials it speaks TLS to a server whose
    certificate has the name `expected`.
    """

    def __init__(
        self, name: str, address: str, credentials: Credentials | None = None, expected: str = ""
    ) -> None:
        self._name = name
        self._address = address
        self._credentials = credentials
        self._options = CHANNEL_OPTIONS
        if expected:
            self._options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", expected))
        self._closing = set[asyncio.Task[None]]()
        self._opened, self._generation = self._open(), self._wanted_generation()

    async def close(self) -> None:
        await asyncio.gather(self._opened.close(), *self._closing)

    def _open(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        return grpc.aio.secure_channel(
            self._address, self._credentials.for_channel(), options=self._options
        )

    def _wanted_generation(self) -> int:
        return self._credentials.generation if self._credentials else 0

    @property
    def _channel(self) -> grpc.aio.Channel:
        """A new one once the certificate has changed; what runs over the old one has time to end."""
        if self._generation != self._wanted_generation():
            closing = asyncio.create_task(self._opened.close(CLOSE_GRACE_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._opened, self._generation = self._open(), self._wanted_generation()
        return self._opened

    async def unary(self, call: Call) -> Reply:
        with telemetry.span(
            call.method.path[1:],
            {"rpc.system.name": "grpc", "duohuo.peer": self._name},
            telemetry.SpanKind.CLIENT,
        ):
            send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
                call.method.path
            )
            sent = send(call.request, timeout=call.timeout_s, metadata=_metadata(call))
            try:
                payload = await sent
                trailing = await sent.trailing_metadata()
            except grpc.aio.AioRpcError as error:
                raise _translate(self._name, error) from None
        return Reply(payload, {key: value for key, value in trailing if isinstance(value, str)})

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        channel = self._channel
        receive: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            call.method.path
        )
        received = receive(call.request, metadata=_metadata(call))
        try:
            async for message in received:
                yield message
        except grpc.aio.AioRpcError as error:
            raise _translate(self._name, error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if channel is self._opened or (task and task.cancelling()):
                raise
            # A stream has no end of its own, so that of an old connection is cut off.
            raise RpcError(
                grpc.StatusCode.UNAVAILABLE,
                "CONNECTION_RENEWED",
                f"the connection to {self._name} was opened anew, with a new certificate",
                ran=True,
            ) from None
        finally:
            received.cancel()


def _metadata(call: Call) -> tuple[tuple[str, str], ...]:
    parent = telemetry.traceparent()
    extra = ((telemetry.TRACEPARENT, parent),) if parent else ()
    return (*call.metadata.items(), *extra)


def _translate(name: str, error: grpc.aio.AioRpcError) -> RpcError:
    for key, value in error.trailing_metadata():
        if key == _DETAILS and isinstance(value, bytes):
            return RpcError.from_status(status_pb2.Status.FromString(value))
    text = error.details() or ""
    # A peer that stops cancels what is left of its calls.
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return unreachable(name, ran=not text.startswith(_NEVER_SENT))
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RpcError(
            error.code(), "DEADLINE_EXCEEDED", f"{name} did not answer in time", ran=True
        )
    return RpcError(error.code(), error.code().name, text, ran=True)
