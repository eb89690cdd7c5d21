"""A user takes everything along, and is erased: from every file of every center, also one that was away."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ops.drill import identifier_of
from tests.integration.conftest import Cli, RunningMesh, start_mesh, wait_until

NAME = "Canary von Alice"
DEVICE = "canary telephone"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[RunningMesh]:
    running = start_mesh(tmp_path / "mesh")
    yield running
    if running.process.poll() is None:
        running.stop()


def identifier(center: str) -> str:
    return identifier_of(center, ["a", "b"])


def someone(cli: Cli, center: str) -> str:
    made = identifier(center)
    cli.json("register", made)
    cli.json("login", made, "--center", center)
    return made


def leave_traces(cli: Cli) -> tuple[str, str, str]:
    """A user who did everything that leaves something behind; two identifiers, and the account's id."""
    alice, second, bob = someone(cli, "a"), identifier("b"), someone(cli, "b")
    for center in ("a", "b"):
        account = cli.json("login", alice, "--center", center, "--device", DEVICE)["account_id"]
        cli.json("profile", "--name", f"{NAME} {center}", "--center", center)
    cli.json("identifier", "add", second, "--center", "b")
    cli.json("fund", alice, "100")
    cli.json("transfer", bob, "100", "--from", alice)
    wait_until(lambda: _knows(cli, "a", alice, second) and _knows(cli, "b", alice, second))
    return alice, second, str(account)


def _knows(cli: Cli, center: str, user: str, second: str) -> bool:
    found = cli.json("whoami", user, "--center", center)
    return second in found["identifiers"] and found["profile"]["display_name"] == f"{NAME} b"


def kept(state: Path, *wanted: str) -> list[tuple[str, str]]:
    """Which of these the databases of a mesh that does not run still hold, in any byte of any file."""
    found = []
    databases = sorted(state.glob("*/stores/*.db"))
    assert len(databases) >= 8
    for path in databases:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for file in path.parent.glob(path.name + "*"):
            data = file.read_bytes()
            found += [(str(file), one) for one in wanted if one.encode() in data]
    return found


def test_erased_everywhere_also_where_nobody_was(mesh: RunningMesh, tmp_path: Path) -> None:
    cli = mesh.cli
    alice, second, account = leave_traces(cli)
    cli.json("export", str(tmp_path / "alice.json"), alice)
    exported = json.loads((tmp_path / "alice.json").read_text())
    assert exported["account"]["identifiers"] == [alice, second]
    assert {f"{NAME} a", f"{NAME} b"} <= {one.get("value") for one in exported["values"]}
    assert DEVICE in {one["device"] for one in exported["sessions"]}
    assert len(exported["entries"]) == 2
    assert "hash" not in json.dumps(exported["values"])
    assert "is there already" in cli.refused("export", str(tmp_path / "alice.json"))["message"]

    cli.json("center", "kill", "b")
    erased = cli.json("account", "erase", alice, "--yes")
    assert (erased["account_id"], erased["waiting_for"]) == (account, ["b"])
    cli.json("center", "start", "b")
    wait_until(
        lambda: not cli.json("account", "erase", account, "--yes").get("waiting_for"), within_s=60
    )
    for center in ("a", "b"):
        for name in (alice, second):
            assert cli.refused("login", name, "--center", center)["reason"] == "BAD_CREDENTIALS"
    wait_until(lambda: cli.json("verify")["passed"], within_s=60)
    (action,) = [
        one
        for one in cli.json("audit", "list", "--target", account)["actions"]
        if one["action"] == "erase"
    ]
    assert action["target"] == account
    assert cli.json("account", "show", account)["status"] == "CLOSED"
    wait_until(lambda: not _in_logs(cli.state, alice, second, NAME))
    assert mesh.stop() == 0
    assert kept(cli.state, alice, second, NAME, DEVICE) == []


def _in_logs(state: Path, *wanted: str) -> bool:
    """Are there entries of it that a center has not forgotten yet?"""
    for path in state.glob("*/stores/*.db"):
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            try:
                records = [row[0] for row in database.execute("SELECT record FROM log")]
            except sqlite3.OperationalError:
                continue  # it keeps none
            if any(one.encode() in record for record in records for one in wanted):
                return True
    return False


def test_who_has_money_is_not_erased(mesh: RunningMesh) -> None:
    cli = mesh.cli
    alice = someone(cli, "a")
    cli.json("fund", alice, "1")
    assert cli.refused("account", "erase", alice, "--yes")["reason"] == "ACCOUNT_NOT_EMPTY"
    assert cli.json("whoami", alice)["identifiers"] == [alice]
    asked = cli.run("account", "erase", alice)  # nobody says yes
    assert asked.returncode == 1
    assert cli.json("whoami", alice)["identifiers"] == [alice]
