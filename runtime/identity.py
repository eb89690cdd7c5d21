"""Who calls inside the mesh, as a certificate says it, and what that allows.

A certificate names its owner as DNS names, one for each role that it serves:

    <role>.<center>.duohuo.internal      gateway.a.duohuo.internal

so a caller knows from the usual check of host names (RFC 9525) that it talks to the service that it meant,
and a service knows who calls. A role that serves nothing, such as `client`, may connect, and call nothing.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from cryptography import x509
from google.protobuf.message import Message
from grpc import StatusCode

from runtime.errors import RpcError
from runtime.ids import CENTER_NAME
from runtime.methods import Method

DOMAIN = "duohuo.internal"
_NAME = re.compile(rf"([a-z]+)\.({CENTER_NAME.pattern})\.{re.escape(DOMAIN)}")


class Identity(NamedTuple):
    """A center, and the roles in which it speaks."""

    center: str
    roles: frozenset[str]

    def __str__(self) -> str:
        return f"{self.center} {','.join(sorted(self.roles))}"

    @classmethod
    def parse(cls, text: str) -> "Identity":
        """What `str` made."""
        center, _, roles = text.partition(" ")
        return cls(center, frozenset(roles.split(",")))

    @property
    def names(self) -> list[str]:
        """What a certificate for it says."""
        return [name_of(role, self.center) for role in sorted(self.roles)]


def name_of(role: str, center: str) -> str:
    """The name by which a role of a center is known."""
    return f"{role}.{center}.{DOMAIN}"


def identity_of(names: Iterable[str]) -> Identity | None:
    """Whose names these are; None if not all are names of one center's roles."""
    found = [_NAME.fullmatch(name) for name in names]
    matches = [match for match in found if match is not None]
    centers = {match[2] for match in matches}
    if len(matches) != len(found) or len(centers) != 1:
        return None
    return Identity(centers.pop(), frozenset(match[1] for match in matches))


class Certified(NamedTuple):
    """Whose certificate it is, and which one."""

    identity: Identity | None
    serial: int


@lru_cache(maxsize=256)
def certified(pem: bytes) -> Certified:
    """What a certificate says, which has been checked already. Raises ValueError."""
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Certified(None, certificate.serial_number)
    return Certified(
        identity_of(names.get_values_for_type(x509.DNSName)), certificate.serial_number
    )


def admit(method: Method, request: Message, caller: Identity) -> None:
    """Holds a call to what the .proto declares of its callers. Raises RpcError ROLE, ORIGIN_MISMATCH."""
    if not caller.roles & method.callers:
        raise no_role(f"{caller} may not call {method.path[1:]}")
    if method.origin and getattr(request, method.origin) != caller.center:
        raise RpcError(
            StatusCode.PERMISSION_DENIED,
            "ORIGIN_MISMATCH",
            f"the {method.origin} that is named is not the one that calls, {caller.center}",
        )


def no_role(message: str) -> RpcError:
    """Refuses a caller for what its certificate says, or does not say."""
    return RpcError(StatusCode.PERMISSION_DENIED, "ROLE", message)
