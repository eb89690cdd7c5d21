"""A poisoned entry is parked and told, holds nobody else back, and keeps `duohuo verify` honest."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from ops.drill import identifier_of
from runtime.ids import RandomIds, account_id
from runtime.placement import slot_of
from tests.integration.conftest import Cli, RunningMesh, wait_until
from tests.integration.test_main_path import balance, new_user

GARBAGE = b"\xff this is no record"


@contextmanager
def database(mesh: RunningMesh, center: str, role: str) -> Iterator[sqlite3.Connection]:
    """A running center's database, by hand."""
    path = mesh.cli.state / center / "stores" / f"{role}.db"
    with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
        yield connection


def append_garbage(mesh: RunningMesh, center: str, role: str, topic: str) -> str:
    """Adds an entry that cannot be decoded to a center's own log; returns its name."""
    with database(mesh, center, role) as rows:
        (seq,) = rows.execute(
            "UPDATE log_head SET seq = seq + 1 WHERE topic = ? RETURNING seq", (topic,)
        ).fetchone()
        rows.execute("INSERT INTO log VALUES (?, ?, ?)", (topic, seq, GARBAGE))
    return f"{center}/{topic}/{seq}"


def parked(mesh: RunningMesh, center: str) -> dict[str, str]:
    """Names and reasons of what waits at a center."""
    entries = mesh.cli.json("parked", "list", center)["entries"]
    return {"/".join(map(str, one["name"].values())): one["reason"] for one in entries}


def audited(mesh: RunningMesh, center: str, name: str) -> list[tuple[str, str, str]]:
    """What operators did about an entry, oldest first."""
    actions = mesh.cli.json("parked", "list", center)["actions"]
    return [
        (one["action"], one["before"], one["after"])
        for one in reversed(actions)
        if "/".join(map(str, one["name"].values())) == name
    ]


def verdict(cli: Cli) -> Any:
    """What `duohuo verify` finds when it must not pass."""

    done = cli.run("verify", "--wait-s", "2", "-o", "json")
    assert done.returncode == 1
    return json.loads(done.stdout)


def lines(found: Any) -> str:
    """Its violations, as people read them."""
    return "\n".join(one["line"] for one in found["violations"])


def test_what_cannot_be_decoded_is_parked_until_an_operator_drops_it(mesh: RunningMesh) -> None:
    roads = (("account", "accounts"), ("account", "changes"), ("transfer", "ledger"))
    names = [append_garbage(mesh, "a", *road) for road in roads]
    # Those behind it go on, on every road.
    user = new_user(mesh.cli, "a", 50)
    mesh.cli.json("profile", user, "--name", "Behind")
    wait_until(lambda: set(names) <= set(parked(mesh, "b")))
    wait_until(lambda: balance(mesh.cli, user, "b") == 50)
    wait_until(
        lambda: (
            mesh.cli.json("whoami", user, "--center", "b")["profile"]["display_name"] == "Behind"
        )
    )
    assert {parked(mesh, "b")[name] for name in names} == {"UNDECODABLE"}
    assert "PARKED" in mesh.cli.run("status").stdout
    told = lines(verdict(mesh.cli))
    assert all(f"of {topic} of center a could not be applied" in told for _, topic in roads)

    for name in names:
        assert mesh.cli.run("parked", "retry", "b", name).returncode == 1
        mesh.cli.json("parked", "drop", "b", name)
        assert audited(mesh, "b", name) == [
            ("retry", "parked: UNDECODABLE", "parked: UNDECODABLE"),
            ("drop", "parked: UNDECODABLE", "dropped"),
        ]
    assert parked(mesh, "b") == {}
    assert mesh.cli.json("verify")["passed"] is True
    assert all(center["state"] == "running" for center in mesh.described["centers"].values())


def test_a_parked_account_does_not_hold_back_what_follows_it(mesh: RunningMesh) -> None:
    user = identifier_of("a", ["a", "b"])
    planted = account_id(slot_of(user), RandomIds().unique())
    with database(mesh, "b", "account") as rows:
        rows.execute("INSERT INTO account VALUES (?, ?, '', 'nobody', 0)", (planted, user))
    mesh.cli.json("register", user)
    mesh.cli.json("login", user, "--center", "a")
    mesh.cli.json("profile", user, "--name", "Dependant", "--center", "a")
    wait_until(lambda: "IntegrityError" in parked(mesh, "b").values())
    (name,) = parked(mesh, "b")
    told = lines(verdict(mesh.cli))
    assert "of accounts of center a could not be applied" in told
    assert f"UNIQUE: center b, account {planted}: account " in told
    # Another account goes on; this one's password and profile are there before it.
    other = new_user(mesh.cli, "a")
    mesh.cli.json("login", other, "--center", "b")
    with database(mesh, "b", "account") as rows:
        rows.execute("DELETE FROM account WHERE account_id = ?", (planted,))
    mesh.cli.json("parked", "retry", "b", name)
    mesh.cli.json("login", user, "--center", "b")
    assert mesh.cli.json("whoami", user)["profile"]["display_name"] == "Dependant"
    assert mesh.cli.json("verify")["passed"] is True


def test_a_parked_posting_is_missed_until_it_is_retried(mesh: RunningMesh) -> None:
    payer, other = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "a", 100)
    payee = new_user(mesh.cli, "b")
    account = mesh.cli.json("whoami", payer)["account_id"]
    with database(mesh, "b", "transfer") as rows:
        rows.execute(
            f"CREATE TRIGGER poison BEFORE INSERT ON received WHEN new.payer_account_id = '{account}'"
            " BEGIN SELECT RAISE(ABORT, 'poisoned'); END"
        )
    first = mesh.cli.json("transfer", payee, "10", "--from", payer)
    assert first["state"] == "DEBITED"
    mesh.cli.json("transfer", payee, "20", "--from", payer)
    # Another payer's money is not held back.
    assert mesh.cli.json("transfer", payee, "5", "--from", other)["state"] == "CREDITED"
    assert balance(mesh.cli, payee, "b") == 5
    waiting = parked(mesh, "b")
    assert list(waiting.values()) == ["IntegrityError", "IntegrityError"]
    found = verdict(mesh.cli)
    assert "of ledger of center a could not be applied" in lines(found)
    assert sum("is on its way from a to b" in one for one in found["in_flight"]) == 2

    with database(mesh, "b", "transfer") as rows:
        rows.execute("DROP TRIGGER poison")
    # In the wrong order, and each only once.
    for name in reversed(list(waiting)):
        mesh.cli.json("parked", "retry", "b", name)
        assert mesh.cli.refused("parked", "retry", "b", name)["reason"] == "NOT_PARKED"
    assert balance(mesh.cli, payee, "b") == 35
    assert mesh.cli.json("verify")["passed"] is True
