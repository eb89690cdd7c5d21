"""Calls webhooks over HTTP: strangers' servers, in which nothing is trusted.

httpcore does nothing by itself: it follows no redirect, asks no proxy, keeps no cookie. What connects is
handed to it, and connects to an address that has been checked (`runtime.destinations`), while the
certificate is checked for the name in the URL. Of an answer only its status is read.
"""

import asyncio
import ssl
from collections.abc import Iterable, Mapping
from typing import Any

import httpcore

from runtime.destinations import Destinations, RefusedDestination
from transfer_svc.courier import Undelivered

TIMEOUT_S = 10.0
"""For all of a call, from looking up the name to the status."""
CONNECTIONS_MAX = 64
_GONE = 410


class WebhookClient:
    """POSTs; any 2xx means that the receiver has it."""

    def __init__(
        self,
        destinations: Destinations,
        timeout_s: float = TIMEOUT_S,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        """`trusted` says which certificates are good; those that the machine trusts, if left out."""
        self._destinations = destinations
        self._timeout_s = timeout_s
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=trusted or ssl.create_default_context(),
            max_connections=CONNECTIONS_MAX,
            max_keepalive_connections=0,  # an address counts as checked for one call only
            network_backend=_Checked(destinations),
        )

    async def close(self) -> None:
        await self._pool.aclose()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        """Raises Undelivered."""
        try:
            self._destinations.origin(url)
            async with asyncio.timeout(self._timeout_s):
                status = await self._status(url, headers, body)
        except RefusedDestination:
            raise Undelivered("REFUSED_DESTINATION") from None
        except (TimeoutError, httpcore.TimeoutException):
            raise Undelivered("TIMEOUT") from None
        except Exception as error:  # noqa: BLE001 - no stranger's server may stop a center
            raise Undelivered(f"NO_ANSWER_{type(error).__name__}") from None
        if not 200 <= status < 300:
            raise Undelivered(f"HTTP_{status}", final=status == _GONE)

    async def _status(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        async with self._pool.stream(
            "POST", url, headers=list(headers.items()), content=body
        ) as answer:
            return answer.status


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to checked addresses alone, whatever the name leads to at any other moment."""

    def __init__(self, destinations: Destinations) -> None:
        self._destinations = destinations
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failed: Exception | None = None
        for address in await self._destinations.addresses(host):
            try:
                return await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        assert failed is not None  # noqa: S101 - there is at least one address
        raise failed
