"""Placement: which center is home of which slot. Data only; `gateway.ring` computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

SLOTS = 4096


def slot_of(identifier: str) -> int:
    """The slot of a normalised identifier: the unit of placement."""
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest()) % SLOTS


@dataclass(frozen=True, slots=True)
class Placement:
    """For every slot the centers in the order in which they may act for it; the first is home."""

    epoch: int
    centers: tuple[str, ...]
    order: Sequence[tuple[str, ...]]

    def home(self, slot: int) -> str:
        return self.order[slot][0]

    def slots_of(self, center: str) -> int:
        """How many slots have this center as home."""
        return sum(1 for order in self.order if order[0] == center)
