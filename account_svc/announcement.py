"""What operators tell users: kept by every center, so that it is heard while any of them is away.

Any center takes it, every center has a copy, the last writer wins; but lifted is lifted. One that was
lifted, or is over, stays as a row, so that no late entry brings it back.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from duohuo.internal.v1.log_pb2 import AnnouncementChanged
from duohuo.v1.announcement_service_pb2 import Announcement
from runtime.clock import timestamp
from runtime.store import Row, Unit, query
from sync_bus.copies import CopiedTable
from sync_bus.merge import Version

SCHEMA = """
CREATE TABLE IF NOT EXISTS announcement (
  announcement_id TEXT NOT NULL PRIMARY KEY, about TEXT NOT NULL, texts TEXT NOT NULL,
  start_ms INTEGER NOT NULL, end_ms INTEGER NOT NULL, lifted INTEGER NOT NULL,
  hlc INTEGER NOT NULL, center TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
_SELECT = "SELECT announcement_id, about, texts, start_ms, end_ms, lifted FROM announcement"


class Raised(NamedTuple):
    """One announcement: to the users of `about`, or to all if that is empty."""

    announcement_id: str
    about: str
    texts: str
    """JSON: a sentence by language."""
    start_ms: int
    end_ms: int
    """0 if it does not end by itself."""
    lifted: int

    def shown(self) -> Announcement:
        """As users see it."""
        texts: dict[str, str] = json.loads(self.texts)
        return Announcement(
            announcement_id=self.announcement_id,
            center=self.about,
            text=texts.get("en", next(iter(texts.values()))),
            texts=texts,
            start_time=timestamp(self.start_ms),
            end_time=timestamp(self.end_ms) if self.end_ms else None,
        )

    def record(self) -> AnnouncementChanged:
        """As it travels."""
        return AnnouncementChanged(
            announcement_id=self.announcement_id,
            about=self.about,
            texts=json.loads(self.texts),
            start_ms=self.start_ms,
            end_ms=self.end_ms,
            lifted=bool(self.lifted),
        )


def of(changed: AnnouncementChanged) -> Raised:
    """As it has travelled. Raises ValueError if it says nothing."""
    if not changed.texts:
        raise ValueError("an announcement without a text")
    return Raised(
        changed.announcement_id,
        changed.about,
        encoded(changed.texts),
        changed.start_ms,
        changed.end_ms,
        int(changed.lifted),
    )


def encoded(texts: Mapping[str, str]) -> str:
    """Texts as they are stored: the same ones always alike."""
    return json.dumps(dict(texts), sort_keys=True, ensure_ascii=False)


def find(announcement_id: str) -> Unit[Raised | None]:
    rows = yield from query(f"{_SELECT} WHERE announcement_id = ?", announcement_id)
    return Raised(*rows[0]) if rows else None


def in_force(now_ms: int) -> Unit[list[Raised]]:
    """Oldest first."""
    rows = yield from query(
        f"{_SELECT} WHERE NOT lifted AND (end_ms = 0 OR end_ms > ?) ORDER BY start_ms, announcement_id",
        now_ms,
    )
    return [Raised(*row) for row in rows]


def merge(raised: Raised, version: Version) -> Unit[None]:
    """Stores it, unless a later one is here. Lifted it stays: raising it may have been asked for again."""
    rows = yield from query(
        "SELECT lifted, hlc, center FROM announcement WHERE announcement_id = ?",
        raised.announcement_id,
    )
    if not rows or (raised.lifted, *version) > tuple(rows[0]):
        yield from query(
            "INSERT OR REPLACE INTO announcement VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *raised, *version
        )


def _put(row: Row) -> Unit[None]:
    yield from merge(Raised(*row[:6]), Version(*row[6:]))


TABLE = CopiedTable(
    "announcement",
    ("announcement_id", "about", "texts", "start_ms", "end_ms", "lifted", "hlc", "center"),
    keys=1,
    owner="center",
    merged=True,
    version=lambda row: row[5:],
    put=_put,
)
