"""A gRPC channel as an endpoint."""

from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
from google.rpc import status_pb2

from runtime import telemetry
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, unreachable

MESSAGE_BYTES_MAX = 1_048_576
_DETAILS = "grpc-status-details-bin"
# Said by gRPC core of calls that no server has taken.
_NEVER_SENT = (
    "failed to connect to all addresses",
    "Endpoint closing",
    "DNS resolution failed",
    # REFUSED_STREAM: nothing has been done (RFC 9113, 8.7).
    "Stream removed (RST_STREAM (Received RST_STREAM with error code 7",
)

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
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

    `name` is what a failure to reach it is reported under.
    """

    def __init__(self, name: str, address: str) -> None:
        self._name = name
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    async def close(self) -> None:
        await self._channel.close()

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
        receive: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(
            call.method.path
        )
        received = receive(call.request, metadata=_metadata(call))
        try:
            async for message in received:
                yield message
        except grpc.aio.AioRpcError as error:
            raise _translate(self._name, error) from None
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
