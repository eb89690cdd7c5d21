"""`duohuo why ID`: the story of a trace, transfer or application, put together from all centers."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duohuo.v1.operator_service_pb2 import FindSpansRequest, FindSpansResponse, SpanRecord
from ops import mesh_file
from ops.client import ask_operator
from ops.output import Failure
from ops.plain import plain
from runtime.clock import iso
from runtime.errors import RpcError

_SHOWN = (
    *("duohuo.hop", "duohuo.target", "duohuo.home", "duohuo.attempt", "duohuo.source"),
    *("duohuo.reason", "duohuo.transfer_id", "duohuo.application_id"),
)


async def tell(state: Path, wanted: str) -> tuple[str, dict[str, Any]]:
    """The story for people and for programs. Raises Failure if no center knows the id."""
    centers = list(mesh_file.read(state).centers)
    answers = await asyncio.gather(*(_ask(state, center, wanted) for center in centers))
    silent = [center for center, found in zip(centers, answers, strict=True) if found is None]
    spans = {span.span_id: span for found in answers if found for span in found}
    # A center may have worked in a trace without having seen the id that it is asked for.
    in_traces = await asyncio.gather(
        *(
            _ask(state, center, trace)
            for trace in sorted({span.trace_id for span in spans.values()})
            for center in centers
            if center not in silent
        )
    )
    spans |= {span.span_id: span for found in in_traces if found for span in found}
    if not spans:
        raise Failure(
            f"no center that answers has seen {wanted}"
            + (f" (silent: {', '.join(silent)})" if silent else ""),
            advice="Only recent requests are kept. The id must be a trace, transfer or application.",
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
            if key in span.attributes
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


async def _ask(state: Path, center: str, wanted: str) -> Sequence[SpanRecord] | None:
    try:
        async with asyncio.timeout(3):
            found = await ask_operator(
                state, center, "FindSpans", FindSpansRequest(id=wanted), FindSpansResponse
            )
    except (RpcError, TimeoutError):
        return None
    return found.spans
