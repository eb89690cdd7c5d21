"""`duohuo why ID`: the story of a transfer, application or trace, put together from all centers.

A transfer's story comes from what the centers keep for ever, told in plain words (`ops.story`), and from
spans, which are kept for a while.

Of an account: every write of its profile and password that a center remembers, the one that counts
and those that lost to it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from duohuo.v1.operator_service_pb2 import (
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
from ops import mesh_file, story
from ops.client import ask_operator
from ops.output import Failure
from ops.plain import plain
from ops.story import Known
from runtime.clock import iso
from runtime.errors import RpcError
from runtime.ids import place_of

M = TypeVar("M", bound=Message)
ASK_TIMEOUT_S = 3.0
_SHOWN = (
    *("duohuo.hop", "duohuo.target", "duohuo.home", "duohuo.attempt", "duohuo.source"),
    *("duohuo.reason", "duohuo.transfer_id", "duohuo.application_id"),
)


async def tell(state: Path, wanted: str, *, with_spans: bool = False) -> tuple[str, dict[str, Any]]:
    """The story for people and for programs. Raises Failure if no center knows the id.

    People see the spans only if they ask for them, or if nothing else is known.
    """
    place = place_of(wanted)
    if place is not None and place.slot is not None and place.origin is None:
        return await _tell_account(state, wanted)
    transfers, deaf = await _find_transfers(state, wanted)
    traces, mute = await _find_traces(state, wanted)
    silent = sorted({*deaf, *mute})
    if not transfers and not traces:
        raise Failure(
            f"no center that answers has seen {wanted}"
            + (f" (silent: {', '.join(silent)})" if silent else ""),
            advice="The id must be a transfer, application, account or trace id; only recent traces"
            " are kept.",
        )
    # Whose spans they are is certain only if the id names one transfer.
    spans = [span for found in traces.values() for span in found] if len(transfers) == 1 else []
    known = [Known(facts, spans) for facts in transfers]
    parts = [story.text(one) for one in known]
    if with_spans or not known:
        parts += [_waterfall(trace, found) for trace, found in traces.items()]
    if silent:
        parts.append(_not_asked(silent, told=bool(known)))
    return "\n\n".join(parts), {
        "transfers": [
            {
                **plain(one.facts),
                "story": [
                    {"time": iso(said.time_ms), "center": said.center, "text": said.text}
                    for said in story.sentences(one)
                ],
                "outcome": story.outcome(one.facts),
            }
            for one in known
        ],
        "traces": {trace: [plain(span) for span in found] for trace, found in traces.items()},
        "silent_centers": silent,
    }


def _not_asked(silent: Sequence[str], *, told: bool) -> str:
    behind = "; what is told of them is what the others know, and may be behind" if told else ""
    return f"Not asked, because silent: {', '.join(silent)}{behind}"


async def _find_transfers(state: Path, wanted: str) -> tuple[list[TransferFacts], list[str]]:
    """The facts of all centers, and who is silent."""
    answers = await _ask_all(
        state, "FindTransfers", FindTransfersRequest(id=wanted), FindTransfersResponse
    )
    silent = [center for center, found in answers.items() if found is None]
    facts = story.merged({center: found for center, found in answers.items() if found})
    ids = {one.transfer_id for one in facts} - {wanted}
    if not ids:
        return facts, silent
    # A center may have decided an application that it has no copy of: it knows the transfer's id.
    payers = {(one.payer_account_id, one.transfer_id) for one in facts}
    found = [await _find_transfers(state, transfer_id) for transfer_id in sorted(ids)]
    return (
        [
            one
            for more, _ in found
            for one in more
            if (one.payer_account_id, one.transfer_id) in payers
        ],
        sorted({*silent, *(center for _, more in found for center in more)}),
    )


async def _find_traces(state: Path, wanted: str) -> tuple[dict[str, list[SpanRecord]], list[str]]:
    """The spans of all centers by trace, the oldest first, and who is silent."""
    answers = await _ask_all(state, "FindSpans", FindSpansRequest(id=wanted), FindSpansResponse)
    silent = [center for center, found in answers.items() if found is None]
    spans = {span.span_id: span for found in answers.values() if found for span in found.spans}
    # A center may have worked in a trace without having seen the id that it is asked for.
    for trace in sorted({span.trace_id for span in spans.values()}):
        more = await _ask_all(state, "FindSpans", FindSpansRequest(id=trace), FindSpansResponse)
        spans |= {span.span_id: span for found in more.values() if found for span in found.spans}
    traces: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans.values(), key=lambda one: one.start_unix_nanos):
        traces[span.trace_id].append(span)
    return traces, silent


def _waterfall(trace: str, spans: Sequence[SpanRecord]) -> str:
    start_ns = spans[0].start_unix_nanos
    lines = [f"trace {trace}, {iso(start_ns // 1_000_000)}"]
    for span, depth in _in_order(spans):
        after_ms = (span.start_unix_nanos - start_ns) / 1e6
        took_ms = (span.end_unix_nanos - span.start_unix_nanos) / 1e6
        facts = ", ".join(
            f"{key.removeprefix('duohuo.')} {span.attributes[key]}"
            for key in _SHOWN
            if span.attributes.get(key)
        )
        problem = f"  ! {span.status}" if span.status not in ("", "OK", "ERROR") else ""
        lines.append(
            f"{after_ms:9.1f} ms  {span.attributes.get('duohuo.center', '?'):<3}"
            f"{'  ' * depth}{span.name} ({took_ms:.1f} ms)"
            + (f"  {facts}" if facts else "")
            + problem
        )
    return "\n".join(lines)


def _in_order(spans: Sequence[SpanRecord]) -> Iterator[tuple[SpanRecord, int]]:
    """Spans under their parents, each with its depth; those whose parent is lost come first-level."""
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in spans:
        children[span.parent_span_id if span.parent_span_id in known else ""].append(span)
    stack = [(span, 0) for span in reversed(children[""])]
    while stack:
        span, depth = stack.pop()
        yield span, depth
        stack.extend((child, depth + 1) for child in reversed(children[span.span_id]))


async def _ask_all(
    state: Path, path: str, request: Message, response_type: type[M]
) -> dict[str, M | None]:
    """What each center says; None for those that do not answer."""

    async def one(center: str) -> M | None:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await ask_operator(state, center, path, request, response_type)
        except (RpcError, TimeoutError):
            return None

    centers = list(mesh_file.read(state).centers)
    answers = await asyncio.gather(*(one(center) for center in centers))
    return dict(zip(centers, answers, strict=True))


async def _tell_account(state: Path, user: str) -> tuple[str, dict[str, Any]]:
    request = ListVersionsRequest(user=user)
    answers = await _ask_all(state, "ListVersions", request, ListVersionsResponse)
    silent = [center for center, found in answers.items() if found is None]
    known = {center: found for center, found in answers.items() if found and found.account_id}
    if not known:
        raise Failure(
            "no center that answers knows this account"
            + (f" (silent: {', '.join(silent)})" if silent else "")
        )
    writes: dict[str, dict[tuple[int, str], FieldVersion]] = defaultdict(dict)
    counts_at: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for center, found in known.items():
        for version in found.versions:
            writes[version.field][version.hlc, version.center] = version
            if version.present:
                counts_at[version.field, version.hlc, version.center].append(center)
    account = next(iter(known.values())).account_id
    lines = [f"account {account}, as centers {', '.join(known)} remember it"]
    fields: dict[str, list[dict[str, Any]]] = {}
    for name, versions in sorted(writes.items()):
        lines.append(name)
        fields[name] = []
        for key, version in sorted(versions.items()):
            at = counts_at.get((name, *key), [])
            value = "(withheld)" if name == "password" else repr(version.value)
            lines.append(
                f"  {iso(version.time.ToMilliseconds())}  at {version.center}  {value}"
                + (f"  counts at {', '.join(at)}" if at else "  lost to a later one")
            )
            shown = {k: v for k, v in plain(version).items() if k not in ("field", "present")}
            fields[name].append({**shown, "counts_at": at})
    text = "\n".join(lines)
    if silent:
        text += f"\n\nNot asked, because silent: {', '.join(silent)}"
    return text, {"account_id": account, "fields": fields, "silent_centers": silent}
