"""How the command line calls a mesh: through any gateway that answers, going on at the next one.

Sessions are kept in the state directory, readable by their owner alone.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from ops import mesh_file
from ops.output import Failure
from runtime.endpoint import AUTHORIZATION, CAUSAL, HOME, SERVED_BY, Call
from runtime.errors import RpcError
from runtime.grpc_client import GrpcEndpoint
from runtime.identifiers import InvalidIdentifier, normalise
from runtime.ids import account_slot
from runtime.methods import method

M = TypeVar("M", bound=Message)
CALL_TIMEOUT_S = 10.0
_FILE = "sessions.json"


@dataclass(slots=True)
class Login:
    """One user's session."""

    account_id: str
    token: str = field(repr=False)


@dataclass(slots=True)
class Sessions:
    """The users logged in from this state directory, by identifier, and the last one."""

    current: str = ""
    causal: str = ""
    logins: dict[str, Login] = field(default_factory=dict)
    device_proofs: dict[str, str] = field(default_factory=dict, repr=False)
    """By identifier: shows that its user has logged in here before."""

    @classmethod
    def load(cls, state: Path) -> "Sessions":
        try:
            raw = json.loads((state / _FILE).read_text())
            logins = {user: Login(**login) for user, login in raw["logins"].items()}
            return cls(raw["current"], raw["causal"], logins, raw.get("device_proofs", {}))
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError):
            raise Failure(f"{state / _FILE} is damaged; remove it and log in again") from None

    def save(self, state: Path) -> None:
        mesh_file.write_private(state / _FILE, json.dumps(asdict(self), indent=2) + "\n")

    def of(self, user: str | None) -> Login:
        """The session of a user (identifier or account id), or of the last one who logged in."""
        if user is None:
            if self.current in self.logins:
                return self.logins[self.current]
            raise Failure("nobody is logged in", advice="Try: duohuo login alice@example.com")
        if account_slot(user) is not None:
            found = next((s for s in self.logins.values() if s.account_id == user), None)
        else:
            found = self.logins.get(normal(user))
        if found is None:
            raise Failure("this user is not logged in here", advice=f"Try: duohuo login {user}")
        return found


def normal(identifier: str) -> str:
    """The normal form of an identifier; a Failure if it is none."""
    try:
        return normalise(identifier)
    except InvalidIdentifier:
        raise Failure(f"{identifier} is neither an e-mail address nor a phone number") from None


class Client:
    """Calls RPCs at gateways (by center), the first that answers.

    `served_by` answered last; `home` is whose data it was, empty if nobody's in particular.
    """

    def __init__(self, gateways: Mapping[str, str], sessions: Sessions) -> None:
        self.sessions = sessions
        self.served_by = self.home = ""
        self._gateways = {
            center: GrpcEndpoint(center, address) for center, address in gateways.items()
        }

    async def close(self) -> None:
        for gateway in self._gateways.values():
            await gateway.close()

    async def call(
        self, path: str, request: Message, response_type: type[M], login: Login | None = None
    ) -> M:
        """Calls an RPC such as `AccountService/Register`. Raises RpcError of the last gateway."""
        called = method(f"/duohuo.v1.{path}")
        call = Call(called, request.SerializeToString(), CALL_TIMEOUT_S, self._metadata(login))
        failed: RpcError | None = None
        for gateway in self._gateways.values():
            try:
                reply = await gateway.unary(call)
            except RpcError as error:
                failed = error
                if error.reason == "CENTER_UNREACHABLE" and (
                    called.safe_to_repeat or not error.ran
                ):
                    continue
                raise
            self.served_by = reply.metadata.get(SERVED_BY, "")
            self.home = reply.metadata.get(HOME, "")
            self.sessions.causal = reply.metadata.get(CAUSAL, self.sessions.causal)
            return response_type.FromString(reply.payload)
        raise failed or Failure("the mesh has no gateway")

    async def stream(
        self, path: str, request: Message, response_type: type[M], login: Login | None = None
    ) -> AsyncIterator[M]:
        """Follows a streaming RPC; goes on at the next gateway when one is lost."""
        call = Call(
            method(f"/duohuo.v1.{path}"),
            request.SerializeToString(),
            CALL_TIMEOUT_S,
            self._metadata(login),
        )
        failed: RpcError | None = None
        for gateway in self._gateways.values():
            try:
                async for payload in gateway.stream(call):
                    yield response_type.FromString(payload)
            except RpcError as error:
                failed = error
                if error.reason != "CENTER_UNREACHABLE":
                    raise
        raise failed or Failure("the stream ended")

    def _metadata(self, login: Login | None) -> Mapping[str, str]:
        metadata = {CAUSAL: self.sessions.causal} if self.sessions.causal else {}
        if login is not None:
            metadata[AUTHORIZATION] = f"Bearer {login.token}"
        return metadata


@asynccontextmanager
async def connected(state: Path, first: str | None = None) -> AsyncIterator[Client]:
    """A client of the mesh that runs on a state directory; remembers what it learned."""
    mesh = mesh_file.read(state)
    if first is not None and first not in mesh.centers:
        raise Failure(f"there is no center {first}; there is {', '.join(mesh.centers)}")
    names = sorted(mesh.centers, key=lambda name: name != first)
    client = Client({name: mesh.centers[name].gateway for name in names}, Sessions.load(state))
    try:
        yield client
        client.sessions.save(state)
    finally:
        await client.close()


async def ask_operator(
    state: Path,
    center: str,
    path: str,
    request: Message,
    response_type: type[M],
    timeout_s: float = CALL_TIMEOUT_S,
) -> M:
    """Calls an operator RPC, such as `GetStatus`, at one center."""
    mesh = mesh_file.read(state)
    if center not in mesh.centers:
        raise Failure(f"there is no center {center}; there is {', '.join(mesh.centers)}")
    endpoint = GrpcEndpoint(center, mesh.centers[center].operator)
    metadata = {AUTHORIZATION: f"Bearer {mesh_file.operator_token(state)}"}
    call = Call(
        method(f"/duohuo.v1.OperatorService/{path}"),
        request.SerializeToString(),
        timeout_s,
        metadata,
    )
    try:
        return response_type.FromString((await endpoint.unary(call)).payload)
    finally:
        await endpoint.close()


async def ask_some_operator(state: Path, path: str, request: Message, response_type: type[M]) -> M:
    """Calls an operator RPC that any center can serve, at the first that answers. Raises RpcError."""
    failed: RpcError | None = None
    for center in mesh_file.read(state).centers:
        try:
            return await ask_operator(state, center, path, request, response_type)
        except RpcError as error:
            if error.reason != "CENTER_UNREACHABLE":
                raise
            failed = error
    raise failed or Failure("the mesh has no center")
