"""`duohuo why` tells one story from the spans of all centers: in order of time, causes above effects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

import ops.why
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    ApplicationFact,
    DecisionFact,
    FieldVersion,
    FindSpansRequest,
    FindSpansResponse,
    FindTransfersRequest,
    FindTransfersResponse,
    ListVersionsRequest,
    ListVersionsResponse,
    SpanRecord,
    TransferFacts,
)
from duohuo.v1.transfer_service_pb2 import APPLICATION_STATE_QUEUED, TRANSFER_STATE_FAILED
from ops import mesh_file
from ops.mesh_file import CenterView, MeshView
from ops.output import Failure
from ops.why import tell
from runtime.clock import timestamp
from runtime.errors import unreachable
from runtime.hlc import COUNTER_BITS
from tests.fakes import account

NOON_NS = 1_900_000_000_000_000_000
VIEW = CenterView("running", "h:1", "h:2", "tls://h:3", "h:4", "/nowhere", {})
MESH = MeshView("h:5", 1, "", None, {"a": VIEW, "b": VIEW}, {})


def span(
    span_id: str, at_ms: int, parent: str = "", trace: str = "t1", **attributes: str
) -> SpanRecord:
    return SpanRecord(
        trace_id=trace,
        span_id=span_id,
        parent_span_id=parent,
        name=f"step {span_id}",
        start_unix_nanos=NOON_NS + at_ms * 1_000_000,
        end_unix_nanos=NOON_NS + (at_ms + 2) * 1_000_000,
        attributes={f"duohuo.{key}": value for key, value in attributes.items()},
        status="OK",
    )


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sequence[SpanRecord] | None]:
    """The spans of each center; None is silent."""
    spans: dict[str, Sequence[SpanRecord] | None] = {"a": [], "b": []}

    async def ask(
        _state: Path, center: str, path: str, request: Message, _response: type[Message]
    ) -> Message:
        if path == "FindTransfers":
            if spans[center] is None:
                raise unreachable(center, ran=False)
            return FindTransfersResponse()
        assert isinstance(request, FindSpansRequest)
        found = spans[center]
        if found is None:
            raise unreachable(center, ran=False)
        wanted = [span for span in found if request.id in ("wanted", span.trace_id)]
        return FindSpansResponse(spans=wanted)

    monkeypatch.setattr(mesh_file, "read", lambda _state: MESH)
    monkeypatch.setattr(ops.why, "ask_operator", ask)
    return spans


async def story() -> list[str]:
    """The names of the told steps, indented as they are shown."""
    text, _ = await tell(Path(), "wanted")
    steps = [line for line in text.splitlines() if " ms  " in line]
    return [line.split(" ms  ")[1][3:].split(" (")[0] for line in steps]


async def test_steps_stand_under_their_causes_in_order_of_time(
    known: dict[str, Sequence[SpanRecord] | None],
) -> None:
    known["a"] = [span("late", 9, "root"), span("root", 0), span("deep", 5, "early")]
    known["b"] = [span("early", 3, "root")]
    assert await story() == ["step root", "  step early", "    step deep", "  step late"]


async def test_a_step_whose_cause_is_lost_is_told_at_its_time(
    known: dict[str, Sequence[SpanRecord] | None],
) -> None:
    known["b"] = [span("orphan", 1, "forgotten"), span("child", 2, "orphan")]
    known["a"] = [span("second", 5), span("first", 0)]
    assert await story() == ["step first", "step orphan", "  step child", "step second"]


async def test_a_step_that_two_centers_know_is_told_once(
    known: dict[str, Sequence[SpanRecord] | None],
) -> None:
    known["a"] = known["b"] = [span("root", 0)]
    assert await story() == ["step root"]


async def test_traces_are_told_one_after_the_other_the_oldest_first(
    known: dict[str, Sequence[SpanRecord] | None],
) -> None:
    known["a"] = [span("x", 5, trace="young"), span("y", 1, trace="old")]
    known["b"] = [span("z", 9, trace="old")]
    _, data = await tell(Path(), "wanted")
    told = {trace: [s["span_id"] for s in spans] for trace, spans in data["traces"].items()}
    assert list(told.items()) == [("old", ["y", "z"]), ("young", ["x"])]


async def test_a_line_says_when_where_how_long_and_what_went_wrong(
    known: dict[str, Sequence[SpanRecord] | None],
) -> None:
    bad = span("root", 0, center="b", hop="forwarded", home="b", secret="no")
    bad.status = "CENTER_UNREACHABLE"
    known["a"] = [bad]
    text, _ = await tell(Path(), "wanted")
    (line,) = text.splitlines()[1:]
    assert " ".join(line.split()) == (
        "0.0 ms b step root (2.0 ms) hop forwarded, home b ! CENTER_UNREACHABLE"
    )


async def test_silent_centers_are_named(known: dict[str, Sequence[SpanRecord] | None]) -> None:
    known["a"], known["b"] = [span("root", 0)], None
    text, data = await tell(Path(), "wanted")
    assert "silent: b" in text
    assert data["silent_centers"] == ["b"]


@pytest.mark.parametrize(("b", "named"), [([], ""), (None, "silent: b")], ids=["all", "one silent"])
async def test_what_nobody_has_seen_is_a_failure(
    known: dict[str, Sequence[SpanRecord] | None], b: list[SpanRecord] | None, named: str
) -> None:
    known["b"] = b
    with pytest.raises(Failure) as failure:
        await tell(Path(), "wanted")
    assert "wanted" in failure.value.message
    assert named in failure.value.message


NOON = timestamp(NOON_NS // 1_000_000)
APPLICATION = ApplicationFact(
    application_id="wanted",
    origin_center="b",
    state=APPLICATION_STATE_QUEUED,
    amount=Money(currency_code="CNY", minor_units=5),
    create_time=NOON,
    expire_time=NOON,
)
DECISION = DecisionFact(
    center="a",
    decide_time=NOON,
    state=TRANSFER_STATE_FAILED,
    reason="PAYEE_NOT_FOUND",
    amount=APPLICATION.amount,
)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, TransferFacts | None]:
    """What each center keeps of transfer t, and one span of trace t1; None is silent."""
    facts: dict[str, TransferFacts | None] = {}

    async def ask(
        _state: Path, center: str, path: str, request: Message, _response: type[Message]
    ) -> Message:
        found = facts[center]
        if found is None:
            raise unreachable(center, ran=False)
        if path == "FindSpans":
            assert isinstance(request, FindSpansRequest)
            known = center == "a" and request.id in ("wanted", "t1")
            return FindSpansResponse(spans=[span("root", 0)] if known else [])
        assert isinstance(request, FindTransfersRequest)
        ids = {"t", *(one.application_id for one in found.applications)}
        return FindTransfersResponse(transfers=[found] if request.id in ids else [])

    monkeypatch.setattr(mesh_file, "read", lambda _state: MESH)
    monkeypatch.setattr(ops.why, "ask_operator", ask)
    return facts


def facts(**fields: Any) -> TransferFacts:
    return TransferFacts(transfer_id="t", payer_account_id=account(0), **fields)


QUEUED = (
    f"2030-03-17T17:46:40.000+00:00  b   {account(0)} asked to pay 5 CNY to somebody named by an"
    " identifier. Center b queued it as application wanted, good until"
    " 2030-03-17T17:46:40.000+00:00."
)
REFUSED = (
    "2030-03-17T17:46:40.000+00:00  a   Center a, the payer's home, refused: there was no such payee"
    " (PAYEE_NOT_FOUND)."
)


async def test_a_home_without_a_copy_of_the_application_is_asked_for_its_transfer(
    kept: dict[str, TransferFacts | None],
) -> None:
    kept.update(a=facts(decision=DECISION), b=facts(applications=[APPLICATION]))
    text, data = await tell(Path(), "wanted")
    told = [f"transfer t of {account(0)}", QUEUED, REFUSED, "It ended as FAILED."]
    assert text.splitlines() == told
    (transfer,) = data["transfers"]
    assert [one["center"] for one in transfer["story"]] == ["b", "a"]
    assert transfer["decision"]["reason"] == "PAYEE_NOT_FOUND"
    assert list(data["traces"]) == ["t1"]
    with_spans, _ = await tell(Path(), "wanted", with_spans=True)
    assert with_spans.startswith(f"{text}\n\ntrace t1, ")


async def test_a_story_says_which_centers_could_not_be_asked(
    kept: dict[str, TransferFacts | None],
) -> None:
    kept.update(a=None, b=facts(applications=[APPLICATION]))
    text, data = await tell(Path(), "wanted")
    assert text.splitlines() == [
        f"transfer t of {account(0)}",
        QUEUED,
        "No center that answered knows of a decision yet.",
        "",
        (
            "Not asked, because silent: a; what is told of them is what the others know, and may be"
            " behind"
        ),
    ]
    assert data["silent_centers"] == ["a"]


def version(field: str, at_ms: int, center: str, value: str, *, present: bool) -> FieldVersion:
    time_ms = NOON_NS // 1_000_000 + at_ms
    return FieldVersion(
        field=field,
        value=value,
        center=center,
        hlc=time_ms << COUNTER_BITS,
        time=timestamp(time_ms),
        present=present,
    )


@pytest.mark.parametrize("user", [account(1), "alice@example.com", "+8613912345678"])
async def test_an_account_is_told_as_its_writes_from_all_centers(
    user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b has not heard of the last write, and c is silent."""
    first, last = "Alice", "Alicia"
    known = {
        "a": [
            version("display_name", 0, "a", first, present=False),
            version("display_name", 2, "b", last, present=True),
            version("password", 1, "a", "", present=True),
        ],
        "b": [version("display_name", 0, "a", first, present=True)],
    }

    async def ask(
        _state: Path, center: str, path: str, request: Message, _response: type[Message]
    ) -> ListVersionsResponse:
        assert (path, request) == ("ListVersions", ListVersionsRequest(user=user))
        if center not in known:
            raise unreachable(center, ran=False)
        return ListVersionsResponse(account_id=account(1), versions=known[center])

    mesh = MeshView("h:5", 1, "", None, dict.fromkeys("abc", VIEW), {})
    monkeypatch.setattr(mesh_file, "read", lambda _state: mesh)
    monkeypatch.setattr(ops.why, "ask_operator", ask)
    text, data = await tell(Path(), user)
    noon = "2030-03-17T17:46:40"
    assert text.splitlines() == [
        f"account {account(1)}, as centers a, b remember it",
        "display_name",
        f"  {noon}.000+00:00  at a  'Alice'  counts at b",
        f"  {noon}.002+00:00  at b  'Alicia'  counts at a",
        "password",
        f"  {noon}.001+00:00  at a  (withheld)  counts at a",
        "",
        "Not asked, because silent: c",
    ]
    assert data["silent_centers"] == ["c"]
    assert [one["counts_at"] for one in data["fields"]["display_name"]] == [["b"], ["a"]]
    known.clear()
    with pytest.raises(Failure, match="knows this account"):
        await tell(Path(), user)
