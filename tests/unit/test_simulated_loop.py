"""The simulator's loop keeps asyncio's promises, on virtual time."""

import asyncio

from ops.simulation.loop import Incarnation, SimulatedLoop


def test_a_pause_takes_simulated_time() -> None:
    loop = SimulatedLoop("seed")

    async def main() -> float:
        await loop.pause(2.5)
        return loop.time()

    assert loop.run(main()) == 2.5


def test_a_pause_that_is_cancelled_twice_ends_once() -> None:
    loop = SimulatedLoop("seed")
    ended = []

    async def pause() -> None:
        try:
            await loop.pause(5)
        except asyncio.CancelledError:
            ended.append(loop.time())
            raise

    async def main() -> None:
        pausing = asyncio.create_task(pause())
        await loop.pause(1)
        pausing.cancel()
        pausing.cancel()
        await asyncio.wait([pausing])
        assert pausing.cancelled()
        await loop.pause(10)

    loop.run(main())
    assert ended == [1]
    assert loop.escaped == []


def test_a_killed_process_runs_no_more_code() -> None:
    loop = SimulatedLoop("seed")
    ran = []

    async def work() -> None:
        try:
            await loop.pause(1)
            ran.append("after")
        finally:
            ran.append("finally")

    async def main() -> None:
        process = Incarnation(loop, "process")
        process.spawn(work())
        await loop.pause(0.5)
        process.dead = True
        await loop.pause(5)
        assert ran == []

    loop.run(main())


def test_what_a_callback_raises_is_reported() -> None:
    loop = SimulatedLoop("seed")

    def fails() -> None:
        raise ValueError("a bug")

    async def main() -> None:
        loop.call_later(0, fails)
        await loop.pause(1)

    loop.run(main())
    assert loop.escaped == ["a callback failed: ValueError('a bug')"]
