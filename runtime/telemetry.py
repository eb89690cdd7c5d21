"""Tracing: spans with the right status, and W3C trace context in and out.

https://www.w3.org/TR/trace-context/ and the OpenTelemetry RPC and messaging conventions. Spans carry
center, role, home, attempt and hop kind; never an identifier, a password or a token. Until `start` is
called, spans cost next to nothing and go nowhere.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from grpc import StatusCode as GrpcStatus
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from runtime.errors import RpcError

__all__ = ["Span", "SpanKind", "annotate", "begin", "span", "start", "trace_id", "traceparent"]

TRACEPARENT = "traceparent"
STOP_TIMEOUT_S = 1.0
_PROPAGATOR = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("duohuo")

# The statuses that are a server's fault; the others are its correct answers to a caller's mistake.
_FAULTS = {
    GrpcStatus.UNKNOWN,
    GrpcStatus.DEADLINE_EXCEEDED,
    GrpcStatus.UNIMPLEMENTED,
    GrpcStatus.INTERNAL,
    GrpcStatus.UNAVAILABLE,
    GrpcStatus.DATA_LOSS,
}


class _State:
    """Whether spans go anywhere. Asking costs less than a span that goes nowhere."""

    recording = False


_state = _State()
Attributes = Mapping[str, str | int | bool]


_UNRECORDED = nullcontext(trace.INVALID_SPAN)


def span(
    name: str,
    attributes: Attributes | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: str | None = None,
) -> AbstractContextManager[Span]:
    """Records the block as a span under `parent` (a traceparent), or under the current span.

    A refusal that is the caller's doing (RpcError with such a code) leaves the status unset.
    """
    return _record(name, attributes, kind, parent) if _state.recording else _UNRECORDED


@contextmanager
def _record(
    name: str, attributes: Attributes | None, kind: SpanKind, parent: str | None
) -> Iterator[Span]:
    context: Context | None = _PROPAGATOR.extract({TRACEPARENT: parent}) if parent else None
    with _tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except RpcError as error:
            current.set_attribute("rpc.grpc.status_code", error.code.value[0])
            current.set_attribute("duohuo.reason", error.reason)
            if error.code in _FAULTS or kind is SpanKind.CLIENT:
                current.set_status(Status(StatusCode.ERROR, error.reason))
            raise
        except asyncio.CancelledError:
            current.set_attribute("rpc.grpc.status_code", GrpcStatus.CANCELLED.value[0])
            current.set_status(Status(StatusCode.ERROR, "CANCELLED"))
            raise
        except GeneratorExit:
            raise
        except BaseException as error:
            current.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


def begin(name: str, attributes: Attributes, kind: SpanKind, parent: str) -> tuple[Span, str]:
    """Starts a span without making it the current one; end it yourself. Returns its traceparent too.

    Without a parent there is no trace to continue, and nothing is recorded.
    """
    if not parent or not _state.recording:
        return trace.INVALID_SPAN, ""
    span = _tracer.start_span(
        name, _PROPAGATOR.extract({TRACEPARENT: parent}), kind, dict(attributes)
    )
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, Context()))
    return span, carrier.get(TRACEPARENT, parent)


def annotate(attributes: Attributes) -> None:
    """Adds attributes to the current span."""
    current = trace.get_current_span()
    if current.is_recording():
        current.set_attributes(dict(attributes))


def traceparent() -> str:
    """The current trace context, as it goes into metadata, headers and log records; empty if none."""
    if not _state.recording:
        return ""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(TRACEPARENT, "")


def trace_id() -> str:
    """The current trace id in hex; empty if none."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def start(
    center: str, roles: Sequence[str], exporters: Sequence[object], otlp: bool
) -> Callable[[], None]:
    """Starts recording spans into `exporters`, and over OTLP if asked; returns what flushes and stops.

    Sampling, batching and the OTLP endpoint follow the standard OTEL_ environment variables.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

    provider = TracerProvider(
        resource=Resource({"service.name": "duohuo"})
        .merge(OTELResourceDetector().detect())
        .merge(Resource({"duohuo.center": center, "duohuo.roles": ",".join(roles)}))
    )
    for exporter in exporters:
        assert isinstance(exporter, SpanExporter)  # noqa: S101 - narrows an SDK type kept out of the signature
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=200))
    if otlp:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _state.recording = True

    def stop() -> None:
        # A collector that is away must not hold up the end of a center.
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(STOP_TIMEOUT_S)

    return stop
