"""What services rely on in a store, whichever database is behind it."""

import asyncio
import itertools
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.store import Store, Unit, query
from tests.contract.backends import BACKENDS, Backend

ACKNOWLEDGED_BEFORE_THE_KILL = 300
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    opened: Backend = BACKENDS[request.param](tmp_path)
    yield opened
    await opened.close()


@pytest.fixture
async def store(backend: Backend) -> Store:
    return await backend.open()


def put(name: str, amount: int = 1) -> Unit[str]:
    yield from query("INSERT INTO item VALUES (?, ?)", name, amount)
    return name


def names() -> Unit[list[str]]:
    rows = yield from query("SELECT name FROM item ORDER BY name")
    return [row[0] for row in rows]


def put_and_fail(name: str) -> Unit[None]:
    yield from put(name)
    raise KeyError(name)


def committed_names(backend: Backend) -> list[str]:
    return [row[0] for row in backend.committed("SELECT name FROM item ORDER BY name")]


async def test_a_unit_returns_its_result_and_its_effect_is_there(store: Store) -> None:
    assert await store.write("put", put("x")) == "x"
    assert await store.read(names()) == ["x"]


async def test_a_unit_that_raises_has_no_effect_and_its_caller_gets_what_it_raised(
    store: Store, backend: Backend
) -> None:
    with pytest.raises(KeyError, match="x"):
        await store.write("fail", put_and_fail("x"))
    assert await store.read(names()) == []
    assert committed_names(backend) == []


