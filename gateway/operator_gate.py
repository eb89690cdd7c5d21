"""The operators' port lets through who may do what they ask for, and says in whose name."""

import hmac
from collections.abc import AsyncIterator, Callable

import structlog
from grpc import StatusCode

from duohuo.v1.routing_pb2 import ACCESS_VIEWER
from runtime.clock import Clock, iso
from runtime.endpoint import AUTHORIZATION, OPERATOR, Call, Endpoint, Reply
from runtime.errors import RpcError
from runtime.operators import Operator, parse, token_hash

_log = structlog.get_logger()


class OperatorGate:
    """`read` returns the text of the operators' file, at each call: a change needs no restart."""

    def __init__(self, endpoint: Endpoint, read: Callable[[], str], clock: Clock) -> None:
        self._endpoint = endpoint
        self._read = read
        self._clock = clock

    async def unary(self, call: Call) -> Reply:
        return await self._endpoint.unary(self._checked(call))

    def stream(self, call: Call) -> AsyncIterator[bytes]:
        return self._endpoint.stream(self._checked(call))

    def _checked(self, call: Call) -> Call:
        scheme, _, token = call.metadata.get(AUTHORIZATION, "").partition(" ")
        who = self._find(token) if scheme == "Bearer" else None
        if who is None:
            _log.warning("operator refused", rpc=call.method.path, reason="OPERATOR_TOKEN_INVALID")
            raise RpcError(
                StatusCode.UNAUTHENTICATED,
                "OPERATOR_TOKEN_INVALID",
                "this port is for operators and needs the token of one, not expired",
            )
        if who.role != "operator" and call.method.access != ACCESS_VIEWER:
            _log.warning(
                "operator refused", rpc=call.method.path, reason="OPERATOR_ROLE", operator=who.name
            )
            raise RpcError(
                StatusCode.PERMISSION_DENIED,
                "OPERATOR_ROLE",
                f"a {who.role} may look, and not do this",
                advice="Ask somebody with the role operator.",
            )
        return call._replace(metadata={**call.metadata, OPERATOR: who.name})

    def _find(self, token: str) -> Operator | None:
        try:
            operators = parse(self._read())
        except (OSError, ValueError) as error:
            _log.error("operators unreadable", error=str(error))
            raise RpcError(
                StatusCode.UNAVAILABLE,
                "OPERATORS_UNREADABLE",
                "this center cannot read who its operators are",
                advice="Its log says why; see DUOHUO_OPERATORS_FILE.",
            ) from None
        hashed = token_hash(token)
        today = iso(self._clock.wall_ms())[:10]
        for one in operators:
            if hmac.compare_digest(one.hashed, hashed):
                return one if one.last_day is None or today <= one.last_day.isoformat() else None
        return None
