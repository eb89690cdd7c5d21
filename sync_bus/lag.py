"""How far a copy is behind its source: in entries, in time, and until it has caught up.

The destination asks each source once a second (`Exchange`). The source says how far its topics reach and
how long the first entry that the destination lacks has been waiting, by the source's own clock alone,
so that clocks which disagree do not show as lag. The destination measures on its monotonic clock how
fast it applies and how fast the source appends.
"""

from collections.abc import Mapping
from contextlib import suppress
from math import exp
from typing import NamedTuple

from google.protobuf.message import DecodeError

from duohuo.internal.v1.log_pb2 import LogRecord
from runtime.store import Unit
from sync_bus import log

SILENT_AFTER_MS = 5_000
"""A source that has not answered for so long may have any number of new entries."""
PACE_MEMORY_MS = 5_000
"""Paces are averages over about so long: long enough to be steady, short enough to follow a change."""


class Pace(NamedTuple):
    """Entries per second."""

    applied: float
    appended: float


class Sight(NamedTuple):
    """What one exchange told about one topic of a source."""

    at_ms: int
    """On the local monotonic clock."""
    cursor: int
    head: int
    waiting_ms: int | None
    """How long the first entry that was missing here had waited by then; None if that is not known."""
    pace: Pace | None
    """None until two exchanges in a row have found this topic behind."""


class Lag(NamedTuple):
    """How far a copy is behind now. None where it is not known."""

    lag_ms: int | None
    catch_up_ms: int | None


def see(before: Sight | None, at_ms: int, cursor: int, head: int, waiting_ms: int | None) -> Sight:
    """What an exchange adds to what the one before it told."""
    if cursor >= head or before is None or before.cursor >= before.head or is_silent(before, at_ms):
        return Sight(at_ms, cursor, head, waiting_ms, None)
    passed_ms = max(at_ms - before.at_ms, 1)
    now = Pace((cursor - before.cursor) * 1000 / passed_ms, (head - before.head) * 1000 / passed_ms)
    if before.pace is not None:
        weight = 1 - exp(-passed_ms / PACE_MEMORY_MS)
        now = Pace(*(old + weight * (new - old) for old, new in zip(before.pace, now, strict=True)))
    return Sight(at_ms, cursor, head, waiting_ms, now)


def is_silent(last: Sight | None, now_ms: int) -> bool:
    """Has the source been silent for so long that nobody knows what it has?"""
    return last is None or now_ms - last.at_ms > SILENT_AFTER_MS


def measure(last: Sight | None, cursor: int, head: int, now_ms: int) -> Lag:
    """How far a copy that has applied up to `cursor` of `head` known entries is behind now.

    Of a silent source nothing is known unless entries are known to be missing: then these wait on.
    """
    if last is None:
        return Lag(None, None)
    silent = is_silent(last, now_ms)
    if cursor >= head:
        return Lag(None, None) if silent else Lag(0, 0)
    # What was not missing at the last exchange has been made since.
    waiting_ms = last.waiting_ms if last.cursor < last.head else 0
    lag_ms = None if waiting_ms is None else waiting_ms + now_ms - last.at_ms
    gained = last.pace.applied - last.pace.appended if last.pace else 0.0
    catch_up_ms = None if silent or gained <= 0 else round((head - cursor) * 1000 / gained)
    return Lag(lag_ms, catch_up_ms)


def missing_since(cursors: Mapping[str, int]) -> Unit[dict[str, int]]:
    """At the source: when the first entry after each cursor was made (wall clock, ms), by topic.

    Topics with nothing after the cursor are left out.
    """
    found = {}
    for topic, seq in sorted(cursors.items()):
        for entry in (yield from log.read_after(topic, seq, 1)):
            with suppress(DecodeError):  # it will be parked over there; its age is not known
                found[topic] = LogRecord.FromString(entry.record).time_ms
    return found
