"""A center whose disk takes nothing: users hear of it, and do elsewhere what can be done elsewhere."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ops.drill import identifier_of
from tests.integration.conftest import Cli, RunningMesh, wait_until

pytestmark = pytest.mark.timeout(180)
FULL = "cannot store anything now"


@contextmanager
def nothing_can_be_stored(mesh: RunningMesh, center: str) -> Iterator[None]:
    """Its services' files cannot grow: SQLite cannot write its log."""
    pid = mesh.described["centers"][center]["pids"]["serve"]
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def told(cli: Cli) -> list[str]:
    return [one["text"] for one in cli.json("announce", "list")["announcements"]]


def paths(cli: Cli, center: str) -> set[tuple[str, str]]:
    """What a center does not treat as healthy."""
    status = cli.json("status")["centers"][center]["status"]
    return {(one["center"], one["what"]) for one in status["paths"]}


def test_what_can_be_done_elsewhere_is(mesh: RunningMesh) -> None:
    cli = mesh.cli
    full, other = mesh.described["centers"]
    payer, payee = (identifier_of(full, [full, other]) for _ in range(2))
    for user in (payee, payer):
        cli.json("register", user)
        cli.json("login", user, "--center", other)
    cli.json("fund", payer, "1000", "--currency", "CNY")
    pay = ("transfer", payee, "5", "--from", payer, "--center", full)
    with nothing_can_be_stored(mesh, full):
        refused = cli.refused(*pay)
        assert (refused["reason"], refused["ran"]) == ("STORE_UNAVAILABLE", False)
        wait_until(lambda: any(FULL in text for text in told(cli)))
        assert any(FULL in text for text in cli.refused(*pay)["announced"])
        assert (full, "takes no writes") in paths(cli, other)
        queued = cli.json("apply", payee, "7", "--from", payer, "--center", full)
        assert queued["application_id"].startswith(f"q-{other}-")
        assert cli.json("balance", payer)["balance"]["minor_units"] == 1000
    wait_until(lambda: told(cli) == [])
    wait_until(lambda: cli.json("balance", payer)["balance"]["minor_units"] == 993)
    cli.json(*pay)
