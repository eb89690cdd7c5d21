"""Works through the queue: asks each application's home, again and again, until it decides.

Attempts are spaced by exponential back-off with jitter and start anew when a center comes back. After
any failure home is asked again with the same id, whatever it has done.
"""

import asyncio
from random import Random
from typing import TypeVar

import structlog

from duohuo.internal.v1.peer_services_pb2 import (
    DECIDE_INTENT_EXECUTE,
    DecideRequest,
    DecideResponse,
)
from duohuo.v1.transfer_service_pb2 import Application, TransferRequest
from runtime import telemetry
from runtime.endpoint import ask
from runtime.errors import RpcError, unreachable
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Store, StoreFault, Unit
from sync_bus.site import Site
from transfer_svc import applications, attempts
from transfer_svc.applications import ApplicationRow
from transfer_svc.states import IllegalTransition, decision_of

DELAY_MS_FIRST = 500
DELAY_MS_MAX = 60_000
ATTEMPTS_AT_ONCE_MAX = 32
ATTEMPT_TIMEOUT_S = 5.0
_DECIDE = peer_method("transfer", "Decide")
_logger = structlog.get_logger()
T = TypeVar("T")


def delay_ms(attempts: int, random: Random) -> int:
    """How long to wait after so many attempts: doubled each time up to a minute, half of it jitter."""
    longest = min(DELAY_MS_FIRST << min(attempts, 16), DELAY_MS_MAX)
    return longest // 2 + random.randrange(longest // 2)


class QueueWorker:
    """Works through the applications that this center accepted."""

    def __init__(self, site: Site, database: Store) -> None:
        self._site = site
        self._store = database
        self._changed = Signal()
        self._returned = asyncio.Event()
        database.on_commit(self._changed.notify)
        site.mesh.on_change(self._on_change)

    async def run(self) -> None:
        while True:
            try:
                await self._work()
            except RpcError:
                # The store does not take writes now; what is queued waits as it is.
                await asyncio.sleep(DELAY_MS_FIRST / 1000)

    async def _work(self) -> None:
        """One round: whatever is due now, or waiting until something is."""
        changed = self._changed.next()
        now_ms = self._site.clock.wall_ms()
        if self._returned.is_set():
            await self._store.write("wake", applications.wake(self._site.here, now_ms))
            self._returned.clear()
        due = await self._store.read(
            applications.due(self._site.here, now_ms, DELAY_MS_MAX, ATTEMPTS_AT_ONCE_MAX)
        )
        if due:
            async with asyncio.TaskGroup() as tasks:
                for row in due:
                    tasks.create_task(self._attempt(row))
            return
        next_ms = await self._store.read(applications.next_due_ms(self._site.here))
        timeout_s = None if next_ms is None else max(0.01, (next_ms - now_ms) / 1000)
        await self._changed.wait(changed, timeout_s)

    def _on_change(self, _center: str, reachable: bool) -> None:
        if reachable:
            self._returned.set()
            self._changed.notify()

    async def _attempt(self, row: ApplicationRow) -> None:
        application = row.message
        home = self._site.home_of(application.payer_account_id)
        with telemetry.span(
            "attempt application",
            {
                "duohuo.application_id": application.application_id,
                "duohuo.transfer_id": application.transfer_id,
                "duohuo.home": home,
                "duohuo.hop": "local" if home == self._site.here else "forwarded",
                "duohuo.attempt": application.attempts + 1,
            },
            parent=row.traceparent or None,
        ):
            try:
                await self._ask_home(row, home)
            except StoreFault:
                # Not even the attempt could be noted (a full disk), so it is due again at once.
                await asyncio.sleep(DELAY_MS_FIRST / 1000)
            except RpcError as error:
                telemetry.annotate({"duohuo.reason": error.reason})
            except IllegalTransition as contradiction:
                # The application has ended; what it ended as stands.
                _logger.warning(
                    "contradictory decision",
                    application=application.application_id,
                    what=str(contradiction),
                )

    async def _ask_home(self, row: ApplicationRow, home: str) -> None:
        application = row.message
        begin_ms = self._site.clock.wall_ms()
        try:
            if not self._site.mesh.reachable(home):
                raise unreachable(home, ran=False)
            answer = await ask(
                self._site.mesh.at(home),
                _DECIDE,
                DecideRequest(
                    intent=DECIDE_INTENT_EXECUTE,
                    transfer=transfer_of(application),
                    expire_time=application.expire_time,
                    application_id=application.application_id,
                ),
                DecideResponse,
                ATTEMPT_TIMEOUT_S,
            )
        except RpcError as error:
            next_ms = self._site.clock.wall_ms() + delay_ms(application.attempts, self._site.random)
            unit = applications.attempted(application.application_id, error.reason, next_ms)
            attempted = self._recorded(application, home, begin_ms, error.reason, unit)
            await self._store.write("attempted", attempted)
            raise
        result = answer.result
        decide = applications.decide(
            application.application_id,
            decision_of(result.state, result.reason),
            result.reason,
            result.payee_account_id,
            self._site.stamps.now(),
        )
        await self._store.write("decided", self._recorded(application, home, begin_ms, "", decide))

    def _recorded(
        self, application: Application, home: str, begin_ms: int, error: str, effect: Unit[T]
    ) -> Unit[T]:
        """The effect of an attempt, and the attempt itself for `duohuo why`."""
        end_ms = self._site.clock.wall_ms()
        return _both(
            attempts.record(application.application_id, home, begin_ms, end_ms, error), effect
        )


def _both(first: Unit[None], second: Unit[T]) -> Unit[T]:
    yield from first
    return (yield from second)


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
