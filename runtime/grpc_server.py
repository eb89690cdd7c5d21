"""An endpoint as a gRPC server, with the standard health and reflection services."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from runtime import telemetry
from runtime.credentials import Credentials
from runtime.endpoint import CALLER, CLIENT, Call, Endpoint
from runtime.errors import RpcError, unreachable
from runtime.grpc_client import MESSAGE_BYTES_MAX
from runtime.methods import Method

TIMEOUT_S_DEFAULT = 10.0
TIMEOUT_S_MAX = 60.0
_DETAILS = "grpc-status-details-bin"

CALLS_MAX = 5_000
IPV6_CLIENT_BITS = 64


class Accepts(NamedTuple):
    """What a port takes from one connection before anything of ours runs."""

    message_bytes_max: int
    metadata_bytes_max: int
    calls_max: int
    """Calls at a time; further ones are refused as UNAVAILABLE, definitely not run."""
    idle_ms_max: int
    """So long a connection may be open without a call."""
    reflection: bool = True
    """May a client ask which RPCs there are?"""


FROM_USERS = Accepts(64 * 1024, 16 * 1024, 1_000, 300_000)
FROM_THE_MESH = Accepts(MESSAGE_BYTES_MAX, 16 * 1024, 1_000, 3_600_000)
FROM_PROBES = Accepts(1024, 16 * 1024, 10, 60_000, reflection=False)


def _options(accepts: Accepts) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
        ("grpc.max_receive_message_length", accepts.message_bytes_max),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", accepts.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", accepts.metadata_bytes_max),
        ("grpc.max_concurrent_streams", accepts.calls_max),
        ("grpc.max_connection_idle_ms", accepts.idle_ms_max),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


class GrpcServer:
    """Serves `methods` from an endpoint on one address. Any other method is UNIMPLEMENTED.

    `role` names the spans. The caller's trace is continued. Without credentials it speaks no TLS; with
    mutual ones each call tells who makes it (CALLER).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        methods: Mapping[str, Method],
        center: str,
        role: str,
        accepts: Accepts,
        credentials: Credentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._server = grpc.aio.server(options=_options(accepts), maximum_concurrent_rpcs=CALLS_MAX)
        self._handlers = _Handlers(endpoint, methods, center, role, credentials)
        self._server.add_generic_rpc_handlers((self._handlers,))
        services = sorted({method.service for method in methods.values()})
        self._services = ["", *services]
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if accepts.reflection:
            reflection.enable_server_reflection(
                [*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
            )

    async def start(self, address: str) -> int:
        """Listens and reports SERVING; returns the port. Raises OSError if it cannot."""
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials.for_server())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error
        await self._server.start()
        await self.tell(serving=True)
        return int(port)

    async def tell(self, *, serving: bool) -> None:
        """Has health checks see this, from now on. Calls are served all the same."""
        response = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._health.set(service, response.SERVING if serving else response.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Reports NOT_SERVING, ends streams, lets running calls finish, and closes."""
        await self._health.enter_graceful_shutdown()
        self._handlers.end_streams()
        await self._server.stop(grace_s)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(
        self,
        endpoint: Endpoint,
        methods: Mapping[str, Method],
        center: str,
        role: str,
        credentials: Credentials | None,
    ) -> None:
        self._endpoint = endpoint
        self._center = center
        self._credentials = credentials if credentials and credentials.mutual else None
        self._ending = False
        self._streams: set[asyncio.Task[Any]] = set()
        self._attributes = {
            "rpc.system.name": "grpc",
            "duohuo.center": center,
            "duohuo.role": role,
        }
        self._handlers = {path: self._handler(method) for path, method in methods.items()}

    def service(self, details: Any) -> Any:
        return self._handlers.get(details.method)

    def end_streams(self) -> None:
        """Tells those who follow something to go on elsewhere; they would never finish by themselves."""
        self._ending = True
        for stream in self._streams:
            stream.cancel()

    def _handler(self, method: Method) -> Any:
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(self._streaming(method))
        return grpc.unary_unary_rpc_method_handler(self._unary(method))

    def _unary(self, method: Method) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(request: bytes, context: Any) -> bytes:
            try:
                call = self._call(method, request, context)
                with telemetry.span(
                    method.path[1:],
                    self._attributes,
                    telemetry.SpanKind.SERVER,
                    parent=call.metadata.get(telemetry.TRACEPARENT),
                ):
                    reply = await self._endpoint.unary(call)
            except RpcError as error:
                await _abort(context, error)
            context.set_trailing_metadata(tuple(reply.metadata.items()))
            return reply.payload

        return handle

    def _streaming(self, method: Method) -> Callable[[bytes, Any], AsyncIterator[bytes]]:
        async def handle(request: bytes, context: Any) -> AsyncIterator[bytes]:
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - this is a coroutine
            self._streams.add(task)
            try:
                stream = self._endpoint.stream(self._call(method, request, context))
                async with aclosing(stream) as messages:  # type: ignore[type-var] # generators
                    async for message in messages:
                        yield message
            except RpcError as error:
                await _abort(context, error)
            except asyncio.CancelledError:
                if not self._ending:
                    raise
                await _abort(context, unreachable(self._center, ran=True))
            finally:
                self._streams.discard(task)

        return handle

    def _call(self, method: Method, request: bytes, context: Any) -> Call:
        remaining = context.time_remaining()
        timeout_s = TIMEOUT_S_DEFAULT if remaining is None else min(remaining, TIMEOUT_S_MAX)
        metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        metadata[CLIENT] = client_network(context.peer())
        forwarded = metadata.pop(CALLER, "")
        if self._credentials is not None:
            metadata[CALLER] = self._credentials.caller(
                context.auth_context(), forwarded, self._center
            )
        return Call(method, request, timeout_s, metadata)


def client_network(peer: str) -> str:
    """Whose calls count together: an IPv4 address, or an IPv6 network of 64 bits, as one client may have
    all addresses of that (RFC 6177). `ipv4:192.0.2.1:40000` is 192.0.2.1."""
    address = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or IPv6Network((int(parsed), IPV6_CLIENT_BITS), strict=False))


async def _abort(context: Any, error: RpcError) -> None:
    await context.abort(
        error.code,
        error.message,
        ((_DETAILS, error.to_status().SerializeToString()),),
    )
