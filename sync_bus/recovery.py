"""How a store begins its life: new, or after its disk was lost.

An empty store cannot know whether it is new or was lost, so it asks. Every other center is told the number
of the new life, its generation, and from then on takes nothing of an earlier one (it is sealed, as a
ledger of Apache BookKeeper is fenced before it is recovered); it answers how far it has applied this
center's topics. Whoever has most of a topic gives it back, and new entries are numbered behind it. Only
then does this center act as home again. What no other center had is lost, and nothing else.

A store that lacks entries that others have, as after the restore of a backup, stops (`lost`): begun
again from an empty disk it gets everything back. It asks before it serves: what it wrote meanwhile would
have numbers that the others have seen, and they would take it for what they have.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import structlog
from grpc import StatusCode

from duohuo.internal.v1.peer_services_pb2 import SealRequest, SealResponse
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.mesh import Mesh
from runtime.methods import peer_method
from runtime.store import Store, Unit
from sync_bus import inbox, log
from sync_bus.log import Position, Stamps, Topic
from sync_bus.snapshot import Reconcile, Snapshots

SEAL_TIMEOUT_S = 2.0
ONLY_ASK_TIMEOUT_S = 1.0
RETRY_DELAY_S = 0.5
REASON = "CENTER_RECOVERING"

Join = Callable[[Sequence[str]], Awaitable[None]]
"""Learns from peers that have answered what a new store must know. Raises RpcError."""

_logger = structlog.get_logger()


async def nothing_to_learn(_peers: Sequence[str]) -> None:
    """For services that every center begins alike."""


class Recovery:
    """Brings one service's store to life. `doing` says what it does or waits for, until it serves."""

    def __init__(
        self,
        role: str,
        topics: Sequence[Topic],
        store: Store,
        mesh: Mesh,
        stamps: Stamps,
        snapshots: Snapshots,
        reconcile: Reconcile,
        *,
        lone_start: bool,
        join: Join,
    ) -> None:
        self._join = join
        self._role = role
        self._topics = topics
        self._store = store
        self._mesh = mesh
        self._stamps = stamps
        self._snapshots = snapshots
        self._reconcile = reconcile
        self._lone_start = lone_start
        self._alive = asyncio.Event()
        self._lost = asyncio.Event()
        self.doing = "starts"

    def refusal(self) -> RpcError | None:
        """What to say to a call that this service cannot answer yet; None if it can."""
        if not self.doing:
            return None
        return RpcError(
            StatusCode.UNAVAILABLE,
            REASON,
            f"the {self._role} service of center {self._mesh.here} {self.doing}",
            retry_after_ms=1000,
            advice="Try again in a moment; operators see `duohuo status`.",
        )

    async def mark_lost(self) -> None:
        """Stops serving for good: another center has applied more of this store's log than it has."""
        if self._lost.is_set():
            return
        self._lost.set()
        self.doing = (
            "has lost entries that other centers have: stop it, move its data away,"
            " and start it with an empty disk"
        )
        _logger.error("store lost entries", role=self._role)
        with suppress(RpcError):  # on a full disk it is found again after a restart
            await self._store.write("lost", log.mark_lost())

    async def wait_lost(self) -> None:
        """Returns when this service must stop all that it does."""
        await self._lost.wait()

    async def wait_alive(self) -> None:
        """Returns once this service may serve."""
        await self._alive.wait()

    async def run(self) -> None:
        """Returns once the store is alive."""
        life = await self._store.read(log.life())
        if life.lost or (life.generation and await self._others_have_more(life.generation)):
            await self.mark_lost()
        if not life.generation:
            await self._begin()
        if self._lost.is_set():
            await asyncio.Event().wait()
        self.doing = ""
        self._alive.set()

    async def _others_have_more(self, generation: int) -> bool:
        """Does one of those that answer now know of more than this store has, or of a later life?"""
        answers = await asyncio.gather(*(self._ask(peer) for peer in self._mesh.peers))
        heads = await self._store.read(log.heads())
        return any(
            answer.generation > generation
            or (
                answer.generation == generation
                and any(seq > heads.get(topic, seq) for topic, seq in answer.cursors.items())
            )
            for answer in answers
            if answer
        )

    async def _begin(self) -> None:
        while True:
            try:
                generation, answers = await self._seal()
                await self._join(sorted(answers))
                positions = await self._restore(answers)
                unit = self._begin_life(generation, positions)
                await self._store.write("begin life", unit)
            except RpcError as error:
                self.doing = f"gets its data back, and meanwhile: {error.message}"
                await asyncio.sleep(RETRY_DELAY_S)
            else:
                _logger.info("store begins", role=self._role, generation=generation)
                return

    def _begin_life(self, generation: int, positions: Mapping[str, Position]) -> Unit[None]:
        yield from log.begin_life(generation, positions)
        if positions:
            # What came back tells of what others did, as far as they had got: copies from before that
            # would contradict it, so each is taken whole.
            for peer in self._mesh.peers:
                for copied in self._topics:
                    yield from inbox.begin_install(peer, copied.name)
        for topic in positions:
            # One topic may have come back as of an earlier moment than another.
            while (yield from self._reconcile(self._mesh.here, topic)):
                pass

    async def _seal(self) -> tuple[int, Mapping[str, SealResponse]]:
        """Tells all other centers; returns the new generation, and how far each of them is."""
        generation = max(self._stamps.clock.wall_ms(), 1)
        answers: dict[str, SealResponse] = {}
        while len(answers) < len(self._mesh.peers):
            asked = [peer for peer in self._mesh.peers if peer not in answers]
            found = await asyncio.gather(
                *(self._ask(peer, generation, SEAL_TIMEOUT_S) for peer in asked)
            )
            answers |= {peer: one for peer, one in zip(asked, found, strict=True) if one}
            known = max((one.generation for one in answers.values()), default=generation)
            if known > generation:
                generation, answers = known + 1, {}
                continue
            silent = [peer for peer in self._mesh.peers if peer not in answers]
            if silent and self._lone_start:
                break
            if silent:
                self.doing = (
                    f"has an empty store, and waits for {', '.join(silent)} to say what they have of it"
                    " (DUOHUO_LONE_START=true starts without them)"
                )
                await asyncio.sleep(RETRY_DELAY_S)
        return generation, answers

    async def _ask(
        self, peer: str, generation: int = 0, timeout_s: float = ONLY_ASK_TIMEOUT_S
    ) -> SealResponse | None:
        """Seals for a generation; 0 only asks. None if the peer does not answer."""
        try:
            return await ask(
                self._mesh.at(peer),
                peer_method(self._role, "Seal"),
                SealRequest(center=self._mesh.here, generation=generation),
                SealResponse,
                timeout_s,
            )
        except RpcError:
            return None

    async def _restore(self, answers: Mapping[str, SealResponse]) -> Mapping[str, Position]:
        positions = {}
        for topic in self._topics:
            applied = {peer: one.cursors.get(topic.name, 0) for peer, one in answers.items()}
            most = max(applied.values(), default=0)
            # Of those that have most, any that has all of it; else it is asked until it has.
            holder = min(
                (peer for peer, seq in applied.items() if seq == most),
                key=lambda peer: topic.name in answers[peer].incomplete,
                default="",
            )
            if most == 0 and (not holder or topic.name not in answers[holder].incomplete):
                continue
            self.doing = f"gets its {topic.name} back from center {holder}"
            positions[topic.name] = await self._snapshots.restore(holder, topic.name)
        return positions
