"""A center whose disk takes nothing: users hear of it, and do elsewhere what can be done elsewhere."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from duohuo.v1.operator_service_pb2 import SetDrainingRequest, SetDrainingResponse
from ops.client import ask_operator
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


def entrance(mesh: RunningMesh, center: str) -> int:
    """What load balancers hear of a gateway."""
    with grpc.insecure_channel(mesh.described["centers"][center]["gateway"]) as channel:
        asked = health_pb2.HealthCheckRequest(service="duohuo.v1.SessionService")
        stub: Any = health_pb2_grpc.HealthStub(channel)  # it has no types
        return int(stub.Check(asked, timeout=5).status)


async def test_a_drained_center_takes_nothing_new(mesh: RunningMesh) -> None:
    """Its slots stay in this test: moving them is another's, and takes a minute."""
    cli, (drained, other) = mesh.cli, mesh.described["centers"]
    alice, bob = (identifier_of(drained, [drained, other]) for _ in range(2))
    for user in (alice, bob):
        cli.json("register", user)
    assert cli.json("login", alice, "--center", drained)["origin_center"] == drained
    for draining in (True, False):
        request = SetDrainingRequest(draining=draining)
        await ask_operator(cli.state, drained, "SetDraining", request, SetDrainingResponse)
        serving = health_pb2.HealthCheckResponse.NOT_SERVING if draining else 1
        assert entrance(mesh, drained) == serving
        maker = other if draining else drained
        assert cli.json("login", alice, "--center", drained)["origin_center"] == maker
        queued = cli.json("apply", bob, "7", "--from", alice, "--center", drained)
        assert queued["application_id"].startswith(f"q-{maker}-")
        if draining:
            refused = cli.refused("route", "drain", other)
            assert (refused["reason"], refused["ran"]) == ("LAST_CENTER", False)
            assert f"{drained}       running, drained" in cli.run("status").stdout
