"""Slots move between real centers under load: nobody notices, and nothing is lost, whoever dies."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import pytest

from ops.drill import identifier_of
from ops.simulation.history import Outcome
from runtime.errors import RpcError
from runtime.placement import slot_of
from tests.integration.conftest import RunningMesh, wait_until
from tests.integration.load import Load, load_on

pytestmark = pytest.mark.timeout(300)
NOTICED = {"WRONG_HOME", "SLOT_MOVING", "HOME_CENTER_UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL"}
ROUNDS = 2


async def move_everybody(load: Load) -> None:
    for user in load.users:
        slot = slot_of(user.identifier)
        home = load.stage.placement.home(slot)
        (other,) = (name for name in load.stage.names if name != home)
        await load.stage.move(home, slot, other)


async def test_users_go_on_while_their_slots_move(mesh: RunningMesh) -> None:
    async with load_on(mesh) as load:
        await load.more()
        before = len(load.history.operations)
        for _ in range(ROUNDS):
            await move_everybody(load)
        await load.more()
        assert noticed(load, before) == []
        homes = {load.stage.placement.epoch_of(slot_of(user.identifier)) for user in load.users}
        assert min(homes) > ROUNDS
        await load.settled()


async def test_centers_die_while_slots_move(mesh: RunningMesh) -> None:
    async with load_on(mesh) as load:
        await load.more()

        async def keep_moving() -> None:
            while True:
                with suppress(RpcError):
                    await move_everybody(load)
                await asyncio.sleep(0)

        moving = asyncio.create_task(keep_moving())
        for victim in load.stage.names:
            await load.more()
            load.stage.disturb(victim)
            await asyncio.to_thread(mesh.cli.json, "center", "kill", victim)
            await asyncio.to_thread(mesh.cli.json, "center", "start", victim)
            await load.stage.calm(victim, within_s=30.0)
        await load.more()
        moving.cancel()
        await asyncio.wait([moving])
        await load.settled()


def test_an_operator_moves_a_user(mesh: RunningMesh) -> None:
    cli = mesh.cli
    alice = identifier_of("a", ["a", "b"])
    account = cli.json("register", alice)["account_id"]
    cli.json("login", alice)
    cli.json("fund", alice, "500", "--currency", "CNY")
    slot = cli.json("route", "show", alice)["slot"]
    moved = cli.json("route", "move", alice, "--to", "b", "--epoch", "1")
    assert moved == {
        "slot": slot,
        "before": "a",
        "home": "b",
        "epoch": 2,
        "taken_over": True,
        "accounts_moved": 1,
    }
    for center in ("a", "b"):
        wait_until(lambda: cli.json("route", "show", alice)["centers"] == ["b", "a"])
        shown = cli.json("balance", alice, "--center", center)
        assert (shown["balance"]["minor_units"], shown["stale"]) == (500, False)
    assert "home b, then a (placement epoch 2)" in cli.run("route", "show", alice).stdout
    # What belongs to b goes on without a, and the other way round not without b.
    cli.json("center", "kill", "a")
    assert cli.json("fund", account, "1", "--currency", "CNY")["balance"]["minor_units"] == 501
    # A plan whose center is dead ends at once, and says how far it came.
    drained = cli.refused("route", "drain", "a")
    assert (drained["reason"], drained["ran"]) == ("CENTER_UNREACHABLE", False)
    cli.json("center", "start", "a")
    wait_until(lambda: cli.run("login", alice, "--center", "a").returncode == 0)
    statement = cli.run("statement", alice, "--format", "csv").stdout
    assert [line.split(",")[0] for line in statement.splitlines()] == ["number", "4", "1"]
    # Asked for again it is no other move; decided on what has changed since, it is none at all.
    again = cli.json("route", "move", "--slot", str(slot), "--to", "b", "--epoch", "1")
    assert (again["epoch"], again["accounts_moved"]) == (2, 0)
    refused = cli.refused("route", "move", alice, "--to", "a", "--epoch", "1")
    assert (refused["reason"], refused["ran"]) == ("STALE_EPOCH", False)
    assert cli.refused("route", "move", alice, "--to", "x")["reason"] == "UNKNOWN_CENTER"
    assert "either a user or --slot" in cli.refused("route", "move", "--to", "a")["message"]
    who = [one for one in cli.json("audit", "list")["actions"] if one["action"] == "hand over"]
    assert {(one["role"], one["target"], one["before"], one["after"]) for one in who} >= {
        (role, f"slot {slot}", "a", "b") for role in ("account", "transfer")
    }
    wait_until(lambda: cli.json("verify")["passed"])


async def test_a_drained_center_can_be_stopped_and_nobody_notices(
    mesh: RunningMesh, tmp_path: Path
) -> None:
    """But that whoever logged in there logs in again. Of the plan only what matters to these users is done:
    the other two thousand slots would take a minute."""
    plan = tmp_path / "plan.json"
    async with load_on(mesh) as load:
        await load.more()
        before = len(load.history.operations)
        run = asyncio.to_thread
        planned = await run(mesh.cli.json, "route", "plan", "--drain", "a", "--file", str(plan))
        assert {step["source"] for step in planned["steps"]} == {"a"}
        assert planned["accounts"] > 0
        ours = {slot_of(name) for user in load.users for name in (user.identifier, user.second)}
        some = [step for step in planned["steps"] if step["slot"] in ours]
        plan.write_text(json.dumps(some))
        for _ in range(2):  # the second time there is nothing left to be done
            moved = await run(mesh.cli.json, "route", "apply", str(plan))
            assert moved == {"moved": len(some), "overtaken": []}
        assert noticed(load, before) == []
        load.stage.disturb("a")
        before = len(load.history.operations)
        await run(mesh.cli.json, "center", "stop", "a")
        await load.more()
        homeless = [one for one in noticed(load, before) if "HOME_CENTER_UNAVAILABLE" in one]
        # But sessions end where they were made.
        assert [one for one in homeless if "logout" not in one] == []
        await run(mesh.cli.json, "center", "start", "a")
        await load.stage.calm("a", within_s=30.0)

        async def missing() -> set[int]:
            shares = await run(mesh.cli.json, "route", "plan", "--weights", "a=1,b=1")
            return {step["slot"] for step in shares["steps"] if step["to"] == "a"}

        async def a_knows_what_has_moved() -> bool:
            return await missing() >= {step["slot"] for step in some}

        # What has moved reaches the placement that plans are made from within a second.
        await load.until(a_knows_what_has_moved)
        back = await run(mesh.cli.json, "route", "undrain", "a")
        assert back["overtaken"] == []

        async def nothing_is_missing() -> bool:
            return await missing() == set()

        await load.until(nothing_is_missing)
        await load.more()
        await load.settled()


def noticed(load: Load, before: int) -> list[str]:
    """What users were told since, by then, that they should not have been."""
    ended = [one for one in load.history.operations[before:] if one.end_s]
    return [str(one) for one in ended if one.reason in NOTICED or one.outcome is Outcome.UNKNOWN]
