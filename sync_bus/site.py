"""What a center hands to each of its services."""

from dataclasses import dataclass
from random import Random

from grpc import StatusCode

from runtime.clock import Clock
from runtime.errors import RpcError, invalid
from runtime.ids import Ids, account_slot
from runtime.mesh import Mesh
from runtime.placement import Placement
from sync_bus.log import Stamps


@dataclass(frozen=True, slots=True)
class Site:
    """The outside world of a service: where it is, whom it can call, what time it is, new ids."""

    mesh: Mesh
    placement: Placement
    stamps: Stamps
    ids: Ids
    random: Random
    lone_start: bool = False
    """May an empty store begin although not all other centers have said what they have of it?"""
    log_entries_max: int = 1_000_000
    """So many entries of a topic are kept for a center that stays away; then it needs a snapshot."""

    @property
    def here(self) -> str:
        return self.mesh.here

    @property
    def clock(self) -> Clock:
        return self.stamps.clock

    def home_of(self, account: str) -> str:
        """The home center of an account id, as far as this process knows. Raises RpcError if it is no
        account id."""
        return self.placement.home(self.slot_of(account))

    def slot_of(self, account: str) -> int:
        """The slot inside an account id. Raises RpcError if it is no account id."""
        slot = account_slot(account)
        if slot is None:
            raise invalid("account_id", "is not an account id")
        return slot

    def require_believable_clock(self) -> None:
        """Raises CLOCK_WRONG while this center's clock is so wrong that the others would not believe
        what it stamps."""
        if self.mesh.clocks.local_is_wrong():
            raise RpcError(
                StatusCode.UNAVAILABLE,
                "CLOCK_WRONG",
                f"the clock of center {self.here} is more than an hour off",
                retry_after_ms=60_000,
                advice="Try again later; operators must set this center's clock right.",
                details={"center": self.here},
            )

    def unknown_here(self, account: str) -> RpcError:
        """What to say of an account that this center does not have: home knows, others may be late."""
        home = self.home_of(account)
        if home == self.here:
            return RpcError(StatusCode.NOT_FOUND, "ACCOUNT_NOT_FOUND", "there is no such account")
        return RpcError(
            StatusCode.UNAVAILABLE,
            "NOT_COPIED_YET",
            f"this account has not been copied from center {home} yet",
            retry_after_ms=1000,
        )
