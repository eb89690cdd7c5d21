"""The RPCs and what the .proto files declare about them (duohuo/v1/routing.proto)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from duohuo.internal.v1 import peer_services_pb2
from duohuo.v1 import (
    account_service_pb2,
    announcement_service_pb2,
    operator_service_pb2,
    session_service_pb2,
    transfer_service_pb2,
)
from duohuo.v1.routing_pb2 import ACCESS_PEER, Access, Policy, Unavailable, role, routing

SERVICE_ROLES = ("account", "session", "transfer")
"""The roles that keep something. The gateway keeps nothing."""

PUBLIC_FILES: tuple[FileDescriptor, ...] = (
    account_service_pb2.DESCRIPTOR,
    session_service_pb2.DESCRIPTOR,
    transfer_service_pb2.DESCRIPTOR,
    announcement_service_pb2.DESCRIPTOR,
)
OPERATOR_FILES: tuple[FileDescriptor, ...] = (operator_service_pb2.DESCRIPTOR,)
PEER_FILES: tuple[FileDescriptor, ...] = (peer_services_pb2.DESCRIPTOR,)


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its wire path (`/package.Service/Name`), its types, and how the mesh treats it."""

    path: str
    service: str
    name: str
    role: str
    request_type: type[Message]
    response_type: type[Message]
    streams: bool
    policy: Policy.ValueType
    access: Access.ValueType
    key: str
    key_number: int | None
    owner: str
    safe_to_repeat: bool
    unavailable: Unavailable
    while_recovering: bool
    needs_no_write: bool
    callers: frozenset[str]
    """Roles whose services may call it inside the mesh."""
    origin: str


def methods_in(files: Iterable[FileDescriptor]) -> dict[str, Method]:
    """All RPCs declared in these .proto files, by wire path.

    Raises LookupError if one does not declare who may call it, where it goes, or an owner it has.
    """
    return {
        method.path: method
        for file in files
        for service in file.services_by_name.values()
        for method in map(_method, service.methods)
    }


@lru_cache(maxsize=1)
def _all() -> Mapping[str, Method]:
    return methods_in([*PUBLIC_FILES, *OPERATOR_FILES, *PEER_FILES])


def method(path: str) -> Method:
    """The RPC with this wire path. Raises KeyError."""
    return _all()[path]


def service_methods(service: str) -> list[Method]:
    """The RPCs of one service, by its full name. Raises LookupError."""
    found = [declared for declared in _all().values() if declared.service == service]
    if not found:
        raise LookupError(f"no .proto declares the service {service}")
    return found


def peer_method(role_name: str, name: str) -> Method:
    """The RPC that another service or center calls at a role, such as ("account", "Exchange")."""
    return method(f"/duohuo.internal.v1.{role_name.capitalize()}PeerService/{name}")


def _method(descriptor: MethodDescriptor) -> Method:
    declared = descriptor.GetOptions().Extensions[routing]
    service = descriptor.containing_service
    fields = descriptor.input_type.fields_by_name

    if not declared.access or not declared.policy:
        raise LookupError(f"{service.full_name}.{descriptor.name} declares no access or policy")
    if declared.owner and declared.owner not in fields:
        raise LookupError(f"{service.full_name}.{descriptor.name} has no field {declared.owner}")
    if declared.origin and declared.origin not in fields:
        raise LookupError(f"{service.full_name}.{descriptor.name} has no field {declared.origin}")
    own_role = service.GetOptions().Extensions[role]
    peers = declared.callers or [own_role]
    return Method(
        path=f"/{service.full_name}/{descriptor.name}",
        service=service.full_name,
        name=descriptor.name,
        role=own_role,
        request_type=GetMessageClass(descriptor.input_type),
        response_type=GetMessageClass(descriptor.output_type),
        streams=descriptor.server_streaming,
        policy=declared.policy,
        access=declared.access,
        key=declared.key,
        key_number=fields[declared.key].number if declared.key else None,
        owner=declared.owner,
        safe_to_repeat=declared.safe_to_repeat,
        unavailable=declared.unavailable,
        while_recovering=declared.while_recovering,
        needs_no_write=declared.needs_no_write,
        callers=frozenset(peers if declared.access == ACCESS_PEER else ["gateway"]),
        origin=declared.origin,
    )
