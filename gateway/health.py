"""How well each service of each center serves users, and which of those that may answer is asked first.

Known from what every gateway finds of its own services and tells with its answers to probes, and from
users' calls. A service that is slow or fails several times in a row is left for a while, each time longer,
and then asked for more and more again, as Envoy's outlier detection ejects hosts and its slow start takes
them back. Nobody is kept from the only center that may answer: it is just not asked before others.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum

from duohuo.internal.v1.peer_services_pb2 import (
    CheckHealthRequest,
    CheckHealthResponse,
    RoleHealth,
)
from duohuo.v1.operator_service_pb2 import PathStatus
from duohuo.v1.routing_pb2 import POLICY_LOCAL_FIRST
from gateway.routes import Target
from runtime.clock import Clock
from runtime.endpoint import Call, ask
from runtime.errors import ROLE_UNREACHABLE, RpcError, is_silence, unreachable
from runtime.mesh import Mesh
from runtime.methods import SERVICE_ROLES, Method, peer_method
from runtime.signal import Signal

DRAINING_ROLE = "account"
"""Whose service knows whether the center is drained."""
CHECK_INTERVAL_S = 1.0
CHECK_INTERVAL_UNKNOWN_S = 0.1
"""After a start."""
CHECK_TIMEOUT_S = 2.0
SLOW_MS = 1000
BAD_IN_A_ROW, BAD_RETURNING = 5, 2
HOLD_MS_FIRST = 2_000
HOLD_MS_MAX = 60_000
RAMP_MS = 8_000
CALM_MS = 60_000
"""After so long without being left, a service is left for as short as at first."""
AT_ONCE_FIRST = 4
"""Calls at once to a service that is just back; each second twice as many, until the ramp is over."""
UNLIMITED = 1 << 30
WAITING_MAX = 1_000
_FAILURES = frozenset({ROLE_UNREACHABLE, "CENTER_RECOVERING"})


class State(Enum):
    GOOD = "good"
    LEFT = "left"
    RETURNING = "returning"


class Event(Enum):
    FAILING = "failing"
    """It was bad several times in a row; fewer if it is just returning."""
    HELD = "held"
    """It was left for long enough."""
    BACK = "back"
    """Its center answers again."""
    RAMPED = "ramped"
    """It has been asked for more and more for long enough."""


TRANSITIONS = {
    (State.GOOD, Event.FAILING): State.LEFT,
    (State.GOOD, Event.BACK): State.RETURNING,
    (State.LEFT, Event.HELD): State.RETURNING,
    (State.LEFT, Event.BACK): State.LEFT,
    (State.RETURNING, Event.FAILING): State.LEFT,
    (State.RETURNING, Event.BACK): State.RETURNING,
    (State.RETURNING, Event.RAMPED): State.GOOD,
}


@dataclass(slots=True)
class Path:
    """The way to one service of one center. Times are of the monotonic clock."""

    state: State = State.GOOD
    since_ms: int = 0
    hold_ms: int = HOLD_MS_FIRST
    bad: int = 0
    """Bad results in a row."""
    running: int = 0
    waiting: int = 0
    ended: Signal = field(default_factory=Signal)

    def happen(self, event: Event, now_ms: int) -> None:
        if event is Event.FAILING and self.state is State.RETURNING:
            self.hold_ms = min(2 * self.hold_ms, HOLD_MS_MAX)
        elif event is Event.FAILING and now_ms - self.since_ms > CALM_MS:
            self.hold_ms = HOLD_MS_FIRST
        self.state, self.since_ms, self.bad = TRANSITIONS[self.state, event], now_ms, 0

    def result(self, *, good: bool, now_ms: int) -> None:
        """One call has ended."""
        self.bad = 0 if good else self.bad + 1
        needed = BAD_RETURNING if self.state is State.RETURNING else BAD_IN_A_ROW
        if self.bad >= needed and self.state is not State.LEFT:
            self.happen(Event.FAILING, now_ms)

    def pass_time(self, now_ms: int) -> None:
        if self.state is State.LEFT and now_ms - self.since_ms >= self.hold_ms:
            self.happen(Event.HELD, now_ms)
        if self.state is State.RETURNING and now_ms - self.since_ms >= RAMP_MS:
            self.happen(Event.RAMPED, now_ms)

    def at_once(self, now_ms: int) -> int:
        """How many calls may be on their way at once."""
        if self.state is not State.RETURNING:
            return UNLIMITED
        return AT_ONCE_FIRST << ((now_ms - self.since_ms) // 1000)


class Health:
    """What one gateway knows. `run` must be running."""

    def __init__(self, mesh: Mesh, clock: Clock) -> None:
        self._mesh = mesh
        self._clock = clock
        self._own: dict[str, RoleHealth] = {}
        self._own_draining = False
        self.on_draining: Callable[[bool], Awaitable[None]] = _nobody_cares
        self._failed_checks = dict.fromkeys(SERVICE_ROLES, 0)
        self._paths = {
            (center, role): Path() for center in (mesh.here, *mesh.peers) for role in SERVICE_ROLES
        }
        mesh.on_change(self._on_change)

    async def run(self) -> None:
        """Checks this center's own services, for as long as the process lives."""
        while True:
            await asyncio.gather(*(self.check(role) for role in SERVICE_ROLES))
            known = len(self._own) == len(SERVICE_ROLES)
            await asyncio.sleep(CHECK_INTERVAL_S if known else CHECK_INTERVAL_UNKNOWN_S)

    async def check(self, role: str) -> None:
        """Asks one of them. Two failures in a row count."""
        method = peer_method(role, "CheckHealth")
        request = CheckHealthRequest()
        try:
            found = await ask(
                self._mesh.local, method, request, CheckHealthResponse, CHECK_TIMEOUT_S
            )
        except RpcError:
            self._failed_checks[role] += 1
            if self._failed_checks[role] > 1:
                self._own[role] = RoleHealth(role=role)
        else:
            self._failed_checks[role] = 0
            if role == DRAINING_ROLE and found.draining != self._own_draining:
                self._own_draining = found.draining
                await self.on_draining(found.draining)
            self._own[role] = RoleHealth(role=role, answers=True, takes_writes=found.takes_writes)

    def draining(self, center: str) -> bool:
        """Shall it take nothing new that would stay with it?"""
        if center == self._mesh.here:
            return self._own_draining
        return self._mesh.report(center).draining

    def own(self) -> Sequence[RoleHealth]:
        """For the answers to probes."""
        return list(self._own.values())

    def ordered(self, wanted: Sequence[Target], method: Method) -> list[Target]:
        """Those that may answer, the healthy ones first, else as they were."""
        if len(wanted) == 1:
            return list(wanted)
        return sorted(wanted, key=lambda one: not self._is_good(one.center, method))

    @asynccontextmanager
    async def asking(self, center: str, call: Call) -> AsyncIterator[Call]:
        """Around a user's call to a center. To a service that is just back it waits for its turn, half of
        the call's time at most; gives the call with what is left of that. Raises RpcError."""
        path = self._paths.get((center, call.method.role)) or Path()
        waited_ms = await self._turn(path, center, int(call.timeout_s * 500))
        path.running += 1
        began_ms = self._clock.monotonic_ms()
        good: bool | None = None  # nothing is known of a service that a caller gave up on soon
        try:
            yield call._replace(timeout_s=call.timeout_s - waited_ms / 1000)
            good = True
        except RpcError as error:
            good = not is_silence(error) and error.reason not in _FAILURES
            raise
        finally:
            path.running -= 1
            path.ended.notify()
            now_ms = self._clock.monotonic_ms()
            if now_ms - began_ms >= SLOW_MS:
                good = False
            # What was not even sent to a lost center says nothing of its services.
            if good is not None and self._mesh.reachable(center):
                path.result(good=good, now_ms=now_ms)

    async def _turn(self, path: Path, center: str, timeout_ms: int) -> int:
        """Waits until one more call may be on its way; returns for how long, in ms."""
        began_ms = self._clock.monotonic_ms()
        while True:
            now_ms = self._clock.monotonic_ms()
            path.pass_time(now_ms)
            if path.running < path.at_once(now_ms):
                return now_ms - began_ms
            left_ms = began_ms + timeout_ms - now_ms
            if left_ms <= 0 or path.waiting >= WAITING_MAX:
                raise unreachable(center, ran=False)
            ended = path.ended.next()
            path.waiting += 1
            try:
                await path.ended.wait(ended, min(1.0, left_ms / 1000))
            finally:
                path.waiting -= 1

    def cannot_store(self, center: str) -> bool:
        """Is there a service of this center that answers, but takes no writes?"""
        return any(one.answers and not one.takes_writes for one in self._reports(center))

    def shown(self) -> list[PathStatus]:
        """What is not as it should be, for operators."""
        found = []
        for (center, role), path in sorted(self._paths.items()):
            path.pass_time(self._clock.monotonic_ms())
            report = self._report(center, role)
            if report is not None and not report.answers:
                what = "does not answer its gateway, or gets its data back"
            elif report is not None and not report.takes_writes:
                what = "takes no writes"
            elif path.state is State.LEFT:
                what = "is left, as it was slow or failed several times in a row"
            elif path.state is State.RETURNING:
                what = "is asked for more and more again"
            else:
                continue
            found.append(PathStatus(center=center, role=role, what=what))
        return found

    def _is_good(self, center: str, method: Method) -> bool:
        path = self._paths.get((center, method.role))
        if path is None:
            return True
        path.pass_time(self._clock.monotonic_ms())
        if method.policy == POLICY_LOCAL_FIRST and self.draining(center):
            return False
        report = self._report(center, method.role)
        if report is not None:
            # That this center's own service does not answer it says at once, and maybe it does by now.
            if not report.answers and center != self._mesh.here:
                return False
            if not report.takes_writes and not method.needs_no_write:
                return False
        # What must not be asked for twice is not sent away only because it is slow here.
        is_left = path.state is State.LEFT and method.safe_to_repeat
        return self._mesh.reachable(center) and not is_left

    def _report(self, center: str, role: str) -> RoleHealth | None:
        return next((one for one in self._reports(center) if one.role == role), None)

    def _reports(self, center: str) -> Sequence[RoleHealth]:
        return self.own() if center == self._mesh.here else self._mesh.report(center).roles

    def _on_change(self, center: str, reachable: bool) -> None:
        now_ms = self._clock.monotonic_ms()
        for role in SERVICE_ROLES if reachable else ():
            self._paths[center, role].happen(Event.BACK, now_ms)


async def _nobody_cares(_draining: bool) -> None:
    """Until somebody wants to hear of it."""
