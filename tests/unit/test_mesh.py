"""A center is lost after two failures in a row and back after two probes; while lost it is not asked."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc import StatusCode

import runtime.mesh
import tests.fakes
from duohuo.internal.v1.peer_services_pb2 import ProbeResponse
from runtime.endpoint import Call, Reply
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.methods import method
from tests.fakes import NOON_MS, Answer, FakeClock, RecordingEndpoint, fails, in_turn, says, see

CALL = Call(method("/duohuo.v1.AccountService/GetAccount"), b"", 1.0)
answers = says(ProbeResponse())
silent = fails(unreachable("b", ran=True))
says_another_is_silent = fails(RpcError.from_status(unreachable("c", ran=True).to_status()))
refuses = fails(RpcError(StatusCode.NOT_FOUND, "ACCOUNT_NOT_FOUND", "there is no such account"))
late = fails(RpcError(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "too late", ran=True))


class ProbedEndpoint:
    """Answers the probes of a script: 'y'es, 'n'o, or '.' never; tells when the script is done."""

    def __init__(self, script: str) -> None:
        self._left = iter(script)
        self.done = asyncio.Event()

    async def unary(self, call: Call) -> Reply:
        match next(self._left, None):
            case "y":
                return answers(call)
            case "n":
                return silent(call)
            case None:
                self.done.set()
        return await asyncio.Event().wait() and answers(call)

    async def stream(self, call: Call) -> AsyncIterator[bytes]:
        yield (await self.unary(call)).payload


async def probed(script: str, monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> list[bool]:
    """What a mesh believes of a center, in turn, that answers probes like this."""
    monkeypatch.setattr(runtime.mesh, "PROBE_INTERVAL_S", 0)
    monkeypatch.setattr(runtime.mesh, "PROBE_INTERVAL_LOST_S", 0)
    if "." in script:
        monkeypatch.setattr(runtime.mesh, "PROBE_TIMEOUT_S", 0)
    endpoint = ProbedEndpoint(script)
    mesh = Mesh("a", {"a": RecordingEndpoint(silent), "b": endpoint}, clock)
    beliefs = [mesh.reachable("b")]
    mesh.on_change(lambda center, reachable: beliefs.append(reachable and center == "b"))
    task = asyncio.ensure_future(mesh.run())
    await endpoint.done.wait()
    task.cancel()
    await asyncio.wait([task])
    assert beliefs[-1] is mesh.reachable("b")
    return beliefs


@pytest.mark.parametrize(
    ("script", "beliefs"),
    [
        ("yyy", [True]),
        ("n", [True]),
        ("nynyn", [True]),
        ("nn", [True, False]),
        ("nnn", [True, False]),
        ("nny", [True, False]),
        ("nnyny", [True, False]),
        ("nnyy", [True, False, True]),
        ("nnyyn", [True, False, True]),
        ("nnyynn", [True, False, True, False]),
        ("..", [True, False]),
        (".n", [True, False]),
    ],
)
async def test_two_probes_in_a_row_decide(
    script: str, beliefs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await probed(script, monkeypatch, FakeClock()) == beliefs


async def reason_of(mesh: Mesh, center: str = "b") -> str:
    """Why a call to a center fails; empty if it does not."""
    try:
        await mesh.unary(center, CALL)
    except RpcError as error:
        return error.reason
    return ""


async def test_a_lost_center_is_refused_at_once_and_definitely_not_asked() -> None:
    lost = RecordingEndpoint(silent)
    mesh = Mesh("a", {"a": RecordingEndpoint(answers), "b": lost}, FakeClock())
    assert [await reason_of(mesh) for _ in range(2)] == ["CENTER_UNREACHABLE"] * 2
    assert not mesh.reachable("b")
    with pytest.raises(RpcError) as refused:
        await mesh.unary("b", CALL)
    assert (refused.value.reason, refused.value.ran) == ("CENTER_UNREACHABLE", False)
    with pytest.raises(RpcError, match="CENTER_UNREACHABLE"):
        await anext(mesh.stream("b", CALL))
    assert len(lost.calls) == 2


@pytest.mark.parametrize(
    ("script", "reachable"),
    [
        ([silent, silent], False),
        ([silent, answers, silent], True),
        ([refuses, refuses, refuses], True),
        ([late, late, late], True),
        ([says_another_is_silent] * 3, True),
    ],
    ids=["silent twice", "silent, not in a row", "refuses", "late", "says so of another"],
)
async def test_only_silence_twice_in_a_row_counts_as_failure(
    script: list[Answer], reachable: bool
) -> None:
    other = RecordingEndpoint(in_turn(*script))
    mesh = Mesh("a", {"a": RecordingEndpoint(answers), "b": other}, FakeClock())
    for _ in script:
        await reason_of(mesh)
    assert mesh.reachable("b") is reachable


async def test_this_center_is_never_lost() -> None:
    own = RecordingEndpoint(silent)
    mesh = Mesh("a", {"a": own}, FakeClock())
    assert [await reason_of(mesh, "a") for _ in range(3)] == ["CENTER_UNREACHABLE"] * 3
    assert mesh.reachable("a")
    assert len(own.calls) == 3


async def test_a_center_of_another_mesh_is_unknown() -> None:
    mesh = Mesh("a", {"a": RecordingEndpoint(answers)}, FakeClock())
    assert await reason_of(mesh, "z") == "UNKNOWN_CENTER"
    assert not mesh.reachable("z")


@pytest.mark.parametrize(
    ("b", "c", "answered"), [("y", "y", True), ("y", "n", False), ("n", "ny", False)]
)
async def test_a_start_waits_until_every_center_has_answered_once(
    b: str, c: str, answered: bool
) -> None:
    mesh = tests.fakes.mesh("a", "a", "b", "c")
    for center, script in (("b", b), ("c", c)):
        for probe in script:
            mesh._record(center, answered=probe == "y")
    assert await mesh.wait_for_peers(timeout_s=0) is answered


async def test_it_is_known_since_when_a_center_is_lost() -> None:
    clock = FakeClock()
    mesh = Mesh("a", {"a": RecordingEndpoint(answers), "b": RecordingEndpoint(silent)}, clock)
    assert mesh.since_ms("b") == NOON_MS
    await reason_of(mesh)
    clock.advance(7)
    await reason_of(mesh)
    assert mesh.since_ms("b") == NOON_MS + 7


async def test_a_center_is_an_endpoint_like_any_other() -> None:
    own, other = RecordingEndpoint(answers), RecordingEndpoint(answers)
    mesh = Mesh("a", {"a": own, "b": other}, FakeClock())
    assert mesh.peers == ["b"]
    await mesh.at("a").unary(CALL)
    await mesh.at("b").unary(CALL)
    assert [message async for message in mesh.at("b").stream(CALL)] == [b""]
    assert (len(own.calls), len(other.calls)) == (1, 2)


async def test_who_is_lost_again_soon_must_answer_twice_as_often_to_be_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a flapping center is not left and rejoined all the time."""
    clock = FakeClock()
    assert await probed("nnyynnyynyyynyyyy", monkeypatch, clock) == [
        True,
        *(False, True),
        *(False, True),
    ]


async def test_a_calm_while_after_its_return_is_as_good_as_ever() -> None:
    clock = FakeClock()
    mesh = tests.fakes.mesh("a", "a", "b", clock=clock)
    for _ in range(3):
        see(mesh, "b", answering=False)
        for _ in range(runtime.mesh.IN_A_ROW):
            mesh._record("b", answered=True)
        assert mesh.reachable("b")
        clock.advance(runtime.mesh.SOON_MS)
