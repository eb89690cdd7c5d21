"""What operators ask for of a user is done at the home of the user's account, wherever that is by now."""

from typing import TypeVar

from google.protobuf.message import Message
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import LookupAccountRequest, LookupAccountResponse
from runtime.dispatcher import Incoming
from runtime.endpoint import OPERATOR, ask
from runtime.errors import RpcError, invalid
from runtime.home_calls import ask_home
from runtime.ids import account_slot, place_of
from runtime.mesh import Mesh
from runtime.methods import Method, peer_method
from runtime.placement import Placement

TIMEOUT_S = 5.0
M = TypeVar("M", bound=Message)


def slot_of_user(user: str) -> int:
    """The slot of an account id or identifier. Raises RpcError if it is neither."""
    place = place_of(user)
    if place is None or place.slot is None or place.origin is not None:
        raise invalid("user", "must be an account id or an identifier")
    return place.slot


class AtHome:
    """Finds users' accounts, and asks their homes."""

    def __init__(self, mesh: Mesh, placement: Placement) -> None:
        self._mesh = mesh
        self._placement = placement

    async def find(self, user: str) -> tuple[int, str]:
        """The slot of a user's account, and its id. Its home alone moves and controls its money; whether
        there is such an account, the home of the identifier knows for certain. Raises RpcError."""
        found = await ask(
            self._mesh.at(self._placement.home(slot_of_user(user))),
            peer_method("account", "LookupAccount"),
            LookupAccountRequest(user=user),
            LookupAccountResponse,
            TIMEOUT_S,
        )
        slot = account_slot(found.account_id)
        if slot is None:
            raise RpcError(StatusCode.NOT_FOUND, "ACCOUNT_NOT_FOUND", "there is no such account")
        return slot, found.account_id

    async def ask(
        self,
        slot: int,
        method: Method,
        request: Message,
        response_type: type[M],
        incoming: Incoming,
    ) -> M:
        """Asks the home of a slot on the operator's behalf."""
        who = {OPERATOR: incoming.operator}
        return await ask_home(
            self._mesh,
            self._placement,
            slot,
            method,
            request,
            response_type,
            TIMEOUT_S,
            who,
        )
