"""This center's services as one endpoint, whether they live in this process or in others."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from runtime.dispatcher import Dispatcher
from runtime.endpoint import Call, Endpoint, Reply
from runtime.errors import ROLE_UNREACHABLE, RpcError, is_silence


class LocalCenter:
    """Hands a call to the role that serves it. A role in this process costs no second hop."""

    def __init__(self, dispatcher: Dispatcher, elsewhere: Mapping[str, Endpoint]) -> None:
        self._dispatcher = dispatcher
        self._elsewhere = elsewhere

    async def unary(self, call: Call) -> Reply:
        if self._is_here(call):
            return await self._dispatcher.unary(call)
        try:
            return await self._elsewhere[call.method.role].unary(call)
        except RpcError as error:
            raise _of_role(call, error) from None

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        if self._is_here(call):
            async for message in self._dispatcher.stream(call):
                yield message
            return
        try:
            async for message in self._elsewhere[call.method.role].stream(call):
                yield message
        except RpcError as error:
            raise _of_role(call, error) from None

    def _is_here(self, call: Call) -> bool:
        role = call.method.role
        return role in self._dispatcher.roles or role not in self._elsewhere


def _of_role(call: Call, error: RpcError) -> RpcError:
    """That one service does not answer says nothing against its center."""
    if not is_silence(error):
        return error
    role = call.method.role
    return replace(error, reason=ROLE_UNREACHABLE, message=f"the {role} service did not answer")
