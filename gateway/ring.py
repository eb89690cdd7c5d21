"""Computes a placement: consistent hashing with virtual nodes, bounded load and weights.

Karger et al., "Consistent Hashing and Random Trees" (1997); Mirrokni, Thorup, Zadimoghaddam,
"Consistent Hashing with Bounded Loads" (2016). Slots lie evenly on the ring; each goes to the first
virtual node clockwise whose center still has room. Same centers and weights, same placement.
"""

from bisect import bisect_left
from collections.abc import Mapping
from hashlib import blake2b
from math import ceil

from runtime.placement import SLOTS, Placement

VIRTUAL_NODES = 2048
LOAD_FACTOR = 1.035
_RING = 1 << 64


def compute(weights: Mapping[str, int], epoch: int) -> Placement:
    """The placement of all slots on centers of these weights (1 each for equal ones).

    No center gets more than `LOAD_FACTOR` of its share. Raises ValueError without a positive weight.
    """
    total = sum(weights.values())
    if not weights or min(weights.values()) < 0 or total == 0:
        raise ValueError("placement needs at least one center with a positive weight")
    ring = sorted(
        (_position(f"{center}/{number}"), center)
        for center, weight in weights.items()
        for number in range(VIRTUAL_NODES * weight)
    )
    room = {
        center: ceil(SLOTS * weight / total * LOAD_FACTOR) for center, weight in weights.items()
    }
    if len(weights) == 1:
        room = dict.fromkeys(weights, SLOTS)
    with_slots = sum(1 for weight in weights.values() if weight)
    positions = [position for position, _ in ring]
    order: list[tuple[str, ...]] = [()] * SLOTS
    for slot in range(SLOTS):
        start = bisect_left(positions, slot * (_RING // SLOTS))
        preferred = _walk(ring, start, with_slots)
        home = next(center for center in preferred if room[center] > 0)
        room[home] -= 1
        order[slot] = (home, *(center for center in preferred if center != home))
    return Placement(epoch, tuple(sorted(weights)), order)


def _walk(ring: list[tuple[int, str]], start: int, centers: int) -> list[str]:
    """The distinct centers in clockwise order from a position on the ring."""
    found: dict[str, None] = {}
    for step in range(len(ring)):
        found.setdefault(ring[(start + step) % len(ring)][1])
        if len(found) == centers:
            break
    return list(found)


def _position(label: str) -> int:
    return int.from_bytes(blake2b(label.encode(), digest_size=8).digest())
