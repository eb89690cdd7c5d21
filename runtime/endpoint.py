"""A call, and anything that answers calls: a servicer here, a channel, a gateway, a simulated network."""

from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message
from grpc import StatusCode

from runtime.errors import RpcError
from runtime.methods import Method

# Metadata keys. A gateway never copies a caller's own `duohuo-*` keys, but for CAUSAL, into the mesh.
AUTHORIZATION = "authorization"
ACCOUNT = "duohuo-account"
SESSION = "duohuo-session"
OPERATOR = "duohuo-operator"
CAUSAL = "duohuo-causal"
EPOCH = "duohuo-epoch"
HOP = "duohuo-hop"
GATEWAY = "duohuo-gateway"
CALLER = "duohuo-caller"
CLIENT = "duohuo-client"
CLIENT_ADDRESS = "duohuo-client-address"
SERVED_BY = "duohuo-served-by"
HOME = "duohuo-home"
STALENESS_MS = "duohuo-staleness-ms"

M = TypeVar("M", bound=Message)


class Call(NamedTuple):
    """One request on its way. `timeout_s` is what is left of the caller's deadline."""

    method: Method
    request: bytes
    timeout_s: float
    metadata: Mapping[str, str] = MappingProxyType({})


class Reply(NamedTuple):
    """The encoded answer and the metadata that comes with it."""

    payload: bytes
    metadata: Mapping[str, str]


class Endpoint(Protocol):
    """Answers calls. Both methods raise `runtime.errors.RpcError`."""

    async def unary(self, call: Call) -> Reply:
        """One answer."""
        ...

    def stream(self, call: Call) -> AsyncIterator[bytes]:
        """Answers until either side stops; `timeout_s` does not bound a stream."""
        ...


async def ask(
    endpoint: Endpoint,
    method: Method,
    request: Message,
    response_type: type[M],
    timeout_s: float,
    metadata: Mapping[str, str] | None = None,
) -> M:
    """Calls with messages instead of bytes."""
    call = Call(method, request.SerializeToString(), timeout_s, metadata or {})
    return answer_of((await endpoint.unary(call)).payload, response_type)


def answer_of(payload: bytes, response_type: type[M]) -> M:
    """Decodes an answer. Raises RpcError ANSWER_MALFORMED: what another process says stops no process."""
    try:
        return response_type.FromString(payload)
    except DecodeError:
        raise RpcError(
            StatusCode.UNAVAILABLE, "ANSWER_MALFORMED", "the answer is no valid message", ran=True
        ) from None
