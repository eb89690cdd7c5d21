"""`duohuo why ID`: the story of a trace, transfer or application, put together from all centers.

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
    ListVersionsRequest,
    ListVersionsResponse,
    SpanRecord,
)
from ops import mesh_file
from ops.client import ask_operator
from ops.output import Failure
from ops.plain import plain
from runtime.clock import iso
from runtime.errors import RpcError
from runtime.ids import place_of

M = TypeVar("M", bound=Message)
ASK_TIMEOUT_S = 3.0
_SHOWN = (
    *("duohuo.hop", "duohuo.target", "duohuo.home", "duohuo.attempt", "duohuo.source"),
    *("duohuo.reason", "duohuo.transfer_id", "duohuo.application_id"),
)


async def tell(state: Path, wanted: str) -> tuple[str, dict[str, Any]]:
    """The story for people and for programs. Raises Failure if no center knows the id."""
    place = place_of(wanted)
    if place is not None and place.slot is not None and place.origin is None:
        return await _tell_account(state, wanted)
    answers = await _ask_all(state, "FindSpans", FindSpansRequest(id=wanted), FindSpansResponse)
    silent = [center for center, found in answers.items() if found is None]
    spans = {span.span_id: span for found in answers.values() if found for span in found.spans}
    # A center may have worked in a trace without having seen the id that it is asked for.
    for trace in sorted({span.trace_id for span in spans.values()}):
        more = await _ask_all(state, "FindSpans", FindSpansRequest(id=trace), FindSpansResponse)
        spans |= {span.span_id: span for found in more.values() if found for span in found.spans}
    if not spans:
        raise Failure(
            f"no center that answers has seen {wanted}"
            + (f" (silent: {', '.join(silent)})" if silent else ""),
            advice="Only recent requests are kept. The id must be a trace, transfer, application or"
            " account.",
        )
    traces: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans.values(), key=lambda one: one.start_unix_nanos):
        traces[span.trace_id].append(span)
    text = "\n\n".join(_story(trace, found) for trace, found in traces.items())
    if silent:
        text += f"\n\nNot asked, because silent: {', '.join(silent)}"
    data = {
        "traces": {trace: [plain(span) for span in found] for trace, found in traces.items()},
        "silent_centers": silent,
    }
    return text, data


def _story(trace: str, spans: Sequence[SpanRecord]) -> str:
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
