"""What operators do while users are at work."""

from ops.simulation.history import Outcome
from ops.simulation.workload import User, Workload
from runtime.errors import RpcError
from runtime.placement import slot_of

FREEZE_EVERY_S = 12.0
FROZEN_S = 3.0
MOVE_EVERY_S = 5.0
ANNOUNCE_EVERY_S = 10.0
DRAIN_EVERY_S = 15.0
DRAINED_S = 4.0


async def freeze(workload: Workload, until_s: float) -> None:
    """Now and then one account for a moment; the others go on paying."""
    while workload.stage.now_s() < until_s:
        await workload.think(FREEZE_EVERY_S)
        # A deposit that was once refused would be so for ever.
        funded = [user for user in workload.users if user.funded]
        if funded:
            user = workload.random.choice(funded)
            await _set_frozen(workload, user, frozen=True)
            await workload.think(FROZEN_S)
            await _set_frozen(workload, user, frozen=False)


async def move(workload: Workload, until_s: float) -> None:
    """Now and then a user's slot to another center."""
    stage = workload.stage
    while stage.now_s() < until_s:
        await workload.think(MOVE_EVERY_S)
        user = workload.random.choice(workload.users)
        slot = slot_of(user.identifier)
        home = stage.placement.home(slot)
        to = workload.random.choice([name for name in stage.names if name != home])
        operation = workload.begin("move", user, slot=slot, to=to)
        try:
            await stage.move(home, slot, to)
            operation.outcome = Outcome.OK
        except RpcError as error:
            workload.examine(operation, error)
        operation.end_s = stage.now_s()
        stage.note(str(operation))


async def announce(workload: Workload, until_s: float) -> None:
    """Tells users something now and then, and lifts it again at any center, each until it is certain."""
    stage, raised, number = workload.stage, list[str](), 0
    while stage.now_s() < until_s:
        await workload.think(ANNOUNCE_EVERY_S)
        if raised and workload.random.random() < 0.5:
            await _repeat(workload, "lift", raised.pop())
        else:
            number += 1
            raised.append(f"{workload.prefix}announcement-{number}")
            await _repeat(workload, "announce", raised[-1])


async def drain(workload: Workload, until_s: float) -> None:
    """Now and then one center takes nothing new for a while."""
    stage = workload.stage
    while stage.now_s() < until_s:
        await workload.think(DRAIN_EVERY_S)
        center = workload.random.choice(stage.names)
        await _set_draining(workload, center, draining=True)
        await workload.think(DRAINED_S)
        await _set_draining(workload, center, draining=False)


async def _set_draining(workload: Workload, center: str, *, draining: bool) -> None:
    stage = workload.stage
    operation = workload.begin("drain" if draining else "undrain", workload.users[0], center=center)
    await workload.insist(operation, lambda: stage.set_draining(center, draining=draining))


async def _repeat(workload: Workload, kind: str, announcement_id: str) -> None:
    stage = workload.stage
    operation = workload.begin(kind, workload.users[0], id=announcement_id)
    act = stage.announce if kind == "announce" else stage.lift
    await workload.insist(
        operation, lambda: act(workload.random.choice(stage.names), announcement_id)
    )


async def _set_frozen(workload: Workload, user: User, *, frozen: bool) -> None:
    """At the account's home, repeated until it is certain."""
    stage = workload.stage
    operation = workload.begin("freeze" if frozen else "unfreeze", user)

    async def set_frozen() -> None:
        home = stage.placement.home(slot_of(user.identifier))
        await stage.set_frozen(home, user.account_id, frozen=frozen)

    await workload.insist(operation, set_frozen)
