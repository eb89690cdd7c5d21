"""What carries notifications out of the mesh, handed in: real servers, a simulator's, or a test's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Undelivered(Exception):
    """The receiver has not said that it has it. It may have it all the same.

    `reason` is one word that repeats nothing of the address or of the answer. `final`: another attempt
    would be refused too.
    """

    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Mail:
    """A message in plain text."""

    message_id: str
    """The part before the @."""
    recipient: str
    subject: str
    text: str
    time_ms: int


class Courier(Protocol):
    """Each returns once the receiver has said that it has it, within a bounded time."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        """Calls a webhook. Raises Undelivered."""
        ...

    async def mail(self, mail: Mail) -> None:
        """Hands a message to a mail server. Raises Undelivered."""
        ...
