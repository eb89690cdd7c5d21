"""What goes wrong, and when: all of it from the seed, and all of it healed in the end."""

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from ops.simulation.history import History
from ops.simulation.world import World

HOURS_BEHIND_MS = -7_200_000
WATCH_INTERVAL_S = 0.05
BY_HAND = (
    ("account", "UPDATE profile_field SET value = 'by hand' WHERE center = ?"),
    ("transfer", "UPDATE ledger_account SET balance = balance + 1 WHERE center = ?"),
    ("transfer", "UPDATE entry SET memo = 'by hand' WHERE center = ?"),
    ("transfer", "DELETE FROM entry WHERE center = ? AND number % 2 = 0"),
    ("transfer", "DELETE FROM received WHERE center = ?"),
    ("transfer", "UPDATE transfer SET memo = 'by hand' WHERE center = ?"),
    ("transfer", "DELETE FROM application WHERE origin = ?"),
    (
        "transfer",
        "INSERT OR IGNORE INTO received VALUES ('u000-by-hand', 'by hand', 'a', '', ?)",
    ),
)
"""What somebody does to copies of another center's rows."""


class Nemesis:
    """Breaks things for a while, one after another and at the same time, then heals everything."""

    def __init__(self, world: World, history: History) -> None:
        self._world = world
        self._history = history
        self._random = Random(f"faults {world.seed}")
        self._names = list(world.centers)
        conditions = world.network.conditions
        # Each seed has its own mix: one with every fault at once would never reach deep states.
        conditions.lose = self._random.choice((0.0, 0.0, 0.01, 0.05))
        conditions.duplicate = self._random.choice((0.0, 0.02, 0.1))
        conditions.slow = self._random.choice((0.0, 0.01, 0.05))
        conditions.hang_up = self._random.choice((0.0, 0.01, 0.05))
        conditions.unreceived = self._random.choice((0.0, 0.1, 0.4))
        for center in world.centers.values():
            center.clock.rate = 1 + self._random.choice((0.0, 0.0, 1e-4, -1e-4, 1e-2))
            center.clock.offset_ms = self._random.choice((0, 0, 0, 300, -300, 600_000, -600_000))
            center.broker.forgetful = self._random.choice((0.0, 0.0, 0.05))
            center.broker.repeating = self._random.choice((0.0, 0.05))
        world.log_entries_max = self._random.choice((20, 1_000_000, 1_000_000))
        # A copy that was changed by hand must not be the one that a lost disk is restored from, or that a
        # center becomes home with.
        rarest = self._random.choice((self._lose_disk, self._change_by_hand))
        world.may_move = rarest != self._change_by_hand
        self._faults: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = (
            self._crash,
            self._crash,
            self._cut,
            self._cut,
            self._cut_one_way,
            self._wipe_bus,
            self._stop_bus,
            self._jump_clock,
            self._fill_disk,
            self._slow_disk,
            self._away_for_long,
            rarest,
        )

    async def run(self, until_s: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            while self._world.loop.time() < until_s:
                await asyncio.sleep(self._random.expovariate(1 / 5.0))
                if self._world.loop.time() < until_s:
                    tasks.create_task(self._random.choice(self._faults)())
        self._heal()

    def _heal(self) -> None:
        self._tell("everything heals")
        conditions = self._world.network.conditions
        conditions.cut.clear()
        conditions.lose = conditions.duplicate = conditions.slow = conditions.hang_up = 0.0
        conditions.unreceived = 0.0
        for name, center in self._world.centers.items():
            center.disk.full, center.disk.slow_s = False, 0.0
            # A hold lasts until its home's clock says so: those behind are set right.
            center.clock.offset_ms = max(0, center.clock.offset_ms)
            center.broker.up = True
            center.broker.forgetful = center.broker.repeating = 0.0
            if not center.alive:
                self._world.start(name)

    def _tell(self, what: str) -> None:
        self._history.events.append((self._world.loop.time(), what))
        self._world.loop.note(what)

    def _center(self) -> str:
        return self._random.choice(self._names)

    async def _lasts(self, mean_s: float) -> None:
        await asyncio.sleep(self._random.expovariate(1 / mean_s))

    async def _crash(self) -> None:
        name = self._center()
        center = self._world.centers[name]
        if not center.alive:
            return
        self._tell(f"center {name} is killed")
        self._world.kill(name)
        await self._lasts(3)
        self._start_again(name)

    def _start_again(self, name: str) -> None:
        if not self._world.centers[name].alive:
            self._tell(f"center {name} starts again")
            self._world.start(name)

    async def _away_for_long(self) -> None:
        name = self._center()
        center = self._world.centers[name]
        if not center.alive:
            return
        self._tell(f"center {name} goes away for long, its bus too")
        self._world.kill(name)
        center.broker.up = False
        await self._lasts(30)
        center.broker.up = True
        self._start_again(name)

    async def _lose_disk(self) -> None:
        """A center comes back with an empty disk, once the others have all that it ever made."""
        name = self._center()
        for _ in range(200):
            center = self._world.centers[name]
            if center.alive and self._world.all_is_copied(name):
                self._tell(f"center {name} is killed, and its disk is lost")
                self._world.network.count("disk lost")
                self._world.kill(name)
                center.disk.lose()
                await self._lasts(3)
                self._start_again(name)
                return
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _change_by_hand(self) -> None:
        """Copies are changed behind the back of the service that keeps them."""
        name, source = self._random.sample(self._names, 2)
        role, statement = self._random.choice(BY_HAND)
        if self._world.disk(name).has(role):
            self._tell(f"at {name}, by hand: {statement} ({source})")
            self._world.network.count("changed by hand")
            self._world.disk(name).alter(role, statement, source)

    async def _cut(self) -> None:
        first, second = self._random.sample(self._names, 2)
        await self._cut_pairs({(first, second), (second, first)}, f"{first} and {second}")

    async def _cut_one_way(self) -> None:
        first, second = self._random.sample(self._names, 2)
        await self._cut_pairs({(first, second)}, f"{first} to {second}, one way")

    async def _cut_pairs(self, pairs: set[tuple[str, str]], what: str) -> None:
        cut = self._world.network.conditions.cut
        self._tell(f"the link {what} is cut")
        cut |= pairs
        await self._lasts(8)
        cut -= pairs
        self._tell(f"the link {what} is whole again")

    async def _wipe_bus(self) -> None:
        name = self._center()
        self._tell(f"the bus of {name} loses everything")
        self._world.centers[name].broker.wipe()

    async def _stop_bus(self) -> None:
        name = self._center()
        broker = self._world.centers[name].broker
        self._tell(f"the bus of {name} stops")
        broker.up = False
        await self._lasts(5)
        broker.up = True
        self._tell(f"the bus of {name} runs")

    async def _jump_clock(self) -> None:
        name = self._center()
        usual_ms = self._world.centers[name].clock.offset_ms
        offset_ms = self._random.choice((-600_000, -5_000, 5_000, 600_000, HOURS_BEHIND_MS))
        self._tell(f"the clock of {name} jumps to be {offset_ms} ms off")
        self._world.centers[name].clock.offset_ms = offset_ms
        if offset_ms == HOURS_BEHIND_MS:
            # It believes nobody until it is set right. Hours ahead would not heal in minutes: what it
            # has stamped by then is believed only when everybody's clock has come that far.
            await self._lasts(5)
            self._tell(f"the clock of {name} is set right")
            self._world.centers[name].clock.offset_ms = max(usual_ms, -600_000)

    async def _fill_disk(self) -> None:
        name = self._center()
        disk = self._world.centers[name].disk
        self._tell(f"the disk of {name} is full")
        disk.full = True
        await self._lasts(4)
        disk.full = False
        self._tell(f"the disk of {name} has room")

    async def _slow_disk(self) -> None:
        name = self._center()
        disk = self._world.centers[name].disk
        self._tell(f"the disk of {name} is slow")
        disk.slow_s = self._random.choice((0.05, 0.5))
        await self._lasts(5)
        disk.slow_s = 0.0
