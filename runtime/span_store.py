"""The recent spans of a center, kept in a bounded SQLite file so that `duohuo why` needs no collector.

The file may be shared by the center's processes. It is a convenience: it is not synced to disk, and
losing it loses nothing else.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from duohuo.v1.operator_service_pb2 import SpanRecord

SPANS_MAX = 200_000
TRACES_FOUND_MAX = 50
_NAMED = ("duohuo.transfer_id", "duohuo.application_id")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS span (
  number INTEGER PRIMARY KEY, trace_id TEXT, span_id TEXT, parent_span_id TEXT, name TEXT,
  kind TEXT, start_ns INTEGER, end_ns INTEGER, attributes TEXT, status TEXT);
CREATE INDEX IF NOT EXISTS span_by_trace ON span (trace_id);
CREATE TABLE IF NOT EXISTS named (id TEXT, trace_id TEXT, number INTEGER, PRIMARY KEY (id, trace_id));
CREATE INDEX IF NOT EXISTS named_by_number ON named (number);
"""


class SpanStore(SpanExporter):
    """Takes finished spans from the SDK's thread; finds them again by trace, transfer or application.

    Without room for its file it keeps nothing, until there is some: a full disk must not stop a center
    because its diary is full too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._lock:
            try:
                connection = self._opened()
                with _transaction(connection):
                    for span in spans:
                        _insert(connection, span)
                    _forget_old(connection)
            except sqlite3.Error:
                return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def find(self, wanted: str) -> list[SpanRecord]:
        """All spans of the traces that `wanted` names or takes part in, oldest first."""
        with self._lock:
            try:
                rows = _find(self._opened(), wanted)
            except sqlite3.Error:
                return []
        return [
            SpanRecord(
                trace_id=trace,
                span_id=span,
                parent_span_id=parent,
                name=name,
                kind=kind,
                start_unix_nanos=start,
                end_unix_nanos=end,
                attributes=json.loads(attributes),
                status=status,
            )
            for trace, span, parent, name, kind, start, end, attributes, status in rows
        ]

    def shutdown(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            try:
                connection.execute("PRAGMA busy_timeout=2000")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=OFF")
                connection.executescript(_SCHEMA)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        return self._connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _find(connection: sqlite3.Connection, wanted: str) -> list[Any]:
    traces = [wanted] + [
        row[0]
        for row in connection.execute(
            "SELECT trace_id FROM named WHERE id = ? ORDER BY number LIMIT ?",
            (wanted, TRACES_FOUND_MAX),
        )
    ]
    return connection.execute(
        "SELECT trace_id, span_id, parent_span_id, name, kind, start_ns, end_ns, attributes,"
        " status FROM span WHERE trace_id IN (SELECT value FROM json_each(?))"
        " ORDER BY start_ns LIMIT 5000",
        (json.dumps(traces),),
    ).fetchall()


def _insert(connection: sqlite3.Connection, span: ReadableSpan) -> None:
    context = span.get_span_context()
    if context is None:
        return
    trace = f"{context.trace_id:032x}"
    attributes = {key: str(value) for key, value in (span.attributes or {}).items()}
    attributes["duohuo.center"] = str(span.resource.attributes.get("duohuo.center", ""))
    number = connection.execute(
        "INSERT INTO span (trace_id, span_id, parent_span_id, name, kind, start_ns, end_ns,"
        " attributes, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            trace,
            f"{context.span_id:016x}",
            f"{span.parent.span_id:016x}" if span.parent else "",
            span.name,
            span.kind.name,
            span.start_time or 0,
            span.end_time or 0,
            json.dumps(attributes),
            span.status.description or ("OK" if span.status.is_ok else "ERROR"),
        ),
    ).lastrowid
    for key in _NAMED:
        if key in attributes:
            connection.execute(
                "INSERT INTO named VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (attributes[key], trace, number),
            )


def _forget_old(connection: sqlite3.Connection) -> None:
    newest = connection.execute("SELECT max(number) FROM span").fetchone()[0] or 0
    connection.execute("DELETE FROM span WHERE number <= ?", (newest - SPANS_MAX,))
    connection.execute("DELETE FROM named WHERE number <= ?", (newest - SPANS_MAX,))
