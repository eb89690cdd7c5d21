"""Wakes whoever waits for the next change, without losing one that comes in between."""

import asyncio


class Signal:
    """Take `next()` before looking at the state, and await it only if there is nothing to do."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def next(self) -> "asyncio.Future[None]":
        """A future that ends at the next `notify`. Shared: shield it from cancellation."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return self._next

    def notify(self) -> None:
        """Ends the future handed out by `next`."""
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    async def wait(self, changed: "asyncio.Future[None]", timeout_s: float | None = None) -> bool:
        """Waits for a future from `next`, at most so long; False if nothing happened."""
        done, _ = await asyncio.wait([changed], timeout=timeout_s)
        return bool(done)
