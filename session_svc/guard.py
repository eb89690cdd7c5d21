"""Which logins may be tried: limits on guessing, by identifier, by known device and by client address.

A known device is one that has logged in as this user before. It has a budget of its own, so that others who
guess lock nobody out there. Counts live in memory; centers tell each other what they have counted.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import (
    GuessFailures,
    ShareFailuresRequest,
    ShareFailuresResponse,
)
from runtime.dispatcher import Incoming
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.guesses import Attempt, Failures, Guesses, Policy
from runtime.methods import peer_method
from runtime.token_seal import TokenSeal
from sync_bus.site import Site

SHARE_INTERVAL_S = 1.0
SHARE_TIMEOUT_S = 2.0
SHARED_MAX = 500
_SHARE = peer_method("session", "ShareFailures")


class Allowances(NamedTuple):
    """So many failures are free, before waits follow."""

    identifier: int = 5
    device: int = 20
    address: int = 100


@dataclass(slots=True)
class Trial:
    """One login, from its beginning to its end."""

    may_be_made: bool
    """If not, it must look and cost as one with a wrong password."""
    was_evaluated: bool = False
    """Set once an answer may depend on the password."""
    succeeded: bool = False


@dataclass(slots=True)
class _Peer:
    """Another center: its process that was heard last, and up to which change that one has been told."""

    process: str = ""
    told: int = 0


class Guard:
    """Run `run` for as long as the service lives: it tells the other centers."""

    def __init__(self, site: Site, seal: TokenSeal, allowances: Allowances) -> None:
        self._site = site
        self._seal = seal
        self._process = f"{site.here}-{site.ids.unique()}"
        self._guesses = Guesses(self._process, site.clock)
        self._peers = {peer: _Peer() for peer in site.mesh.peers}
        self._identifiers = Policy(allowances.identifier, 30_000, 900_000)
        self._devices = Policy(allowances.device, 30_000, 900_000)
        self._addresses = Policy(allowances.address, 1_000, 60_000)

    @contextmanager
    def trial(self, identifier: str, proof: str, address: str) -> Iterator[Trial]:
        """A login as `identifier` (in normal form) from a device with this proof, perhaps of nothing.

        Raises RpcError GUESSES_LIMITED if too many have failed from the address.
        """
        begun: list[Attempt] = []
        device = self._seal.device_of(identifier, proof)
        if device is not None:
            decisive = self._guesses.begin("device", device, self._devices)
        else:
            if address:
                begun.append(self._from_address(address))
            decisive = self._guesses.begin("identifier", identifier, self._identifiers)
        if not decisive.wait_ms:
            begun.append(decisive)
        trial = Trial(may_be_made=not decisive.wait_ms)
        try:
            yield trial
        finally:
            for attempt in begun:
                self._guesses.end(attempt, failed=trial.was_evaluated and not trial.succeeded)

    def proof(self, identifier: str, proof: str) -> str:
        """What a device shows at its next login: what it has shown now, if that was good."""
        if self._seal.device_of(identifier, proof) is not None:
            return proof
        return self._seal.device_proof(identifier, self._site.ids.secret())

    def _from_address(self, address: str) -> Attempt:
        attempt = self._guesses.begin("address", address, self._addresses)
        if attempt.wait_ms:
            raise RpcError(
                StatusCode.RESOURCE_EXHAUSTED,
                "GUESSES_LIMITED",
                "too many logins from this address have failed",
                retry_after_ms=attempt.wait_ms,
                advice="Devices on which a user has logged in before are not concerned.",
            )
        return attempt

    async def ShareFailures(
        self, request: ShareFailuresRequest, _incoming: Incoming
    ) -> ShareFailuresResponse:
        peer = self._peers.get(request.center)
        if peer is not None:
            if request.process != peer.process:
                peer.process, peer.told = request.process, 0
            for told in request.failures:
                self._guesses.merge(Failures(told.key, dict(told.counts), told.age_ms))
        return ShareFailuresResponse()

    async def run(self) -> None:
        """Tells every other center once a second, if there is something to tell, and at first always."""
        while True:
            await asyncio.sleep(SHARE_INTERVAL_S)
            await asyncio.gather(*(self._tell(name) for name in self._peers))

    async def _tell(self, name: str) -> None:
        peer = self._peers[name]
        process, told = peer.process, peer.told
        failures, change = self._guesses.since(told, SHARED_MAX)
        if told and not failures:
            return
        request = ShareFailuresRequest(
            center=self._site.here,
            process=self._process,
            failures=[GuessFailures(key=f.key, counts=f.counts, age_ms=f.age_ms) for f in failures],
        )
        try:
            await ask(
                self._site.mesh.at(name), _SHARE, request, ShareFailuresResponse, SHARE_TIMEOUT_S
            )
        except RpcError:
            return
        if peer.process == process:
            peer.told = change
