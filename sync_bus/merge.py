"""Last writer wins, by hybrid logical clock; the center's name breaks ties, so all decide alike."""

from typing import NamedTuple


class Version(NamedTuple):
    """When and where a value was written. Greater wins."""

    hlc: int
    center: str


def wins(candidate: Version, present: Version | None) -> bool:
    """Does the candidate replace what is there? A version never replaces itself."""
    return present is None or candidate > present
