"""A user's other identifiers, as the user meets them: with one of them at home in each center."""

from collections.abc import Iterator

import pytest

from ops.drill import identifier_of
from tests.integration.conftest import Cli, RunningMesh, start_mesh, wait_until


def identifiers(count: int, center: str) -> list[str]:
    return [identifier_of(center, ["a", "b"]) for _ in range(count)]


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh of its own, as a center is killed."""
    running = start_mesh(tmp_path_factory.mktemp("mesh"))
    yield running
    assert running.stop() == 0


def login(cli: Cli, identifier: str, center: str) -> str:
    """Where the session is, for logging in by this identifier."""
    return str(cli.json("login", identifier, "--center", center)["account_id"])


def test_a_second_identifier_works_until_it_is_removed_and_outlives_either_center(
    mesh: RunningMesh,
) -> None:
    cli = mesh.cli
    (alice,), (second, third), (bob,) = (
        identifiers(1, "a"),
        identifiers(2, "b"),
        identifiers(1, "a"),
    )
    account = cli.json("register", alice)["account_id"]
    cli.json("register", bob)
    for user in (bob, alice):
        cli.json("login", user, "--center", "a")

    added = cli.json("identifier", "add", second.upper(), "--center", "a")
    assert added["identifiers"] == [alice, second]
    for center in ("a", "b"):
        assert login(cli, second, center) == account
    cli.json("fund", bob, "100")
    cli.json("fund", second, "1")
    assert cli.json("transfer", second, "25", "--from", bob)["state"] == "CREDITED"
    assert cli.json("balance", alice)["balance"]["minor_units"] == 26
    assert cli.refused("register", second)["reason"] == "IDENTIFIER_TAKEN"
    assert cli.refused("identifier", "add", second, "--user", bob)["reason"] == "IDENTIFIER_TAKEN"

    cli.json("center", "kill", "b")  # the second one's home
    refused = cli.refused("identifier", "add", third, "--user", alice, "--center", "a")
    assert refused["reason"] == "IDENTIFIER_HOME_UNAVAILABLE"
    assert login(cli, second, "a") == account
    cli.json("center", "start", "b")
    cli.json("center", "kill", "a")  # the account's
    wait_until(lambda: cli.run("login", second, "--center", "b").returncode == 0)
    added = cli.json("identifier", "add", third, "--user", second, "--center", "b")
    assert added["identifiers"] == [alice, *sorted((second, third))]
    cli.json("center", "start", "a")
    wait_until(lambda: cli.run("login", third, "--center", "a").returncode == 0)

    removed = cli.json("identifier", "remove", second, "--user", third, "--center", "a")
    assert removed["identifiers"] == [alice, third]
    wait_until(lambda: cli.run("login", second, "--center", "b").returncode == 1)
    shown = cli.json("identifier", "list", "--user", third, "--center", "b")
    assert shown["identifiers"] == [alice, third]
    assert (
        cli.refused("identifier", "remove", alice, "--user", third)["reason"] == "FIRST_IDENTIFIER"
    )
    assert cli.refused("register", second)["reason"] == "IDENTIFIER_TAKEN"
    wait_until(lambda: cli.json("verify")["passed"])


def test_a_route_is_shown_also_while_home_is_away(mesh: RunningMesh) -> None:
    cli = mesh.cli
    alice, second = identifier_of("a", ["a", "b"]), identifier_of("b", ["a", "b"])
    account = cli.json("register", alice)["account_id"]
    cli.json("login", alice)
    cli.json("identifier", "add", second)
    assert cli.json("verify")["passed"]  # so it is copied
    cli.json("center", "kill", "a")
    for user in (alice, second, account):
        found = cli.json("route", "show", user)
        assert (found["account_id"], found["centers"]) == (account, ["a", "b"])
        assert "Transfer" in found["if_home_died"]["waiting"]
        assert found["copies"]["b"]["entries"] >= 0
    said = cli.run("route", "show", alice).stdout
    assert "home a, then b (placement epoch 1)" in said
    assert "b has followed a up to" in said
    # What is said is what happens.
    assert cli.json("login", alice, "--center", "b")["account_id"] == account
    assert (
        cli.refused("transfer", second, "1", "--from", alice)["reason"] == "HOME_CENTER_UNAVAILABLE"
    )
    nobody = cli.json("route", "show", identifier_of("b", ["a", "b"]))
    assert (nobody.get("account_id", ""), nobody["centers"]) == ("", ["b", "a"])
    assert cli.refused("route", "show", "nobody")["reason"] == "INVALID_FIELD"
