"""Anti-entropy: finds what differs between a copy and its owner although it should not, and repairs it.

After Demers et al., "Epidemic Algorithms for Replicated Database Maintenance" (1987), with one rule more:
a row's owner is right, unless the copy can prove that it is not (`CopiedTable.proven`). Keys begin with
their slot: tables are walked in the order of their keys, and compared by the digests of some rows at a
time, for ever. What differs because entries are on their way is told from what should not: the owner's rows
are those of a known position of its log, and are looked at only after everything up to there has been
applied here.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from duohuo.internal.v1.peer_services_pb2 import CompareRequest, CompareResponse
from runtime.endpoint import ask
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Row, Store, Unit
from sync_bus import copies, inbox
from sync_bus.copies import CopiedTable, Found, Range
from sync_bus.log import Topic
from sync_bus.snapshot import COMPARED_ROWS_MAX

PAUSE_S = 2.0
COMPARE_TIMEOUT_S = 5.0
CATCH_UP_S_MAX = 5.0
DIFFERENCES_MAX = 20

_logger = structlog.get_logger()


class AntiEntropy:
    """Compares this center's copies with their owners; run `run` for as long as the service lives."""

    def __init__(self, role: str, topics: Sequence[Topic], store: Store, mesh: Mesh) -> None:
        self._role = role
        self._topics = topics
        self._store = store
        self._mesh = mesh
        self._compare = peer_method(role, "Compare")
        self._committed = Signal()
        store.on_commit(self._committed.notify)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(PAUSE_S)
            for peer in self._mesh.peers:
                for topic in self._topics:
                    for table in topic.tables:
                        await self._walk(peer, topic, table)

    async def _walk(self, peer: str, topic: Topic, table: CopiedTable) -> None:
        after: Row | None = None
        while True:
            try:
                after = await self.compare(peer, topic, table, after)
            except RpcError:
                return  # it does not answer, or the disk is full: another time
            finally:
                await asyncio.sleep(PAUSE_S)
            if after is None:
                return

    async def compare(
        self, peer: str, topic: Topic, table: CopiedTable, after: Row | None = None
    ) -> Row | None:
        """Compares some rows behind a key with their owner's, and repairs what should not differ.

        Returns the key up to which it has compared; None at the end of the table. Raises RpcError.
        """
        compared = await self._compare_range(peer, topic, table, after)
        if compared.owners is None:
            return compared.last
        try:
            found = await self._store.write("repair", self._repair(compared))
        except RpcError:
            raise
        except Exception as error:  # noqa: BLE001 - such as a value that another owner's row has, too
            _logger.error(  # noqa: TRY400 - the text of an error may hold values
                "copy cannot be repaired",
                role=self._role,
                source=peer,
                table=table.name,
                reason=type(error).__name__,
            )
            return compared.last
        for row, difference, trusted in found:
            _logger.error(
                "copy repaired" if trusted else "owner not believed",
                role=self._role,
                source=peer,
                table=table.name,
                key=[str(value) for value in table.key(row)],
                difference=difference.value,
            )
        return compared.last

    async def differences(self, peer: str, topic: Topic) -> list[tuple[CopiedTable, Found]]:
        """The first rows that differ from their owner's, repaired or not; compares the whole topic.

        Raises RpcError if that is not possible now.
        """
        differing: list[tuple[CopiedTable, Found]] = []
        for table in topic.tables:
            after: Row | None = None
            while len(differing) < DIFFERENCES_MAX:
                compared = await self._compare_range(peer, topic, table, after)
                if compared.owners is not None:
                    found = await self._store.read(self._differences(compared))
                    differing += [(table, one) for one in found]
                elif not compared.same:
                    raise unreachable(peer, ran=False)
                after = compared.last
                if after is None:
                    break
        return differing[:DIFFERENCES_MAX]

    async def _compare_range(
        self, peer: str, topic: Topic, table: CopiedTable, after: Row | None
    ) -> "_Compared":
        before = await self._store.read(inbox.copy_of(peer, topic.name))
        rows = await self._store.read(copies.rows_in(table, peer, Range(after), COMPARED_ROWS_MAX))
        last = table.key(rows[-1]) if len(rows) == COMPARED_ROWS_MAX else None
        answer = await ask(
            self._mesh.at(peer),
            self._compare,
            CompareRequest(
                topic=topic.name,
                table=table.name,
                after=copies.encoded_key(after),
                last=copies.encoded_key(last),
                digest=copies.digest(rows),
            ),
            CompareResponse,
            COMPARE_TIMEOUT_S,
        )
        compared = _Compared(peer, topic, table, Range(after, last), rows, answer)
        # An owner that is behind its own copies has lost something: that is not for us to spread.
        if answer.same or answer.seq < before.position.seq:
            return compared
        if not await self._caught_up(peer, topic.name, answer):
            return compared
        if answer.HasField("last"):
            last = copies.decoded_key(table, answer.last)
        owners = copies.decoded(table, answer.rows)
        return replace(compared, keys=Range(after, last), owners=owners)

    async def _caught_up(self, peer: str, topic: str, answer: CompareResponse) -> bool:
        """Waits until everything up to the owner's position has been applied here."""
        try:
            async with asyncio.timeout(CATCH_UP_S_MAX):
                while True:
                    committed = self._committed.next()
                    copy = await self._store.read(inbox.copy_of(peer, topic))
                    if not _comparable(copy, answer):
                        return False
                    if copy.position.seq >= answer.seq:
                        return True
                    await self._committed.wait(committed)
        except TimeoutError:
            return False

    def _repair(self, compared: "_Compared") -> Unit[list[Found]]:
        peer, topic = compared.peer, compared.topic.name
        if not _comparable((yield from inbox.copy_of(peer, topic)), compared.answer):
            return []
        found = yield from copies.repair(*compared.arguments())
        repaired = sum(one.trusted for one in found)
        if repaired:
            yield from inbox.count_repaired(peer, topic, repaired)
        return found

    def _differences(self, compared: "_Compared") -> Unit[list[Found]]:
        if not _comparable(
            (yield from inbox.copy_of(compared.peer, compared.topic.name)), compared.answer
        ):
            return []
        return (yield from copies.differences(*compared.arguments()))


@dataclass(frozen=True, slots=True)
class _Compared:
    """A range of a copy and what its owner said of it; `owners` once both can be held together."""

    peer: str
    topic: Topic
    table: CopiedTable
    keys: Range
    rows: Sequence[Row]
    answer: CompareResponse
    owners: Sequence[Row] | None = None

    @property
    def same(self) -> bool:
        return self.answer.same

    @property
    def last(self) -> Row | None:
        """Up to where the comparison goes; None at the end of the table."""
        return self.keys.last

    def arguments(
        self,
    ) -> tuple[CopiedTable, str, Range, Sequence[Row], Sequence[Row]]:
        """What differences are found with."""
        within = [row for row in self.rows if self.last is None or self.table.key(row) <= self.last]
        return self.table, self.peer, self.keys, within, self.owners or ()


def _comparable(copy: inbox.Copy, answer: CompareResponse) -> bool:
    """Does the copy follow the life that the owner has answered from, with nothing known to lack?"""
    return (
        copy.generation == answer.generation
        and not copy.installing
        and not copy.diverged
        and not copy.parked
    )
