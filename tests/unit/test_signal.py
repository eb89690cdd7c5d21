"""Nobody sleeps through a change."""

import asyncio

from runtime.signal import Signal


async def test_a_change_between_looking_and_waiting_is_not_lost() -> None:
    signal = Signal()
    changed = signal.next()
    signal.notify()
    assert await signal.wait(changed)


async def test_every_waiter_wakes() -> None:
    signal = Signal()
    waiting = [asyncio.ensure_future(signal.wait(signal.next())) for _ in range(3)]
    signal.notify()
    assert await asyncio.gather(*waiting) == [True, True, True]


async def test_waiting_ends_when_time_is_up() -> None:
    signal = Signal()
    assert not await signal.wait(signal.next(), timeout_s=0)


async def test_a_change_that_was_seen_does_not_wake_again() -> None:
    signal = Signal()
    changed = signal.next()
    signal.notify()
    assert await signal.wait(changed)
    assert not await signal.wait(signal.next(), timeout_s=0)


async def test_who_gives_up_waiting_does_not_deafen_the_others() -> None:
    signal = Signal()
    changed = signal.next()
    impatient = asyncio.ensure_future(signal.wait(changed))
    patient = asyncio.ensure_future(signal.wait(changed))
    assert not await signal.wait(changed, timeout_s=0)
    impatient.cancel()
    await asyncio.wait([impatient])
    signal.notify()
    assert await patient
