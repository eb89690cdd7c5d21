"""Structured logs: one line of JSON (or text) per decision that matters, with center and trace."""

import logging
import sys
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor

from runtime import telemetry
from runtime.config import CenterSettings

Event = MutableMapping[str, Any]


def start(settings: CenterSettings) -> None:
    """Logs to standard error from now on, as the settings say."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[Processor] = [
        _context(center=settings.center, roles=",".join(settings.roles)),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    written: Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    file = cast(TextIO, Unfailing(sys.stderr))
    structlog.configure(
        processors=[*shared, written],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=file),
        cache_logger_on_first_use=True,
    )
    libraries = logging.StreamHandler(file)
    libraries.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.processors.format_exc_info],
            processors=[ProcessorFormatter.remove_processors_meta, written],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[libraries])
    # They tell of every strange header of any client; gRPC with its value, which may be a token.
    logging.getLogger("opentelemetry.trace.propagation").setLevel(logging.ERROR)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_header)


def _is_no_header(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding on")


class Unfailing:
    """Writes what the file takes and forgets the rest: a full disk must not stop those who log."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


def _context(**fields: str) -> Callable[[Any, str, Event], Event]:
    return lambda _logger, _name, event: {**fields, **event}


def _add_trace(_logger: Any, _name: str, event: Event) -> Event:
    if trace := telemetry.trace_id():
        event["trace"] = trace
    return event
