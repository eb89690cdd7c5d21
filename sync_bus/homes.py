"""Who is home of a slot: the first placement, and what was handed over since, in one service's store.

The present home alone gives a slot away. It says so in its log, in the unit in which it ceases to act; all
that it did as home stands before that. Whoever gets the slot acts for it from the unit on that applies that
entry, and says so in turn. Others take nothing from the new home, once it has said so, before the old one's
entry has come too. So two centers never act for a slot at a time, whatever is late or lost; between the two
entries nobody does.

A slot that was handed over needs what all of its former homes have done: nobody acts for one while a
snapshot of another center is being installed.

Each handover gives the slot its next epoch. What is known of it never changes, and is copied as all data
are.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

import structlog
from google.protobuf.message import DecodeError
from grpc import StatusCode

from duohuo.internal.v1.log_pb2 import LogRecord, SlotHandedOver, SlotTakenOver
from duohuo.internal.v1.peer_services_pb2 import ListHomesRequest, ListHomesResponse
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.home_calls import slot_moving
from runtime.ids import account_slot
from runtime.methods import peer_method
from runtime.placement import SLOTS, Placement
from runtime.store import Store, Unit, query
from sync_bus import audit, inbox, log
from sync_bus.copies import CopiedTable
from sync_bus.inbox import Handler, NotYet
from sync_bus.log import Stamp, Topic
from sync_bus.site import Site

INTERVAL_S = 1.0
JOIN_TIMEOUT_S = 2.0
EPOCH_MAX = 1_000_000_000
SCHEMA = """
CREATE TABLE IF NOT EXISTS first_home (
  slot TEXT NOT NULL PRIMARY KEY, home TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS handover (
  slot TEXT NOT NULL, epoch INTEGER NOT NULL, source TEXT NOT NULL, home TEXT NOT NULL,
  PRIMARY KEY (slot, epoch)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS takeover (
  slot TEXT NOT NULL, epoch INTEGER NOT NULL, source TEXT NOT NULL,
  PRIMARY KEY (slot, epoch)) STRICT, WITHOUT ROWID;
CREATE VIEW IF NOT EXISTS slot_home (slot, epoch, home, acts) AS
  SELECT first_home.slot, coalesce(handover.epoch, 1),
    coalesce(handover.home, first_home.home), handover.epoch IS NULL OR (EXISTS (
      SELECT 1 FROM takeover
      WHERE takeover.slot = handover.slot AND takeover.epoch = handover.epoch)
      AND NOT EXISTS (SELECT 1 FROM cursor WHERE installing))
  FROM first_home LEFT JOIN handover ON handover.slot = first_home.slot AND handover.epoch = (
    SELECT max(epoch) FROM handover WHERE slot = first_home.slot);
"""
_logger = structlog.get_logger()
TABLES = (
    CopiedTable("handover", ("slot", "epoch", "source", "home"), keys=2, owner="source"),
    CopiedTable("takeover", ("slot", "epoch", "source"), keys=2, owner="source"),
)
SLOT_OF = "substr({}, 2, 3)"
"""In SQL, the slot of an account id."""

T = TypeVar("T")


class Present(NamedTuple):
    """The home of a slot as far as is known here. It acts once it is known to have taken over, and not
    while a snapshot is being installed here."""

    slot: int
    epoch: int
    home: str
    acts: bool


def is_prepared() -> Unit[bool]:
    rows = yield from query("SELECT count(*) FROM first_home")
    return bool(rows[0][0] == SLOTS)


def prepare(first: Placement) -> Unit[None]:
    """Stores the placement that the mesh began with; it never changes any more."""
    yield from query(
        "INSERT INTO first_home SELECT printf('%03x', key), value FROM json_each(?) WHERE true"
        " ON CONFLICT DO NOTHING",
        "[" + ",".join(f'"{first.order[slot][0]}"' for slot in range(SLOTS)) + "]",
    )


def first() -> Unit[list[str]]:
    """The home of each slot at the beginning."""
    rows = yield from query("SELECT home FROM first_home ORDER BY slot")
    return [home for (home,) in rows]


def _replace_first(found: Sequence[str]) -> Unit[None]:
    for slot, home in enumerate(found):
        yield from query("UPDATE first_home SET home = ? WHERE slot = ?", home, _name(slot))


def present(slot: int) -> Unit[Present]:
    rows = yield from query("SELECT epoch, home, acts FROM slot_home WHERE slot = ?", _name(slot))
    epoch, home, acts = rows[0]
    return Present(slot, epoch, home, bool(acts))


def moved() -> Unit[list[Present]]:
    """All slots that were ever handed over."""
    rows = yield from query(
        "SELECT slot, epoch, home, acts FROM slot_home WHERE slot IN (SELECT slot FROM handover)"
    )
    return [Present(int(slot, 16), epoch, home, bool(acts)) for slot, epoch, home, acts in rows]


def _handovers() -> Unit[int]:
    rows = yield from query("SELECT count(*) FROM handover")
    return int(rows[0][0])


def acts_for(center: str, slot: int) -> Unit[bool]:
    """Does this center act as home of the slot, as far as is known here?"""
    found = yield from present(slot)
    return found.home == center and found.acts


def speaks_for(source: str, slot: int) -> Unit[bool]:
    """May this center say something as home of the slot, at the point of its log up to which that has been
    applied here? What others have said since, or not yet, does not count."""
    rows = yield from query(
        "SELECT (SELECT home FROM first_home WHERE slot = ?1),"
        " (SELECT max(epoch) FROM takeover WHERE slot = ?1 AND source = ?2),"
        " (SELECT max(epoch) FROM handover WHERE slot = ?1 AND source = ?2)",
        _name(slot),
        source,
    )
    first, taken, given = rows[0]
    if taken is None:
        return bool(first == source and given is None)
    return given is None or bool(taken > given)


def require_speaks(source: str, topic: str, slot: int) -> Unit[None]:
    """Raises ValueError if a center says something of a slot without being its home; NotYet if the entry
    that makes it home is parked, as one from too far ahead."""
    if (yield from speaks_for(source, slot)):
        return
    for record in (yield from _parked(source, topic)):
        if record.HasField("slot_taken_over") and record.slot_taken_over.slot == slot:
            raise NotYet
    raise ValueError("only its home may tell this of an account, or of another home")


def _lacks(slot: int, source: str, topic: str, hlc: int | None) -> Unit[bool]:
    """Has something that the homes of a slot had done, before a source gave it away at `hlc`, not been
    applied here?"""
    if (yield from _is_installing()):
        return True
    rows = yield from query("SELECT source FROM handover WHERE slot = ?", _name(slot))
    for home in sorted({source, *(row[0] for row in rows)}):
        for record in (yield from _parked(home, topic)):
            if hlc is None or record.hlc <= hlc:
                return True
    return False


def _parked(source: str, topic: str) -> Unit[list[LogRecord]]:
    """What could not be applied of a source; something that cannot be read may be of any time."""
    rows = yield from query(
        "SELECT record FROM parked WHERE source = ? AND topic = ?", source, topic
    )
    found = []
    for (encoded,) in rows:
        try:
            found.append(LogRecord.FromString(encoded))
        except DecodeError:
            found.append(LogRecord())
    return found


def _is_installing() -> Unit[bool]:
    rows = yield from query("SELECT 1 FROM cursor WHERE installing LIMIT 1")
    return bool(rows)


def payee_home(account: str, here: str) -> Unit[str]:
    """The home of an account that is to be paid, as far as is known here; this center if there is no such
    account. Raises RpcError SLOT_MOVING while it is about to become home of it."""
    slot = account_slot(account)
    if slot is None:
        return here
    found = yield from present(slot)
    if found.home == here and not found.acts:
        raise slot_moving(slot)
    return found.home


def require(center: str, slot: int) -> Unit[None]:
    """Raises RpcError WRONG_HOME, naming the right one, unless this center acts as home of the slot."""
    found = yield from present(slot)
    if found.home == center and found.acts:
        return
    raise RpcError(
        StatusCode.FAILED_PRECONDITION,
        "WRONG_HOME",
        f"center {center} does not act as home of slot {slot}",
        details={"home": found.home, "epoch": str(found.epoch), "slot": str(slot)},
    )


def in_progress(center: str) -> Unit[list[Present]]:
    """Slots that a center has given away and nobody is known to have taken over."""
    rows = yield from query(
        "SELECT slot, epoch, slot_home.home FROM slot_home JOIN handover USING (slot, epoch)"
        " WHERE NOT acts AND source = ?",
        center,
    )
    return [Present(int(slot, 16), epoch, home, acts=False) for slot, epoch, home in rows]


def listed(slots: Iterable[int]) -> str:
    """Slots as a JSON array of their names, for SQL."""
    return "[" + ",".join(f'"{_name(slot)}"' for slot in slots) + "]"


def _check(said: SlotHandedOver | SlotTakenOver) -> None:
    """Raises ValueError if there is no such slot, or if no slot can be in such an epoch."""
    if not (0 <= said.slot < SLOTS and 1 < said.epoch <= EPOCH_MAX):
        raise ValueError("no such slot or epoch")


def _name(slot: int) -> str:
    return f"{slot:03x}"


def _not_taken_over(here: str) -> Unit[list[tuple[int, int, str]]]:
    """What was given to this center, which does not act for it: (slot, epoch, by whom)."""
    rows = yield from query(
        "SELECT handover.slot, epoch, handover.source FROM handover LEFT JOIN takeover"
        " USING (slot, epoch) WHERE home = ? AND takeover.slot IS NULL",
        here,
    )
    return [(int(slot, 16), epoch, source) for slot, epoch, source in rows]


class Movement(Protocol):
    """What a service does with the data of a slot that moves: (slot, epoch, the other center, stamp). Both
    return how many accounts that was about."""

    def move_out(self, slot: int, epoch: int, to: str, stamp: Stamp) -> Unit[int]:
        """At the home that gives it away."""
        ...

    def move_in(self, slot: int, epoch: int, source: str, stamp: Stamp) -> Unit[int]:
        """At the new home, once it has everything that the old one did."""
        ...

    def is_unanswered(self) -> Unit[bool]:
        """Is something left undone that is the home's to do, whoever was home when it came?"""
        ...

    def answer(self) -> Unit[bool]:
        """Does some of that; False if there was nothing."""
        ...


class NothingMoves:
    """For a service whose rows stand for themselves, whoever is home."""

    def move_out(self, _slot: int, _epoch: int, _to: str, _stamp: Stamp) -> Unit[int]:
        yield from ()
        return 0

    move_in = move_out

    def is_unanswered(self) -> Unit[bool]:
        yield from ()
        return False

    answer = is_unanswered


class Homes:
    """The slots of one service at one center. Run `run` for as long as the service lives."""

    def __init__(
        self, role: str, topic: Topic, site: Site, database: Store, movement: Movement
    ) -> None:
        self._role = role
        self._topic = topic
        self._site = site
        self._store = database
        self._movement = movement
        self._learned = 0
        self.on_change: Callable[[], None] = lambda: None

    async def run(self) -> None:
        while True:
            with suppress(RpcError):  # the store does not take writes now
                await self.catch_up()
            await asyncio.sleep(INTERVAL_S)

    async def catch_up(self) -> None:
        """Tells the process's placement what has moved; and takes over, and answers, what could not be when
        it came."""
        handovers = await self._store.read(_handovers())
        if handovers != self._learned:
            for one in await self._store.read(moved()):
                self._site.placement.learn(one.slot, one.epoch, one.home)
            self._learned = handovers
            self.on_change()
        for given in await self._store.read(_not_taken_over(self._site.here)):
            with suppress(RpcError):  # its copy was changed by hand; the others go on
                await self._store.write("take over", self._late(*given))
        while await self._store.read(self._movement.is_unanswered()):
            if not await self._store.write("answer", self._movement.answer()):
                break

    def _late(self, slot: int, epoch: int, source: str) -> Unit[None]:
        topic = self._topic.name
        diverged = (yield from inbox.copy_of(source, topic)).diverged
        if not diverged and not (yield from _lacks(slot, source, topic, None)):
            yield from self._take_over(slot, epoch, source, self._site.stamps.now())

    async def join(self, peers: Sequence[str]) -> None:
        """For a store that is about to begin: takes the homes that the mesh began with from who knows them.
        Raises RpcError if one that may know does not answer."""
        for peer in peers:
            try:
                found = await ask(
                    self._site.mesh.at(peer),
                    peer_method(self._role, "ListHomes"),
                    ListHomesRequest(first=True),
                    ListHomesResponse,
                    JOIN_TIMEOUT_S,
                )
            except RpcError as error:
                if error.reason == "CENTER_RECOVERING":
                    continue  # it knows no more than this one, or will say so itself
                raise
            began = [found.first_centers[number] for number in found.first_homes]
            if len(began) == SLOTS and began != await self._store.read(first()):
                await self._store.write("join", _replace_first(began))
                self._site.placement.begin_with(began)
            return

    def acting(self, slot: int, unit: Unit[T]) -> Unit[T]:
        """A unit that runs only while this center acts as home. Raises RpcError WRONG_HOME."""
        yield from require(self._site.here, slot)
        return (yield from unit)

    def hand_over(self, slot: int, to: str, who: str, stamp: Stamp) -> Unit[tuple[Present, int]]:
        """Gives a slot away, with all that its data needs; nothing if that was done before. Returns how it
        stands, and how many accounts were moved."""
        here = self._site.here
        before = yield from present(slot)
        if before.home == to:
            return before, 0
        yield from require(here, slot)
        epoch = before.epoch + 1
        accounts = yield from self._movement.move_out(slot, epoch, to, stamp)
        yield from query("INSERT INTO handover VALUES (?, ?, ?, ?)", _name(slot), epoch, here, to)
        handed = SlotHandedOver(slot=slot, epoch=epoch, home=to)
        yield from log.append(self._topic, stamp, LogRecord(slot_handed_over=handed))
        yield from audit.record(self._role, here, who, "hand over", f"slot {slot}", here, to, stamp)
        return (yield from present(slot)), accounts

    def before(self, handler: Handler) -> Handler:
        """A service's handler, which is left those records that are not about slots."""

        def apply(source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
            match record.WhichOneof("body"):
                case "slot_handed_over":
                    yield from self._handed_over(source, record, stamp)
                case "slot_taken_over":
                    yield from self._taken_over(source, record.slot_taken_over)
                case _:
                    yield from handler(source, record, stamp)

        return apply

    def _handed_over(self, source: str, record: LogRecord, stamp: Stamp) -> Unit[None]:
        given, topic = record.slot_handed_over, self._topic.name
        _check(given)
        yield from require_speaks(source, topic, given.slot)
        yield from query(
            "INSERT INTO handover VALUES (?, ?, ?, ?)",
            _name(given.slot),
            given.epoch,
            source,
            given.home,
        )
        if given.home != self._site.here:
            return
        if (yield from _lacks(given.slot, source, topic, record.hlc)):
            return
        failed = ""
        yield from query("SAVEPOINT take_over")
        try:
            yield from self._take_over(given.slot, given.epoch, source, stamp)
        except RpcError as error:
            # Something here was changed by hand. Once that has been repaired it will do.
            yield from query("ROLLBACK TO take_over")
            failed = error.reason
        yield from query("RELEASE take_over")
        if failed:
            _logger.error("slot not taken over", slot=given.slot, reason=failed)

    def _take_over(self, slot: int, epoch: int, source: str, stamp: Stamp) -> Unit[None]:
        here = self._site.here
        yield from query("INSERT INTO takeover VALUES (?, ?, ?)", _name(slot), epoch, here)
        taken = SlotTakenOver(slot=slot, epoch=epoch)
        yield from log.append(self._topic, stamp, LogRecord(slot_taken_over=taken))
        yield from self._movement.move_in(slot, epoch, source, stamp)

    def _taken_over(self, source: str, taken: SlotTakenOver) -> Unit[None]:
        _check(taken)
        given = yield from query(
            "SELECT home FROM handover WHERE slot = ? AND epoch = ?",
            _name(taken.slot),
            taken.epoch,
        )
        if not given:
            raise NotYet
        if given != [(source,)]:
            raise ValueError("this slot was given to another center")
        yield from query(
            "INSERT INTO takeover VALUES (?, ?, ?)", _name(taken.slot), taken.epoch, source
        )
