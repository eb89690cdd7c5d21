"""Turns a caller's bearer token into an account id, by asking the center that made the session."""

from collections import OrderedDict
from hashlib import sha256
from typing import NamedTuple

from grpc import StatusCode

from duohuo.v1.session_service_pb2 import GetSessionRequest, Session
from runtime.clock import Clock
from runtime.endpoint import AUTHORIZATION, Call, Endpoint
from runtime.errors import RpcError, invalid, session_invalid
from runtime.ids import place_of
from runtime.methods import Method, method
from runtime.token_seal import TokenSeal

CACHE_MS = 2000
"""How long a session of another center is believed without asking again: the bound on a revocation."""
CACHE_SESSIONS_MAX = 10_000
CHECK_TIMEOUT_S = 2.0
_GET_SESSION = method("/duohuo.v1.SessionService/GetSession")


class Caller(NamedTuple):
    """Who calls, and in which session."""

    account_id: str
    session_id: str


class Authenticator:
    """Remembers other centers' answers for at most two seconds; this center's own not at all.

    A token that was not made in this mesh is refused without asking anybody.
    """

    def __init__(self, here: str, clock: Clock, seal: TokenSeal) -> None:
        self._here = here
        self._clock = clock
        self._seal = seal
        self._cache: OrderedDict[bytes, tuple[Caller, int]] = OrderedDict()

    async def caller_of(self, call: Call, router: Endpoint) -> Caller:
        """Whose session the call's bearer token is. Raises RpcError."""
        scheme, _, token = call.metadata.get(AUTHORIZATION, "").partition(" ")
        if not token:
            raise RpcError(
                StatusCode.UNAUTHENTICATED,
                "SESSION_REQUIRED",
                "this call needs a session",
                advice="Log in, and send 'authorization: Bearer <token>'.",
            )
        if scheme.lower() != "bearer":
            raise session_invalid()
        origin = self.origin_of(token)
        key = sha256(token.encode()).digest()
        caller, believed_until_ms = self._cache.get(key, (None, 0))
        now_ms = self._clock.monotonic_ms()
        if caller is not None and now_ms < believed_until_ms:
            return caller
        asked = GetSessionRequest(token=token).SerializeToString()
        reply = await router.unary(Call(_GET_SESSION, asked, min(call.timeout_s, CHECK_TIMEOUT_S)))
        session = Session.FromString(reply.payload)
        caller = Caller(session.account_id, session.session_id)
        if origin != self._here:
            self._cache[key] = (caller, now_ms + CACHE_MS)
            while len(self._cache) > CACHE_SESSIONS_MAX:
                self._cache.popitem(last=False)
        return caller

    def origin_of(self, token: str) -> str:
        """The center that made a token. Raises RpcError if none of this mesh did."""
        place = place_of(token) if self._seal.holds(token) else None
        if place is None or place.origin is None or place.slot is not None:
            raise session_invalid()
        return place.origin


def bad_key(called: Method) -> RpcError:
    """The key of a request names no place, or a center that is not in this mesh."""
    if called.key == "token":
        return session_invalid()
    return invalid(
        called.key, f"{called.key} must be an e-mail address, a phone number or an id of this mesh"
    )
