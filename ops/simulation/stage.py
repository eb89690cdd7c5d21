"""What users and checks need of a mesh, so that a simulated and a real one can serve them alike."""

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

from runtime.endpoint import Endpoint
from runtime.ids import Ids
from runtime.placement import Placement


class Disk(Protocol):
    """The databases of one center."""

    def rows(self, name: str, sql: str, *values: Any) -> list[Any]:
        """What is in a service's database now."""
        ...


class Stage(Protocol):
    """A mesh on which users act."""

    @property
    def names(self) -> Sequence[str]:
        """All centers."""
        ...

    @property
    def placement(self) -> Placement:
        """As it is now, from what is on the disks."""
        ...

    def now_s(self) -> float: ...

    def now_ms(self) -> int:
        """The time on the users' clocks, in milliseconds since 1970."""
        ...

    def note(self, what: str) -> None:
        """Something was done; a simulator makes it part of the history hash."""
        ...

    def ids(self, random: Random) -> Ids: ...

    def disk(self, center: str) -> Disk: ...

    def has_all(self, center: str) -> bool:
        """Are its own rows on its disk? Not while it gets them back from the others."""
        ...

    def gateway(self, center: str) -> Endpoint:
        """Where users of a center call."""
        ...

    async def deposit(self, center: str, deposit_id: str, account_id: str, amount: int) -> None:
        """What an operator does at the account's home. Raises RpcError."""
        ...

    async def move(self, center: str, slot: int, to: str) -> None:
        """What an operator does at a slot's home to give it another one. Raises RpcError."""
        ...

    async def set_frozen(self, center: str, account_id: str, *, frozen: bool) -> None:
        """What an operator does at the account's home. Raises RpcError."""
        ...

    async def set_draining(self, center: str, *, draining: bool) -> None:
        """Has a center take nothing new, or take it again. Raises RpcError."""
        ...

    async def announce(self, center: str, announcement_id: str) -> None:
        """What an operator tells all users, at any center. Raises RpcError."""
        ...

    async def lift(self, center: str, announcement_id: str) -> None:
        """Ends what an operator has told, at any center. Raises RpcError."""
        ...

    async def erase(self, center: str, account_id: str) -> None:
        """What an operator does at the account's home. Raises RpcError."""
        ...

    def fits(self, stored: str, password: str) -> bool:
        """Is this the password that a center has stored?"""
        ...

    def undisturbed(self, center: str) -> object | None:
        """None while a login may fail there; a value that changes when the center is disturbed."""
        ...


def placed(stage: Stage, first: Placement) -> Placement:
    """The first placement, and all handovers of money that are on any disk."""
    found = first.copy()
    for name in stage.names:
        for slot, epoch, home in stage.disk(name).rows(
            "transfer", "SELECT slot, epoch, home FROM handover"
        ):
            found.learn(int(slot, 16), epoch, home)
    return found


def homes_of(stage: Stage, slot: int) -> list[str]:
    """All that were home of a slot, in their order."""
    handed: dict[int, tuple[str, str]] = {}
    for name in stage.names:
        for epoch, source, home in stage.disk(name).rows(
            "transfer",
            "SELECT epoch, source, home FROM handover WHERE slot = ?",
            f"{slot:03x}",
        ):
            handed[epoch] = source, home
    if not handed:
        return [stage.placement.home(slot)]
    return [handed[min(handed)][0], *(handed[epoch][1] for epoch in sorted(handed))]
