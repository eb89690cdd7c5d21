"""Works through the queue: asks each application's home, again and again, until it decides.

Each home center has a lane of its own, so that one that is slow or away holds up nobody else's. A lane
asks for a bounded number of applications at once, the first of each payer's line, whoever has waited
longest first. While its home is known to be away it does nothing at all; when home is back, it is asked
for one application first, and for more once it has answered. What home is asked for again has the same id,
whatever home has done.

Attempts are spaced by exponential back-off with jitter: those of a lane whose home answers probes but not
this, and those of an application that home cannot decide because of a third party.
"""

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

import structlog

from duohuo.internal.v1.peer_services_pb2 import (
    DECIDE_INTENT_CANCEL,
    DECIDE_INTENT_EXECUTE,
    DecideRequest,
    DecideResponse,
)
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLING,
    Application,
    TransferRequest,
)
from runtime import telemetry
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.home_calls import WRONG_HOME, named_home
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Store, Unit
from sync_bus.site import Site
from transfer_svc import applications, attempts, rules
from transfer_svc.applications import ASIDE, NEXT, ApplicationRow
from transfer_svc.states import IllegalTransition, decision_of

DELAY_MS_FIRST = 500
DELAY_MS_MAX = 60_000
AT_ONCE_MAX = 16
"""Applications that one home is asked for at the same time; all homes together, so many times more."""
ASIDE_AT_ONCE_MAX = 4
"""Of these, those that have stepped aside: neither they nor the others must wait for all of the rest."""
LINED_UP_AT_ONCE_MAX = 500
LOOK_AGAIN_S = 60.0
ATTEMPT_TIMEOUT_S = 5.0
_DECIDE = peer_method("transfer", "Decide")
_logger = structlog.get_logger()
T = TypeVar("T")


def delay_ms(attempts: int, random: Random) -> int:
    """How long to wait after so many attempts: doubled each time up to a minute, half of it jitter."""
    longest = min(DELAY_MS_FIRST << min(attempts, 16), DELAY_MS_MAX)
    return longest // 2 + random.randrange(longest // 2)


@dataclass
class Lane:
    """The queue before one home. `resume_ms` is on the monotonic clock."""

    home: str
    failures: int = 0
    resume_ms: int = 0
    asked: dict[str, None] = field(default_factory=dict)
    """Ids that home is being asked for."""
    changed: Signal = field(default_factory=Signal)

    def free(self) -> int:
        """For how many more home may be asked; for one at a time, until it has answered again."""
        return max(0, (1 if self.failures else AT_ONCE_MAX) - len(self.asked))

    def fail(self, failures_before: int, now_ms: int, random: Random) -> None:
        """Pauses, longer each time. What was asked at the same time, when there were `failures_before`,
        fails together and counts once."""
        if self.failures == failures_before:
            self.resume_ms = now_ms + delay_ms(self.failures, random)
            self.failures += 1

    def succeed(self) -> None:
        """Home has answered."""
        self.failures, self.resume_ms = 0, 0

    def wake(self) -> None:
        """Home is back: it is asked at once, and carefully."""
        self.failures, self.resume_ms = 1, 0
        self.changed.notify()


