"""What goes wrong with a running mesh, and when: two hands at work, then everything heals.

Kinds, targets and lengths come from the seed. The machine's speed decides where in the users' work they
strike, so a seed repeats the plan and not the history.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from ops import control, mesh_file
from ops.nemesis.stage import RealMesh
from ops.simulation.history import History

HANDS = 2
"""So many faults at a time; fewer than centers, so that one is always undisturbed."""
PAUSE_BETWEEN_S = 2.0
BACK_WITHIN_S = 30.0
REFILL_INTERVAL_S = 0.1
DELAYS_MS = (20, 100, 300, 800)

Fault = Callable[[Random], Coroutine[Any, Any, None]]


class Faults:
    """Breaks things for a while, one after another and at the same time."""

    def __init__(self, stage: RealMesh, history: History, seed: int) -> None:
        self.made: Counter[str] = Counter()
        self.now: dict[str, str] = {}
        """What is broken at present, by center or link."""
        self._stage = stage
        self._history = history
        self._seed = seed
        self._links = list(stage.view().links)
        self._small = [name for name in stage.names if stage.has_small_disk(name)]
        self.skipped = (
            []
            if self._small
            else ["fill: no center has a small disk of its own (see docs/nemesis.md)"]
        )
        self._kinds: list[Fault] = [
            *(self._kill,) * 3,
            *(self._wipe,) * 2,
            *(self._pause,) * 2,
            *(self._cut,) * 2,
            *(self._isolate,) * 1,
            *(self._slow,) * 2,
            *((self._fill,) * 2 if self._small else ()),
        ]

    async def run(self, until_s: float) -> None:
        """Until that time; what was broken by then is repaired before this returns."""
        async with asyncio.TaskGroup() as hands:
            for number in range(min(HANDS, len(self._stage.names) - 1)):
                hands.create_task(self._hand(Random(f"hand {number} {self._seed}"), until_s))

    async def _hand(self, random: Random, until_s: float) -> None:
        while True:
            await asyncio.sleep(random.expovariate(1 / PAUSE_BETWEEN_S))
            if self._stage.now_s() > until_s:
                return
            await random.choice(self._kinds)(random)

    async def heal(self) -> None:
        """Brings everything back, whatever was done to it."""
        self._tell("everything heals")
        view = self._stage.view()
        for name in self._stage.names:
            if self._stage.has_small_disk(name):
                self._stage.free_disk(name)
            match view.centers[name].state:
                case "paused":
                    await self._control("center resume", center=name)
                case "killed" | "stopped" | "failed":
                    await self._control("center start", center=name)
        for link in view.links:
            first, second = link.split("-")
            await self._control("link heal", first=first, second=second)
        for name in self._stage.names:
            await self._calm(name)

    async def watch(self) -> None:
        """A process that ends by itself is a bug, whatever was done to the others."""
        for name, center in self._stage.view().centers.items():
            if center.state == "failed" and name not in self.now:
                self._history.broken.append(f"CRASH: a process of center {name} ended by itself")
                self._stage.disturb(name)
                await self._control("center start", center=name)
                await self._calm(name)

    async def _kill(self, random: Random) -> None:
        await self._away("kill", random, 3.0)

    async def _wipe(self, random: Random) -> None:
        await self._away("wipe", random, 2.0)

    async def _away(self, kind: str, random: Random, mean_s: float) -> None:
        name = self._take(random, self._stage.names, kind)
        if name is None:
            return
        self._stage.disturb(name)
        await self._control("center kill", center=name)
        if kind == "wipe":
            await asyncio.to_thread(shutil.rmtree, self._stage.jetstream(name), ignore_errors=True)
        await asyncio.sleep(random.expovariate(1 / mean_s))
        await self._control("center start", center=name)
        await self._calm(name)
        self._give(name, kind)

    async def _pause(self, random: Random) -> None:
        name = self._take(random, self._stage.names, "pause")
        if name is None:
            return
        self._stage.disturb(name)
        await self._control("center pause", center=name)
        await asyncio.sleep(random.expovariate(1 / 4.0))
        await self._control("center resume", center=name)
        await self._calm(name)
        self._give(name, "pause")

    async def _fill(self, random: Random) -> None:
        name = self._take(random, self._small, "fill")
        if name is None:
            return
        # Not a disturbance: users may rely on logins here all the while.
        until_s = self._stage.now_s() + random.expovariate(1 / 4.0)
        while self._stage.now_s() < until_s:
            await asyncio.to_thread(self._stage.fill_disk, name)
            await asyncio.sleep(REFILL_INTERVAL_S)
        self._stage.free_disk(name)
        await self._calm(name)
        self._give(name, "fill")

    async def _cut(self, random: Random) -> None:
        await self._links_cut(random, [self._take(random, self._links, "cut")], "cut")

    async def _isolate(self, random: Random) -> None:
        """All links of one center, as far as nobody else has a hand on them."""
        name = random.choice(list(self._stage.names))
        wanted = [link for link in self._links if name in link.split("-")]
        await self._links_cut(
            random, [self._take(random, [link], "isolate") for link in wanted], "isolate"
        )

    async def _links_cut(self, random: Random, taken: list[str | None], kind: str) -> None:
        links = [link for link in taken if link is not None]
        for link in links:
            first, second = link.split("-")
            await self._control("link cut", first=first, second=second)
        await asyncio.sleep(random.expovariate(1 / 5.0))
        for link in links:
            first, second = link.split("-")
            await self._control("link heal", first=first, second=second)
            self._give(link, kind)

    async def _slow(self, random: Random) -> None:
        link = self._take(random, self._links, "slow")
        if link is None:
            return
        first, second = link.split("-")
        delay_ms = random.choice(DELAYS_MS)
        await self._control("link delay", first=first, second=second, delay_ms=delay_ms)
        await asyncio.sleep(random.expovariate(1 / 6.0))
        await self._control("link heal", first=first, second=second)
        self._give(link, "slow")

    def _take(self, random: Random, targets: list[str] | Any, kind: str) -> str | None:
        """A target that nobody else has a hand on; None if there is none."""
        free = [target for target in targets if target not in self.now]
        if not free:
            return None
        target = random.choice(free)
        self.now[target] = kind
        self.made[kind] += 1
        self._tell(f"{kind} {target}")
        return target

    def _give(self, target: str, kind: str) -> None:
        del self.now[target]
        self._tell(f"{kind} {target} is over")

    async def _calm(self, name: str) -> None:
        try:
            await self._stage.calm(name, BACK_WITHIN_S)
        except TimeoutError:
            self._history.broken.append(
                f"BACK: center {name} serves nobody after {BACK_WITHIN_S} s"
            )

    async def _control(self, action: str, **arguments: object) -> None:
        try:
            await asyncio.to_thread(
                control.request, mesh_file.read(self._stage.state), action, **arguments
            )
        except control.ControlError as error:
            self._history.broken.append(f"CRASH: {action} {arguments}: {error}")

    def _tell(self, what: str) -> None:
        self._history.events.append((self._stage.now_s(), what))
