"""How fast a center answers while something else goes on: one user who asks again and again."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ops.bench.benchmark import Figures, percentile

PAUSE_S = 0.01
CALLS_MIN = 20
"""Percentiles of fewer calls than this say nothing."""


@dataclass(slots=True)
class Calls:
    """How long each call took, in ms. The first one that fails ends the measurement."""

    call: Callable[[], Coroutine[Any, Any, object]]
    took_ms: list[float] = field(default_factory=list)
    pause_s: float = PAUSE_S

    async def run_for(self, duration_s: float) -> None:
        """Asks for so long. Raises what a call raises."""
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self.run()

    async def run(self) -> None:
        """Asks until cancelled. Raises what a call raises."""
        while True:
            started = time.perf_counter()
            await self.call()
            self.took_ms.append((time.perf_counter() - started) * 1000)
            await asyncio.sleep(self.pause_s)

    def figures(self, when: str) -> Figures:
        """Percentiles, named after when it was: `p99_before_ms`. None if there were too few calls."""
        if len(self.took_ms) < CALLS_MIN:
            return {}
        return {f"p{percent}_{when}_ms": percentile(self.took_ms, percent) for percent in (50, 99)}