async def test_a_unit_that_raises_leaves_those_beside_it_alone(
    store: Store, backend: Backend
) -> None:
    outcomes = await asyncio.gather(
        store.write("put", put("before")),
        store.write("fail", put_and_fail("bad")),
        store.write("put", put("after")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [str, KeyError, str]
    assert committed_names(backend) == ["after", "before"]


async def test_a_unit_sees_what_those_before_it_did(store: Store) -> None:
    def add() -> Unit[int]:
        rows = yield from query(
            "INSERT INTO item VALUES ('x', 1)"
            " ON CONFLICT (name) DO UPDATE SET amount = amount + 1 RETURNING amount"
        )
        amount: int = rows[0][0]
        return amount

    amounts = await asyncio.gather(*(store.write("add", add()) for _ in range(50)))
    assert sorted(amounts) == list(range(1, 51))


async def test_callers_are_answered_only_once_everybody_can_see_their_effect(
    store: Store, backend: Backend
) -> None:
    async def write_and_look(name: str) -> bool:
        await store.write("put", put(name))
        return name in committed_names(backend)

    assert all(await asyncio.gather(*(write_and_look(f"{n}") for n in range(50))))


async def test_nobody_sees_a_unit_before_it_is_whole(store: Store, backend: Backend) -> None:
    seen: list[list[str]] = []

    def look_in_between() -> Unit[None]:
        yield from put("first")
        seen.append(committed_names(backend))
        yield from put("second")

    await store.write("put two", look_in_between())
    assert seen == [[]]
    assert committed_names(backend) == ["first", "second"]


async def test_many_waiting_writes_share_commits(store: Store) -> None:
    commits: list[None] = []
    store.on_commit(lambda: commits.append(None))
    await asyncio.gather(*(store.write("put", put(f"{n}")) for n in range(100)))
    assert 1 <= len(commits) <= 10


async def test_every_listener_hears_of_a_commit_and_finds_it_done(
    store: Store, backend: Backend
) -> None:
    heard: list[list[str]] = []
    store.on_commit(lambda: heard.append(committed_names(backend)))
    store.on_commit(lambda: heard.append(["second listener"]))
    await store.write("put", put("x"))
    assert heard == [["x"], ["second listener"]]


async def test_a_caller_that_stops_waiting_leaves_whole_units_and_a_usable_store(
    store: Store,
) -> None:
    def pair(n: int) -> Unit[None]:
        yield from put(f"{n} left")
        yield from put(f"{n} right")

    waiting = [asyncio.ensure_future(store.write("pair", pair(n))) for n in range(20)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=0)
    for task in waiting[::2]:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await store.write("put", put("last"))
    found = await store.read(names())
    assert {f"{n} left" for n in range(1, 20, 2)} | {"last"} <= set(found)
    assert all(f"{n} left" in found and f"{n} right" in found for n in range(1, 20, 2))
    assert all((f"{n} left" in found) == (f"{n} right" in found) for n in range(20))


@pytest.mark.parametrize("amount", [-1, 1], ids=["CHECK", "PRIMARY KEY"])
async def test_a_broken_constraint_reaches_the_unit_which_may_go_on(
    store: Store, amount: int
) -> None:
    def try_another() -> Unit[str]:
        yield from put("x" if amount < 0 else "taken")
        try:
            yield from put("taken", amount)
        except sqlite3.IntegrityError:
            return (yield from put("another"))
        return "no error"

    assert await store.write("try another", try_another()) == "another"
    kept = "x" if amount < 0 else "taken"
    assert await store.read(names()) == sorted([kept, "another"])


async def test_a_broken_constraint_that_nobody_catches_undoes_the_unit(store: Store) -> None:
    def pay_too_much() -> Unit[None]:
        yield from put("payee", 10)
        yield from put("payer", -10)

    with pytest.raises(sqlite3.IntegrityError):
        await store.write("pay", pay_too_much())
    assert await store.read(names()) == []


async def test_a_reading_unit_sees_one_moment(store: Store) -> None:
    def twice() -> Unit[tuple[list[str], list[str]]]:
        first = yield from names()
        return first, (yield from names())

    await store.write("put", put("x"))
    writing = asyncio.ensure_future(store.write("put", put("y")))
    first, second = await store.read(twice())
    assert first == second
    await writing


async def test_a_reading_unit_that_raises_does_not_spoil_the_next(store: Store) -> None:
    def fail() -> Unit[None]:
        yield from names()
        raise KeyError

    with pytest.raises(KeyError):
        await store.read(fail())
    await store.write("put", put("x"))
    assert await store.read(names()) == ["x"]


async def test_a_reading_unit_cannot_write(store: Store) -> None:
    with pytest.raises(sqlite3.Error):
        await store.read(put("x"))
    assert await store.read(names()) == []


async def test_closing_finishes_what_waits(store: Store, backend: Backend) -> None:
    """More than one commit takes."""
    waiting = [asyncio.ensure_future(store.write("put", put(f"{n}"))) for n in range(1200)]
    await asyncio.wait(waiting, timeout=0)
    await backend.close()
    assert len(await asyncio.gather(*waiting)) == len(committed_names(backend)) == 1200


async def test_a_store_opened_again_holds_what_was_written(store: Store, backend: Backend) -> None:
    await store.write("put", put("x"))
    await backend.close()
    assert await (await backend.open()).read(names()) == ["x"]


def run_and_kill(program: list[str]) -> set[str]:
    """What a program had printed, in whole lines, when it was killed amid its work."""
    child = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert child.stdout is not None
    with child.stdout as printed:
        lines = list(itertools.islice(printed, ACKNOWLEDGED_BEFORE_THE_KILL))
        child.kill()
        lines += printed
    assert child.wait() == -signal.SIGKILL
    return {line.rstrip("\n") for line in lines if line.endswith("\n")}


async def test_what_was_acknowledged_survives_kill_9(backend: Backend, tmp_path: Path) -> None:
    name = next(name for name, kind in BACKENDS.items() if isinstance(backend, kind))
    program = [sys.executable, "-m", "tests.contract.acknowledging_writer", name, str(tmp_path)]
    acknowledged = await asyncio.to_thread(run_and_kill, program)
    assert len(acknowledged) >= ACKNOWLEDGED_BEFORE_THE_KILL
    assert acknowledged <= set(await (await backend.open()).read(names()))
