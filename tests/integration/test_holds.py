"""Holds, frozen accounts and limits on a running mesh, as users and operators meet them."""

import sqlite3
from contextlib import closing
from typing import Any

import pytest

from tests.integration.conftest import RunningMesh, wait_until
from tests.integration.test_main_path import new_user


def money(mesh: RunningMesh, user: str, center: str = "a") -> tuple[int, int]:
    """(booked, available)."""
    found = mesh.cli.json("balance", user, "--center", center)
    return found["balance"]["minor_units"], found["available"]["minor_units"]


@pytest.mark.parametrize(("payer_home", "payee_home"), [("a", "a"), ("a", "b")])
def test_what_is_held_is_captured_in_part_and_the_rest_is_back(
    mesh: RunningMesh, payer_home: str, payee_home: str
) -> None:
    payer, payee = new_user(mesh.cli, payer_home, 1000), new_user(mesh.cli, payee_home)
    hold = mesh.cli.json("reserve", payee, "600", "--from", payer, "--center", "b")
    assert hold["state"] == "HELD"
    assert money(mesh, payer) == (1000, 400)
    assert "400 of it available" in mesh.cli.run("balance", payer).stdout
    error = mesh.cli.refused("transfer", payee, "401", "--from", payer)
    assert error["reason"] == "INSUFFICIENT_FUNDS"
    capture = ("capture", hold["hold_id"], "--amount", "250", "--from", payer)
    done = mesh.cli.json(*capture, "--id", "capture-one")
    assert (done["hold"]["state"], done["transfer"]["state"]) == ("CAPTURED", "CREDITED")
    assert mesh.cli.json(*capture, "--id", "capture-one") == done
    assert (money(mesh, payer), money(mesh, payee)) == ((750, 750), (250, 250))
    assert mesh.cli.refused(*capture)["reason"] == "HOLD_CAPTURED"


def test_a_hold_is_released_or_expires_by_itself_and_copies_show_it(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "b", 1000), new_user(mesh.cli, "a")
    released = mesh.cli.json("reserve", payee, "300", "--from", payer)["hold_id"]
    for _ in range(2):
        assert mesh.cli.json("release", released, "--from", payer)["state"] == "RELEASED"
    mesh.cli.json("reserve", payee, "500", "--from", payer, "--for", "6")
    mesh.cli.json("reserve", payee, "100", "--from", payer)
    wait_until(lambda: open_holds(mesh, "a", payer) == open_holds(mesh, "b", payer) != [])
    wait_until(lambda: money(mesh, payer) == (1000, 900))
    wait_until(lambda: open_holds(mesh, "b", payer) == open_holds(mesh, "a", payer) == [100])
    assert mesh.cli.json("verify")["passed"] is True


def open_holds(mesh: RunningMesh, center: str, user: str) -> list[int]:
    """What a center's database says, copies too."""
    account = mesh.cli.json("whoami", user)["account_id"]
    path = mesh.cli.state / center / "stores" / "transfer.db"
    with closing(sqlite3.connect(path, timeout=10)) as database:
        rows = database.execute(
            "SELECT minor_units FROM hold WHERE payer_account_id = ? AND state = 2", (account,)
        )
        return sorted(row[0] for row in rows)


def test_while_home_is_away_nothing_is_held_and_the_refusal_says_what_to_do(
    mesh: RunningMesh,
) -> None:
    payer, payee = new_user(mesh.cli, "a", 1000), new_user(mesh.cli, "b")
    hold = mesh.cli.json("reserve", payee, "300", "--from", payer)["hold_id"]
    wait_until(lambda: open_holds(mesh, "b", payer) == [300])
    mesh.cli.json("center", "kill", "a")
    try:
        mesh.cli.json("login", payer, "--center", "b")
        error = mesh.cli.refused("capture", hold, "--from", payer, "--center", "b")
        assert (error["reason"], error["ran"]) == ("HOME_CENTER_UNAVAILABLE", False)
        assert "same transfer_id" in error["advice"]
        assert money(mesh, payer, "b") == (1000, 700)
    finally:
        mesh.cli.json("center", "start", "a")
    wait_until(lambda: mesh.cli.run("capture", hold, "--from", payer).returncode == 0, 60)
    assert money(mesh, payee, "b") == (300, 300)


def test_frozen_accounts_neither_pay_nor_receive_and_money_comes_back(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "a", 1000), new_user(mesh.cli, "b", 5)
    change = mesh.cli.json("account", "freeze", payee)
    assert (change["before"]["status"], change["after"]["status"]) == ("OPEN", "FROZEN")
    error = mesh.cli.refused("transfer", payee, "300", "--from", payer)
    assert (error["reason"], bool(error["advice"])) == ("PAYEE_FROZEN", True)
    assert money(mesh, payer) == (1000, 1000)
    mesh.cli.json("apply", payee, "300", "--from", payer)
    assert decided(mesh, payer) == ("FAILED", "PAYEE_FROZEN")
    assert mesh.cli.refused("transfer", payer, "1", "--from", payee)["reason"] == "ACCOUNT_FROZEN"
    mesh.cli.json("account", "unfreeze", payee)
    assert mesh.cli.json("transfer", payee, "300", "--from", payer)["state"] == "CREDITED"
    assert mesh.cli.json("verify")["passed"] is True


def decided(mesh: RunningMesh, payer: str) -> tuple[str, str]:
    """How the payer's only application ended."""
    found: list[dict[str, Any]] = []

    def ended() -> bool:
        found[:] = mesh.cli.json("applications", payer)["applications"]
        return "decide_time" in found[0]

    wait_until(ended)
    return found[0]["state"], found[0]["reason"]


def test_limits_and_closing_are_obeyed_and_explained(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "a", 1000), new_user(mesh.cli, "a")
    mesh.cli.json("account", "limits", payer, "--per-transfer", "600", "--per-day", "900")
    pay = ("transfer", payee, "--from", payer)
    assert mesh.cli.refused(*pay, "601")["reason"] == "LIMIT_PER_TRANSFER"
    mesh.cli.json(*pay, "600")
    mesh.cli.json("apply", payee, "301", "--from", payer)
    assert decided(mesh, payer) == ("FAILED", "LIMIT_PER_DAY")
    assert mesh.cli.json("account", "show", payer)["paid_today_minor_units"] == 600
    assert mesh.cli.refused("account", "close", payer)["reason"] == "ACCOUNT_NOT_EMPTY"
    mesh.cli.json("account", "limits", payer, "--per-day", "0")
    mesh.cli.json(*pay, "400")
    assert mesh.cli.json("account", "close", payer)["after"]["status"] == "CLOSED"
    assert mesh.cli.refused("transfer", payer, "1", "--from", payee)["reason"] == "PAYEE_CLOSED"
    assert mesh.cli.refused("account", "unfreeze", payer)["reason"] == "ACCOUNT_CLOSED"
