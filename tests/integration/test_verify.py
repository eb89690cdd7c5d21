"""`duohuo verify` at real processes: it names what was changed by hand, and judges a mesh at work."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ops import verify
from tests.integration.conftest import RunningMesh
from tests.integration.load import load_on
from tests.integration.test_main_path import new_user
from tests.integration.test_poisoned_entries import database


def found(mesh: RunningMesh) -> list[dict[str, Any]]:
    """The violations, as programs get them; there must be some."""
    done = mesh.cli.run("verify", "--wait-s", "2", "-o", "json")
    assert done.returncode == 1, done.stdout + done.stderr
    violations: list[dict[str, Any]] = json.loads(done.stdout)["violations"]
    return violations


@contextmanager
def changed(
    mesh: RunningMesh, center: str, statement: str, back: str, *values: str
) -> Iterator[None]:
    """Somebody changes a database by hand, and later puts back what was there."""
    with database(mesh, center, "transfer") as rows:
        assert rows.execute(statement, values).rowcount == 1
    yield
    with database(mesh, center, "transfer") as rows:
        rows.execute(back, values)


@pytest.fixture(scope="module")
def paid(mesh: RunningMesh) -> tuple[str, str, str]:
    """Payer at a, payee at b, and the transfer between them."""
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b")
    transfer = mesh.cli.json("transfer", payee, "30", "--from", payer)
    assert transfer["state"] == "CREDITED"
    accounts = [mesh.cli.json("whoami", user)["account_id"] for user in (payer, payee)]
    assert mesh.cli.json("verify")["passed"] is True
    return accounts[0], accounts[1], transfer["transfer_id"]


def test_a_changed_entry_is_named_and_its_account_stands_still(
    mesh: RunningMesh, paid: tuple[str, str, str]
) -> None:
    payer, payee, transfer_id = paid
    with changed(
        mesh,
        "a",
        "UPDATE entry SET minor_units = minor_units + 1 WHERE account_id = ? AND transfer_id = ?",
        "UPDATE entry SET minor_units = minor_units - 1 WHERE account_id = ? AND transfer_id = ?",
        payer,
        transfer_id,
    ):
        chain = [one for one in found(mesh) if one["invariant"] == "CHAIN"]
        assert [(one["center"], one["account_id"], one["transfer_id"]) for one in chain] == [
            ("a", payer, transfer_id)
        ]
        assert chain[0]["number"] == 2
        text = mesh.cli.run("verify", "--wait-s", "2").stdout
        assert f"FAIL  CHAIN: center a, account {payer}, transfer {transfer_id}: entry 2" in text
        refused = mesh.cli.refused("fund", payer, "1", "--currency", "CNY")
        assert (refused["reason"], refused["ran"]) == ("LEDGER_DAMAGED", False)
        mesh.cli.json("fund", payee, "1", "--currency", "CNY")
    mesh.cli.json("fund", payer, "1", "--currency", "CNY")
    assert mesh.cli.json("verify")["passed"] is True


def test_a_changed_balance_and_a_changed_state_are_named(
    mesh: RunningMesh, paid: tuple[str, str, str]
) -> None:
    payer, payee, transfer_id = paid
    balance = "UPDATE ledger_account SET balance = balance {} 1 WHERE account_id = ?"
    with changed(mesh, "b", balance.format("+"), balance.format("-"), payee):
        violations = found(mesh)
        named = {(one["invariant"], one["center"], one["account_id"]) for one in violations}
        assert ("CONSERVE", "b", payee) in named
        assert any("the books of center b are off by 1 CNY" in one["line"] for one in violations)
    state = "UPDATE transfer SET state = {} WHERE payer_account_id = ? AND transfer_id = ?"
    with changed(mesh, "a", state.format(4), state.format(3), payer, transfer_id):
        lines = [one["line"] for one in found(mesh) if one["transfer_id"] == transfer_id]
        assert any("REFUNDED although center b has credited it" in line for line in lines)
    assert mesh.cli.json("verify")["passed"] is True


async def test_a_mesh_that_never_rests_gets_its_verdict(mesh: RunningMesh) -> None:
    """Users go on all the time: what is on its way is no fault, and every copy is compared."""
    async with load_on(mesh) as load:
        await load.more()
        before = load.registered
        report = await verify.verify(mesh.cli.state, 3)
        assert report.passed, report.text()
        await load.more()
        assert load.registered > before
        await load.settled()
