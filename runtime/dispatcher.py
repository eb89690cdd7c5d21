"""The servicers that live in this process, as an endpoint."""

import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import protovalidate
import structlog
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode

from duohuo.v1.routing_pb2 import ACCESS_PEER, ACCESS_USER
from runtime import telemetry
from runtime.endpoint import (
    ACCOUNT,
    CALLER,
    CAUSAL,
    CLIENT_ADDRESS,
    GATEWAY,
    OPERATOR,
    SERVED_BY,
    SESSION,
    Call,
    Reply,
)
from runtime.errors import RpcError, invalid
from runtime.hlc import HybridClock
from runtime.identity import Identity, admit
from runtime.methods import Method, service_methods

_RULES = protovalidate.Validator()
_log = structlog.get_logger()


@dataclass(slots=True)
class Incoming:
    """What a servicer knows of a call beside the request, and the metadata it answers with."""

    caller_account_id: str
    timeout_s: float
    causal: int = 0
    operator: str = ""
    session_id: str = ""
    """The session in which a user calls."""
    gateway: str = ""
    """The center whose gateway took the user's call."""
    client_address: str = ""
    """Where a user calls from who has no session yet; empty if nobody said so."""
    reply_metadata: dict[str, str] = field(default_factory=dict)


class Dispatcher:
    """Decodes, authorises, calls the servicer's method of the RPC's name, encodes.

    A servicer is an object with one method per RPC: `async def Login(self, request, incoming)` for a
    unary one, an async generator of the same arguments for a stream. They raise RpcError.
    """

    def __init__(self, center: str, clock: HybridClock) -> None:
        self._center = center
        self._clock = clock
        self._handlers: dict[str, Callable[[Message, Incoming], Any]] = {}
        self._refusals: dict[str, Callable[[], RpcError | None]] = {}
        self.roles: set[str] = set()

    def add(
        self,
        service: str,
        *servicers: object,
        refusal: Callable[[], RpcError | None] = lambda: None,
    ) -> None:
        """Serves a service (by full name) from these objects; each method from the first that has it.

        While `refusal` returns an error, methods not declared `while_recovering` are answered with it.
        """
        methods = service_methods(service)
        for method in methods:
            self._handlers[method.path] = next(
                getattr(servicer, method.name)
                for servicer in servicers
                if hasattr(servicer, method.name)
            )
            if not method.while_recovering:
                self._refusals[method.path] = refusal
            self.roles.add(method.role)

    async def unary(self, call: Call) -> Reply:
        with telemetry.span(
            f"{call.method.role} {call.method.name}",
            {"duohuo.role": call.method.role, "duohuo.center": self._center},
        ):
            handler, request, incoming = self._open(call)
            try:
                answer: Awaitable[Message] = handler(request, incoming)
                payload = (await answer).SerializeToString()
            except RpcError:
                raise
            except Exception as bug:
                raise _incident(call.method, bug) from bug
        return Reply(payload, self._finish(incoming))

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        handler, request, incoming = self._open(call)
        try:
            async for message in handler(request, incoming):
                yield message.SerializeToString()
        except RpcError:
            raise
        except Exception as bug:
            raise _incident(call.method, bug) from bug

    def _open(self, call: Call) -> tuple[Callable[[Message, Incoming], Any], Message, Incoming]:
        handler = self._handlers.get(call.method.path)
        if handler is None:
            raise RpcError(
                StatusCode.UNIMPLEMENTED,
                "NOT_SERVED_HERE",
                f"{call.method.path} is not served here",
            )
        refusal = self._refusals.get(call.method.path)
        if refusal is not None and (refused := refusal()) is not None:
            raise refused
        try:
            request = call.method.request_type.FromString(call.request)
        except DecodeError:
            raise invalid("", "the request is not a valid protobuf message", "MALFORMED") from None
        if named := call.metadata.get(CALLER):
            admit(call.method, request, Identity.parse(named))
        if call.method.access != ACCESS_PEER:
            _check_fields(request)
        caller = call.metadata.get(ACCOUNT, "")
        owner = call.method.owner
        if call.method.access == ACCESS_USER and not caller:
            raise RpcError(StatusCode.UNAUTHENTICATED, "SESSION_REQUIRED", "log in first")
        if owner and getattr(request, owner) != caller:
            raise RpcError(
                StatusCode.PERMISSION_DENIED, "NOT_YOURS", f"{owner} must be your own account"
            )
        incoming = Incoming(
            caller,
            call.timeout_s,
            operator=call.metadata.get(OPERATOR, ""),
            session_id=call.metadata.get(SESSION, ""),
            gateway=call.metadata.get(GATEWAY, ""),
            client_address=call.metadata.get(CLIENT_ADDRESS, ""),
        )
        if causal := call.metadata.get(CAUSAL):
            incoming.causal = self._observe(causal)
        return handler, request, incoming

    def _observe(self, causal: str) -> int:
        try:
            token = int(causal)
        except ValueError:
            raise invalid(
                CAUSAL, "the causal token was not made by this mesh", "CAUSAL_TOKEN_INVALID"
            ) from None
        self._clock.observe_client(token)
        return token

    def _finish(self, incoming: Incoming) -> dict[str, str]:
        return {
            SERVED_BY: self._center,
            # Never less than what the caller has seen, even if this center's clock is behind it.
            CAUSAL: str(max(self._clock.latest, incoming.causal)),
            **incoming.reply_metadata,
        }


def _check_fields(request: Message) -> None:
    """Holds a request to the field rules in its .proto (protovalidate). They are generous where a servicer
    has a closer one, with a reason of its own. Raises RpcError INVALID_FIELD."""
    for violation in _RULES.collect_violations(request, fail_fast=True):
        path = violation.proto.field
        names = [element.field_name for element in path.elements] if path else []
        raise invalid(".".join(names), violation.proto.message)


def _incident(method: Method, bug: Exception) -> RpcError:
    """An opaque error for the caller, and frames without values (they may hold secrets) for the log."""
    frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(bug.__traceback__)]
    incident = telemetry.trace_id() or "untraced"
    _log.error("bug", rpc=method.path, incident=incident, kind=type(bug).__name__, frames=frames)
    return RpcError(
        StatusCode.INTERNAL,
        "INTERNAL",
        f"internal error, incident {incident}",
        ran=True,
        details={"incident": incident},
    )
