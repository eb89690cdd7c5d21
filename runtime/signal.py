"""Wakes whoever waits for the next change, without losing one that comes in between."""

import asyncio


class Signal:
    """Take `next()` before looking at the state, and wait for it only if there is nothing to do."""

    def __init__(self) -> None:
        self._changes = 0
        # In the order of their coming: a set would wake them in another order in each process.
        self._waiting: dict[asyncio.Future[bool], None] = {}

    def next(self) -> int:
        """The number of the next change."""
        return self._changes + 1

    def notify(self) -> None:
        """Something has changed."""
        self._changes += 1
        for waiting in self._waiting:
            _answer(waiting, changed=True)
        self._waiting.clear()

    async def wait(self, change: int, timeout_s: float | None = None) -> bool:
        """Waits for a change by its number, at most so long; False if it has not come."""
        if self._changes >= change:
            return True
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[bool] = loop.create_future()
        self._waiting[waiting] = None
        timer = None if timeout_s is None else loop.call_later(timeout_s, _answer, waiting, False)
        try:
            return await waiting
        finally:
            self._waiting.pop(waiting, None)
            if timer is not None:
                timer.cancel()


def _answer(waiting: "asyncio.Future[bool]", changed: bool) -> None:
    if not waiting.done():
        waiting.set_result(changed)