class QueueWorker:
    """Works through the applications that this center accepted."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database
        self._lanes = {home: Lane(home) for home in (site.here, *site.mesh.peers)}
        self._homes_changed = Signal()
        site.mesh.on_change(self._on_change)

    def homes_changed(self) -> None:
        """Slots have other homes than before; those who wait stand in the wrong lines."""
        self._homes_changed.notify()

    def notice(self, payer_account_id: str) -> None:
        """Something of this payer's has entered the queue, or should be asked for now."""
        self._lanes[self._site.home_of(payer_account_id)].changed.notify()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_lines())
            for lane in self._lanes.values():
                tasks.create_task(self._work(lane))

    async def _keep_lines(self) -> None:
        while True:
            changed = self._homes_changed.next()
            await self._line_up()
            for lane in self._lanes.values():
                lane.changed.notify()
            await self._homes_changed.wait(changed)

    async def _line_up(self) -> None:
        """Puts into the queue what has come back from other centers after the loss of this one's disk, and
        into another line what has got another home."""
        here = self._site.here
        with self._store.frozen() as frozen:
            strays = await frozen.read(applications.strays(here, self._site.home_of))
        while strays:
            some = strays[:LINED_UP_AT_ONCE_MAX]
            try:
                unit = applications.line_up(some, self._site.clock.wall_ms())
                await self._store.write("line up", unit)
            except RpcError:
                await asyncio.sleep(DELAY_MS_FIRST / 1000)  # the store does not take writes now
            else:
                del strays[:LINED_UP_AT_ONCE_MAX]

    def _on_change(self, center: str, reachable: bool) -> None:
        if reachable:
            self._lanes[center].wake()

    async def _work(self, lane: Lane) -> None:
        async with asyncio.TaskGroup() as attempts:
            while True:
                changed = lane.changed.next()
                timeout_s = await self._begin(lane, attempts)
                # Who accepted an application may have been cancelled before it could tell of it.
                await lane.changed.wait(changed, min(timeout_s or LOOK_AGAIN_S, LOOK_AGAIN_S))

    async def _begin(self, lane: Lane, attempts: asyncio.TaskGroup) -> float | None:
        """Begins what may be begun; returns after how long there may be more, unless the lane changes."""
        if not self._site.mesh.reachable(lane.home) or not lane.free():
            return None
        paused_ms = lane.resume_ms - self._site.clock.monotonic_ms()
        if paused_ms > 0:
            return paused_ms / 1000
        now_ms = self._site.clock.wall_ms()
        for application_id in await self._due(lane, now_ms):
            lane.asked[application_id] = None
            attempts.create_task(self._attempt(lane, application_id))
        next_ms = await self._store.read(applications.next_due_ms(lane.home, now_ms))
        return None if next_ms is None else max(0.01, (next_ms - now_ms) / 1000)

    async def _due(self, lane: Lane, now_ms: int) -> list[str]:
        free, found = lane.free(), list[str]()
        places = [(ASIDE, ASIDE_AT_ONCE_MAX), (NEXT, AT_ONCE_MAX)]
        if lane.failures:
            places.reverse()  # what has failed before must not be all that home is tried with
        for place, limit in places:
            unit = applications.due(lane.home, place, now_ms, DELAY_MS_MAX, limit)
            found += [one for one in await self._store.read(unit) if one not in lane.asked]
        return found[:free]

    async def _attempt(self, lane: Lane, application_id: str) -> None:
        failures = lane.failures
        try:
            row = await self._store.read(applications.find(application_id))
            if row is not None:
                await self._ask(lane, row)
        except RpcError:
            # Home, or the store here: either way there is no point in going on with the next one.
            lane.fail(failures, self._site.clock.monotonic_ms(), self._site.random)
        except IllegalTransition as contradiction:
            # The application has ended; what it ended as stands.
            _logger.warning(
                "contradictory decision", application=application_id, what=str(contradiction)
            )
        else:
            lane.succeed()
        finally:
            del lane.asked[application_id]
            lane.changed.notify()

    async def _ask(self, lane: Lane, row: ApplicationRow) -> None:
        """Raises RpcError when home, or the store here, does not work."""
        application = row.message
        cancel = application.state == APPLICATION_STATE_CANCELLING
        request = DecideRequest(
            intent=DECIDE_INTENT_CANCEL if cancel else DECIDE_INTENT_EXECUTE,
            transfer=transfer_of(application),
            expire_time=application.expire_time,
            application_id=application.application_id,
        )
        with telemetry.span(
            "attempt application",
            {
                "duohuo.application_id": application.application_id,
                "duohuo.transfer_id": application.transfer_id,
                "duohuo.home": lane.home,
                "duohuo.hop": "local" if lane.home == self._site.here else "forwarded",
                "duohuo.attempt": application.attempts + 1,
            },
            parent=row.traceparent or None,
        ):
            begin_ms = self._site.clock.wall_ms()
            try:
                answer = await ask(
                    self._site.mesh.at(lane.home),
                    _DECIDE,
                    request,
                    DecideResponse,
                    ATTEMPT_TIMEOUT_S,
                )
            except RpcError as error:
                telemetry.annotate({"duohuo.reason": error.reason})
                if error.reason == WRONG_HOME:
                    slot = self._site.slot_of(application.payer_account_id)
                    named_home(error, slot, self._site.placement)
                    self.homes_changed()
                await self._note(lane.home, application, begin_ms, error)
                return
            result = answer.result
            decide = applications.decide(
                application.application_id,
                decision_of(result.state, result.reason),
                result.reason,
                result.payee_account_id,
                self._site.stamps.now(),
            )
            unit = self._recorded(lane.home, application, begin_ms, "", decide)
            await self._store.write("decided", unit)

    def _recorded(
        self, home: str, application: Application, begin_ms: int, error: str, effect: Unit[T]
    ) -> Unit[T]:
        """The effect of an attempt, and the attempt itself for `duohuo why`."""
        end_ms = self._site.clock.wall_ms()
        yield from attempts.record(application.application_id, home, begin_ms, end_ms, error)
        return (yield from effect)

    async def _note(
        self, home: str, application: Application, begin_ms: int, error: RpcError
    ) -> None:
        """Notes an attempt in vain; raises its error again if it speaks of home."""
        of_home = rules.speaks_of_home(error)
        aside_ms = None if of_home else delay_ms(application.attempts, self._site.random)
        unit = applications.attempted(
            application.application_id, error.reason, self._site.clock.wall_ms(), aside_ms
        )
        recorded = self._recorded(home, application, begin_ms, error.reason, unit)
        await self._store.write("attempted", recorded)
        if of_home:
            raise error


def transfer_of(application: Application) -> TransferRequest:
    """The transfer that a stored application applies for."""
    transfer = TransferRequest(
        transfer_id=application.transfer_id,
        payer_account_id=application.payer_account_id,
        amount=application.amount,
        memo=application.memo,
    )
    if payee := application.WhichOneof("payee"):
        setattr(transfer, payee, getattr(application, payee))
    return transfer
