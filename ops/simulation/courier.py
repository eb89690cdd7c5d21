"""Users' servers and mailboxes as their worst selves: they lose, delay, take twice, and answer in vain."""

from collections import defaultdict
from collections.abc import Mapping
from random import Random

from duohuo import webhooks
from ops.simulation.network import Network
from transfer_svc.courier import Mail, Undelivered

TIMEOUT_S = 10.0
WEBHOOK_URL = "https://127.0.0.1/hook/"
"""An address that no real mesh would call: there, users are refused."""
SECRET = "a-secret-of-the-simulation"  # noqa: S105 - it guards nothing


async def nowhere(_host: str) -> list[str]:
    """There are no names in a simulation."""
    return []


class Receivers:
    """What has reached users, by id and channel: each content once, whatever came how often."""

    def __init__(self) -> None:
        self.contents: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.refused: list[str] = []
        """Calls that a receiver would not believe."""

    def called(self, headers: Mapping[str, str], body: bytes) -> None:
        try:
            # Not how old it is: the centers' clocks are wrong.
            event = webhooks.verified(
                body, headers.get(webhooks.HEADER), SECRET, now_s=0, tolerance_s=float("inf")
            )
        except webhooks.InvalidWebhook as invalid:
            self.refused.append(str(invalid))
        else:
            self.contents[event["id"], "webhook"].add(body.decode())

    def mailed(self, mail: Mail) -> None:
        self.contents[mail.message_id, "email"].add(f"{mail.recipient}: {mail.text}")


class SimulatedCourier:
    """One center's way to them."""

    def __init__(self, network: Network, receivers: Receivers, random: Random) -> None:
        self._network = network
        self._receivers = receivers
        self._random = random

    async def post(self, _url: str, headers: Mapping[str, str], body: bytes) -> None:
        await self._reach()
        self._receivers.called(headers, body)
        await self._answer()

    async def mail(self, mail: Mail) -> None:
        await self._reach()
        self._receivers.mailed(mail)
        await self._answer()

    async def _reach(self) -> None:
        await self._network.pause(self._random.random() * 0.05)
        if self._random.random() < self._network.conditions.unreceived:
            self._network.count("notification lost")
            await self._network.pause(self._random.choice((0.0, TIMEOUT_S)))
            raise Undelivered("TIMEOUT")

    async def _answer(self) -> None:
        if self._random.random() < self._network.conditions.unreceived:
            self._network.count("notification received in vain")
            raise Undelivered("HTTP_500")
