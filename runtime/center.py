"""This center's services as one endpoint, whether they live in this process or in others."""

from collections.abc import AsyncIterator, Mapping

from runtime.dispatcher import Dispatcher
from runtime.endpoint import Call, Endpoint, Reply


class LocalCenter:
    """Hands a call to the role that serves it. A role in this process costs no second hop."""

    def __init__(self, dispatcher: Dispatcher, elsewhere: Mapping[str, Endpoint]) -> None:
        self._dispatcher = dispatcher
        self._elsewhere = elsewhere

    async def unary(self, call: Call) -> Reply:
        return await self._endpoint(call).unary(call)

    def stream(self, call: Call) -> AsyncIterator[bytes]:
        return self._endpoint(call).stream(call)

    def _endpoint(self, call: Call) -> Endpoint:
        role = call.method.role
        if role in self._dispatcher.roles:
            return self._dispatcher
        return self._elsewhere.get(role, self._dispatcher)
