"""This center's services as one endpoint, whether they live in this process or in others."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from runtime.dispatcher import Dispatcher
from runtime.endpoint import Call, Endpoint, Reply
from runtime.errors import CENTER_UNREACHABLE, ROLE_UNREACHABLE, RpcError


class LocalCenter:
    """Hands a call to the role that serves it. A role in this process costs no second hop."""

    def __init__(self, dispatcher: Dispatcher, elsewhere: Mapping[str, Endpoint]) -> None:
        self._dispatcher = dispatcher
        self._elsewhere = elsewhere

    async def unary(self, call: Call) -> Reply:
        try:
            return await self._endpoint(call).unary(call)
        except RpcError as error:
            raise _of_role(call, error) from None

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        try:
            async for message in self._endpoint(call).stream(call):
                yield message
        except RpcError as error:
            raise _of_role(call, error) from None

    def _endpoint(self, call: Call) -> Endpoint:
        role = call.method.role
        if role in self._dispatcher.roles:
            return self._dispatcher
        return self._elsewhere.get(role, self._dispatcher)


def _of_role(call: Call, error: RpcError) -> RpcError:
    """That one service does not answer says nothing against its center."""
    if error.reason != CENTER_UNREACHABLE:
        return error
    role = call.method.role
    return replace(error, reason=ROLE_UNREACHABLE, message=f"the {role} service did not answer")
