"""Placement: which center is home of which slot, as a process knows it.

`gateway.ring` computes the first one. It says where to ask; whether a center acts as home, its store says
(`sync_bus.homes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

SLOTS = 4096


def slot_of(identifier: str) -> int:
    """The slot of a normalised identifier: the unit of placement."""
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest()) % SLOTS


@dataclass(slots=True)
class Placement:
    """For every slot the centers in the order in which they may act for it; the first is home.

    `epoch` is the greatest of all slots; one that was never handed over is in its first one.
    """

    epoch: int
    centers: tuple[str, ...]
    order: list[tuple[str, ...]]
    moved: dict[int, int] = field(default_factory=dict)
    """The epochs of slots that were handed over."""
    _first_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self._first_epoch = self.epoch
        self.order = list(self.order)

    def copy(self) -> "Placement":
        """One that learns by itself, from what this one began with."""
        return Placement(self._first_epoch, self.centers, self.order)

    def begin_with(self, homes: Sequence[str]) -> None:
        """Takes the homes that the mesh began with, which need not be what is computed for the centers that
        it has by now. What was learned stays."""
        for slot, home in enumerate(homes):
            if slot not in self.moved and home != self.home(slot):
                self._put_first(slot, home)

    def home(self, slot: int) -> str:
        return self.order[slot][0]

    def epoch_of(self, slot: int) -> int:
        return self.moved.get(slot, self._first_epoch)

    def learn(self, slot: int, epoch: int, home: str) -> bool:
        """Takes a slot's home, unless that is old news; returns whether it was new. The others keep their
        order."""
        if epoch <= self.epoch_of(slot) or home not in self.centers:
            return False
        self._put_first(slot, home)
        self.moved[slot] = epoch
        self.epoch = max(self.epoch, epoch)
        return True

    def slots_of(self, center: str) -> int:
        """How many slots have this center as home."""
        return sum(1 for order in self.order if order[0] == center)

    def _put_first(self, slot: int, home: str) -> None:
        others = (center for center in self.order[slot] if center != home)
        self.order[slot] = (home, *others)
