"""Applications are watched and cancelled at any center, while their origin or home is away."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import grpc
import pytest

from duohuo.v1 import transfer_service_pb2, transfer_service_pb2_grpc
from duohuo.v1.transfer_service_pb2 import Application, ApplicationState
from ops.client import Sessions
from ops.drill import identifier_of
from tests.integration.conftest import RunningMesh, start_mesh, wait_until

CENTERS = ["a", "b", "c"]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[RunningMesh]:
    running = start_mesh(tmp_path, "--centers", ",".join(CENTERS))
    yield running
    assert running.stop() == 0


class Watch:
    """A watch of a user's at a center, in a thread of its own."""

    def __init__(self, mesh: RunningMesh, user: str, center: str) -> None:
        login = Sessions.load(mesh.cli.state).of(user)
        self._channel = grpc.insecure_channel(mesh.described["centers"][center]["gateway"])
        self._stream = transfer_service_pb2_grpc.TransferServiceStub(
            self._channel
        ).WatchApplications(
            transfer_service_pb2.WatchApplicationsRequest(payer_account_id=login.account_id),
            metadata=(("authorization", f"Bearer {login.token}"),),
        )
        self.seen: list[Application] = []
        self._pool = ThreadPoolExecutor(1)
        self._following = self._pool.submit(self._follow)

    def states(self, application_id: str) -> list[str]:
        return [
            ApplicationState.Name(one.state).removeprefix("APPLICATION_STATE_")
            for one in self.seen
            if one.application_id == application_id
        ]

    def end(self) -> None:
        self._stream.cancel()
        self._pool.shutdown()
        self._channel.close()

    def _follow(self) -> None:
        with suppress(grpc.RpcError):  # it is cancelled at the end
            for application in self._stream:
                self.seen.append(application)


@pytest.mark.timeout(240)
def test_a_watch_at_another_center_outlives_the_origin_and_a_cancel_waits_for_home(
    three: RunningMesh,
) -> None:
    cli = three.cli
    payer, payee = identifier_of("a", CENTERS), identifier_of("c", CENTERS)
    for user in (payer, payee):
        cli.json("register", user)
    cli.json("fund", payer, "1000")
    cli.json("login", payer, "--center", "c")
    watch = Watch(three, payer, "c")
    cli.json("link", "cut", "a", "b")
    wait_until(lambda: not reachable(three, "b", "a"))

    # Home is away for b alone: b has to wait, and says so.
    transfer_id = uuid4().hex
    queued, withdrawn = (
        cli.json("apply", payee, "30", "--from", payer, "--center", "b", "--id", one)
        for one in (transfer_id, uuid4().hex)
    )
    assert (queued["state"], queued["attempts"]) == ("QUEUED", 0)
    assert queued["last_attempt_error"] == "CENTER_UNREACHABLE"
    cancelling = cli.json("cancel", withdrawn["application_id"], payer, "--center", "b")
    assert cancelling["state"] == "CANCELLING"
    wait_until(lambda: watch.states(queued["application_id"]) == ["QUEUED"])
    wait_until(lambda: watch.states(withdrawn["application_id"])[-1:] == ["CANCELLING"])

    # The origin is lost; the same transfer is paid at once, and the watch shows it.
    cli.json("center", "kill", "b")
    cli.json("transfer", payee, "30", "--from", payer, "--center", "c", "--id", transfer_id)
    wait_until(lambda: watch.states(queued["application_id"])[-1] == "SUCCEEDED")
    listed = {
        one["application_id"]: one["state"]
        for one in cli.json("applications", payer, "--center", "c")["applications"]
    }
    assert listed == {
        queued["application_id"]: "SUCCEEDED",
        withdrawn["application_id"]: "CANCELLING",
    }

    # It comes back, and so does its way to home: what was withdrawn ends, once.
    cli.json("center", "start", "b")
    cli.json("link", "heal", "a", "b")
    wait_until(lambda: watch.states(withdrawn["application_id"])[-1] == "CANCELLED", 60)
    assert cli.json("balance", payer, "--center", "c")["balance"]["minor_units"] == 970
    assert set(watch.states(withdrawn["application_id"])) <= {"QUEUED", "CANCELLING", "CANCELLED"}
    watch.end()
    wait_until(lambda: cli.run("verify").returncode == 0, 60)


def reachable(mesh: RunningMesh, center: str, peer: str) -> bool:
    """Does a center see another one?"""
    peers = mesh.cli.json("status")["centers"][center]["status"]["peers"]
    found: bool = next(one["reachable"] for one in peers if one["center"] == peer)
    return found
