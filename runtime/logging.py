"""Structured logs: one line of JSON (or text) per decision that matters, with center and trace."""

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

from runtime import telemetry
from runtime.config import CenterSettings

Event = MutableMapping[str, Any]


def start(settings: CenterSettings) -> None:
    """Logs to standard error from now on, as the settings say."""
    level = getattr(logging, settings.log_level.upper())
    logging.basicConfig(level=max(level, logging.WARNING), stream=sys.stderr)  # other libraries
    structlog.configure(
        processors=[
            _context(center=settings.center, roles=",".join(settings.roles)),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.JSONRenderer()
            if settings.log_format == "json"
            else structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def _context(**fields: str) -> Callable[[Any, str, Event], Event]:
    return lambda _logger, _name, event: {**fields, **event}


def _add_trace(_logger: Any, _name: str, event: Event) -> Event:
    if trace := telemetry.trace_id():
        event["trace"] = trace
    return event
