"""Which URLs this center calls on a user's behalf, and at which addresses.

A user may name any server in the world, but must not make a center call its own network for them
(OWASP: server-side request forgery). So the address counts, not the name: it is checked when the URL is
saved, and again whenever it is called; what calls connects to the very address that was checked, as a
name may lead elsewhere a moment later.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import urlsplit

URL_LENGTH_MAX = 2048
RESOLVE_TIMEOUT_S = 3.0
_PRINTABLE = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_LOOKS_LIKE_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAT64 = IPv6Network("64:ff9b::/96")

Address = IPv4Address | IPv6Address
Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a host name; none if it has none, or nobody knows."""


class RefusedDestination(Exception):
    """A URL or an address that must not be called. The message repeats nothing of it."""


class Origin(NamedTuple):
    """Scheme, host and port of a URL."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Destinations:
    """The rules of one center."""

    resolve: Resolve
    http_allowed: bool = False
    """Are URLs allowed that are not encrypted?"""
    networks_allowed: Sequence[str] = ()
    """Private and loopback networks that may be called all the same."""

    def origin(self, url: str) -> Origin:
        """Checks everything but the address. Raises RefusedDestination."""
        if len(url) > URL_LENGTH_MAX:
            raise RefusedDestination(f"must have at most {URL_LENGTH_MAX} characters")
        if not _PRINTABLE.fullmatch(url) or "\\" in url:
            raise RefusedDestination("must be a URL of printable ASCII characters")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise RefusedDestination("must be a URL") from None
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise RefusedDestination("must be a URL such as https://example.com/hooks")
        if parts.scheme == "http" and not self.http_allowed:
            raise RefusedDestination("must begin with https://")
        if "@" in parts.netloc:
            raise RefusedDestination("must not hold a user name or a password")
        if "#" in url:
            raise RefusedDestination("must not have a fragment")
        if port == 0:
            raise RefusedDestination("must not name port 0")
        _check_host(parts.hostname)
        default = 443 if parts.scheme == "https" else 80
        return Origin(parts.scheme, parts.hostname, port or default)

    async def addresses(self, host: str) -> Sequence[str]:
        """The addresses of a host, all of which may be called. Raises RefusedDestination."""
        literal = _literal(host)
        found = [str(literal)] if literal else await self.resolve(host)
        if not found:
            raise RefusedDestination("its host has no address")
        # One that may not be called is enough: such an answer is made to be tried again and again.
        if not all(self.allows(address) for address in found):
            raise RefusedDestination("its host is in a network that is not called from here")
        return found

    def allows(self, address: str) -> bool:
        """May this address be called?"""
        inner = _innermost(ip_address(address))
        if any(inner in ip_network(network) for network in self.networks_allowed):
            return True
        return inner.is_global and not inner.is_multicast and not inner.is_reserved


async def system_resolve(host: str) -> Sequence[str]:
    """What the machine's resolver says."""
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM
            )
    except (OSError, UnicodeError):
        return ()
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def _check_host(host: str) -> None:
    """Names as in the DNS, and addresses in their usual form alone: a resolver also takes 2130706433,
    0x7f.1 and 0177.0.0.1 for 127.0.0.1."""
    if _literal(host):
        return
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise RefusedDestination("must name a host, such as example.com")
    if _LOOKS_LIKE_NUMBER.fullmatch(labels[-1]):
        raise RefusedDestination("must write an address in its usual form")


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
    if inner:
        return inner
    if address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
