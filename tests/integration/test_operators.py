"""What operators see and do at a running mesh when its data, or its clocks, are not in order."""

import sqlite3
from contextlib import closing
from typing import Any

from ops.drill import identifier_of
from tests.integration.conftest import RunningMesh, wait_until


def parked(mesh: RunningMesh, center: str) -> int:
    """How many parked entries `duohuo status` counts at a center."""
    roads = mesh.cli.json("status")["centers"][center]["status"]["roads"]
    return sum(road["parked"] for road in roads)


def write_by_hand(mesh: RunningMesh, center: str, statement: str, *values: str) -> None:
    path = mesh.cli.state / center / "stores" / "account.db"
    with closing(sqlite3.connect(path, timeout=10)) as database, database:
        database.execute(statement, values)


def test_an_entry_that_conflicts_is_parked_seen_and_retried(mesh: RunningMesh) -> None:
    poisoned, other = identifier_of("a", ["a", "b"]), identifier_of("a", ["a", "b"])
    write_by_hand(mesh, "b", "INSERT INTO account VALUES ('planted', ?, '', 'nobody', 0)", poisoned)
    mesh.cli.json("register", poisoned)
    mesh.cli.json("register", other)
    wait_until(lambda: parked(mesh, "b") == 1)
    # Those behind it go on: the other account arrives, and b lets its user in.
    mesh.cli.json("login", other, "--center", "b")
    assert "PARKED" in mesh.cli.run("status").stdout

    (entry,) = mesh.cli.json("parked", "list", "b")["entries"]
    assert (entry["reason"], entry["kind"]) == ("IntegrityError", "account_created")
    name = "/".join(str(entry["name"][key]) for key in ("source_center", "topic", "seq"))
    failed = mesh.cli.run("parked", "retry", "b", name)
    assert failed.returncode == 1
    assert "parked: IntegrityError" in failed.stdout

    write_by_hand(mesh, "b", "DELETE FROM account WHERE account_id = 'planted'")
    (done,) = mesh.cli.json("parked", "retry", "b", name)["actions"]
    assert (done["who"], done["after"]) == ("operator", "applied")
    assert parked(mesh, "b") == 0
    found: dict[str, Any] = mesh.cli.json("parked", "list", "b")
    assert [action["after"] for action in found["actions"]] == ["applied", "parked: IntegrityError"]
    assert mesh.cli.json("verify")["passed"] is True
    assert mesh.cli.refused("parked", "drop", "b", name)["reason"] == "NOT_PARKED"
    logs = "".join(file.read_text() for file in mesh.cli.state.rglob("*.log"))
    assert logs.count("operator action: retry parked entry") == 2
    assert poisoned not in logs


def test_why_tells_which_writes_of_an_account_count(mesh: RunningMesh) -> None:
    user = identifier_of("b", ["a", "b"])
    account = mesh.cli.json("register", user)["account_id"]
    mesh.cli.json("login", user)
    mesh.cli.json("profile", user, "--name", "Second")
    mesh.cli.json("passwd", user, DUOHUO_NEW_PASSWORD="another-good-one")

    def everywhere() -> bool:
        told = mesh.cli.json("why", user)
        names, passwords = told["fields"]["display_name"], told["fields"]["password"]
        assert told["account_id"] == account
        assert [one["value"] for one in passwords] == ["", ""]
        return [(one["value"], one["counts_at"]) for one in names] == [
            ("", []),
            ("Second", ["a", "b"]),
        ]

    wait_until(everywhere)
    text = mesh.cli.run("why", account).stdout
    assert "(withheld)" in text
    assert "argon2" not in text
