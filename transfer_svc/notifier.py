"""Tells users what became of their applications: tries each delivery until the receiver has it.

Persist, then send: what a crash interrupts is sent again. Attempts are spaced by exponential back-off with
jitter for about three days; what has not arrived by then is a dead letter, for an operator to see. Each
channel works by itself, with one delivery at a time per account and a few per host, so that a slow
receiver holds up nobody but itself.
"""

import asyncio
import json
from collections import Counter
from contextlib import suppress
from random import Random
from urllib.parse import urlsplit

from duohuo import webhooks
from duohuo.internal.v1.peer_services_pb2 import LookupContactRequest, LookupContactResponse
from duohuo.v1.operator_service_pb2 import (
    CHANNEL_EMAIL,
    CHANNEL_WEBHOOK,
    DELIVERY_STATE_DEAD,
    DELIVERY_STATE_DELIVERED,
    DELIVERY_STATE_UNWANTED,
    Channel,
)
from runtime import telemetry
from runtime.endpoint import ask
from runtime.errors import RpcError
from runtime.methods import peer_method
from runtime.signal import Signal
from runtime.store import Store, Unit
from sync_bus.site import Site
from transfer_svc import notifications
from transfer_svc.courier import Courier, Mail, Undelivered
from transfer_svc.notifications import Due

AT_ONCE_MAX = {CHANNEL_WEBHOOK: 32, CHANNEL_EMAIL: 8}
PER_HOST_MAX = 8
ATTEMPTS_MAX = 24
DELAY_MS_FIRST = 2_000
DELAY_MS_MAX = 6 * 3_600_000
POSTPONED_MS = 60_000
BUSY_MS = 1_000
ROUND_INTERVAL_S = 0.1
"""Commits come by the thousand a second; what is due is not looked for more often than this."""
RETRY_INTERVAL_S = 0.5
RESCHEDULE_INTERVAL_S = 60.0
PEER_TIMEOUT_S = 2.0
CONTACT_UNKNOWN = "CONTACT_UNKNOWN"
_LOOKUP = peer_method("account", "LookupContact")


def delay_ms(attempts: int, random: Random) -> int:
    """How long to wait after so many attempts: doubled each time up to six hours, half of it jitter."""
    longest = min(DELAY_MS_FIRST << attempts - 1, DELAY_MS_MAX)
    return longest // 2 + random.randrange(longest // 2)


def mail_of(notification_id: str, body: str, recipient: str, time_ms: int) -> Mail:
    """What the user reads."""
    said = json.loads(body)
    amount = said["amount"]
    ended = {
        "SUCCEEDED": "was made",
        "FAILED": "was refused; no money has left your account for good",
        "CANCELLED": "was cancelled; no money was moved",
        "EXPIRED": "was not made in time; no money was moved",
    }[said["state"]]
    lines = [
        f"The transfer that you applied for {ended}.",
        "",
        f"Amount       {amount['minor_units']} {amount['currency_code']} (in minor units)",
        f"Transfer     {said['transfer_id']}",
        f"Application  {said['application_id']}",
        f"Decided      {said['time']}",
        *([f"Reason       {said['reason']}"] if said["reason"] else []),
        "",
        "You asked for this mail in the settings of your account.",
    ]
    subject = f"Your transfer {ended.partition(';')[0]}"
    return Mail(notification_id, recipient, subject, "\n".join(lines) + "\n", time_ms)


class Notifier:
    """Delivers the notifications of the applications that this center accepted."""

    def __init__(self, site: Site, database: Store, courier: Courier) -> None:
        self._site = site
        self._store = database
        self._courier = courier
        self._changed = Signal()
        self._returned = asyncio.Event()
        self._hosts: Counter[str] = Counter()
        database.on_commit(self._changed.notify)
        site.mesh.on_change(self._on_change)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._wake())
            tasks.create_task(self._reschedule())
            for channel in notifications.CHANNELS:
                tasks.create_task(self._serve(channel))

    async def attempt(self, due: Due) -> None:
        """Tries one delivery, and notes what came of it. Raises StoreFault if that cannot be noted."""
        with telemetry.span(
            f"notify by {Channel.Name(due.channel).removeprefix('CHANNEL_').lower()}",
            {"duohuo.notification_id": due.notification_id, "duohuo.attempt": due.attempts + 1},
            parent=due.traceparent or None,
        ):
            contact = await self._contact(due.account_id)
            if contact is None:
                await self._postpone(due, CONTACT_UNKNOWN, POSTPONED_MS)
                return
            wanted = (
                contact.webhook_url if due.channel == CHANNEL_WEBHOOK else contact.email_address
            )
            if not wanted:
                await self._store.write(
                    "notification unwanted",
                    notifications.finish(
                        due.notification_id,
                        due.channel,
                        DELIVERY_STATE_UNWANTED,
                        self._site.clock.wall_ms(),
                    ),
                )
                return
            host = (urlsplit(wanted).hostname or "") if due.channel == CHANNEL_WEBHOOK else ""
            if host and self._hosts[host] >= PER_HOST_MAX:
                await self._postpone(due, "HOST_BUSY", BUSY_MS)
                return
            self._hosts[host] += 1
            try:
                await self._send(due, contact)
            except Undelivered as undelivered:
                telemetry.annotate({"duohuo.reason": undelivered.reason})
                await self._failed(due, undelivered)
            else:
                await self._store.write(
                    "notification delivered",
                    notifications.finish(
                        due.notification_id,
                        due.channel,
                        DELIVERY_STATE_DELIVERED,
                        self._site.clock.wall_ms(),
                    ),
                )
            finally:
                self._hosts[host] -= 1
                self._hosts += Counter()  # forgets hosts that are not called now

    async def _send(self, due: Due, contact: LookupContactResponse) -> None:
        now_ms = self._site.clock.wall_ms()
        if due.channel == CHANNEL_EMAIL:
            mail = mail_of(due.notification_id, due.body, contact.email_address, now_ms)
            await self._courier.mail(mail)
            return
        body = due.body.encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "duohuo",
            webhooks.HEADER: webhooks.sign(body, contact.webhook_secret, now_ms // 1000),
        }
        await self._courier.post(contact.webhook_url, headers, body)

    async def _failed(self, due: Due, undelivered: Undelivered) -> None:
        attempts = due.attempts + 1
        now_ms = self._site.clock.wall_ms()
        next_ms = now_ms + delay_ms(attempts, self._site.random)
        given_up = undelivered.final or attempts >= ATTEMPTS_MAX

        def unit() -> Unit[None]:
            yield from notifications.failed(
                due.notification_id, due.channel, attempts, undelivered.reason, next_ms
            )
            if given_up:
                yield from notifications.finish(
                    due.notification_id,
                    due.channel,
                    DELIVERY_STATE_DEAD,
                    now_ms,
                    undelivered.reason,
                )

        await self._store.write("notification failed", unit())

    async def _postpone(self, due: Due, reason: str, longest_ms: int) -> None:
        """Not an attempt: the receiver was not asked."""
        wait_ms = longest_ms // 2 + self._site.random.randrange(longest_ms // 2)
        next_ms = self._site.clock.wall_ms() + wait_ms
        await self._store.write(
            "notification postponed",
            notifications.failed(due.notification_id, due.channel, due.attempts, reason, next_ms),
        )

    async def _contact(self, account_id: str) -> LookupContactResponse | None:
        """What the account wants, as its home says; while that is away, as far as it is known here. None if
        nobody knows: a setting may exist that has not been copied."""
        home = self._site.home_of(account_id)
        for center in dict.fromkeys((home, self._site.here)):
            try:
                found = await ask(
                    self._site.mesh.at(center),
                    _LOOKUP,
                    LookupContactRequest(account_id=account_id),
                    LookupContactResponse,
                    PEER_TIMEOUT_S,
                )
            except RpcError:
                continue
            if found.known or center == home:
                return found
        return None

    def _on_change(self, _center: str, reachable: bool) -> None:
        if reachable:
            self._returned.set()

    async def _wake(self) -> None:
        """What waits for a home center is due once one is back."""
        while True:
            await self._returned.wait()
            self._returned.clear()
            try:
                await self._store.write(
                    "wake notifications",
                    notifications.wake(CONTACT_UNKNOWN, self._site.clock.wall_ms()),
                )
            except RpcError:
                await asyncio.sleep(RETRY_INTERVAL_S)
                self._returned.set()

    async def _reschedule(self) -> None:
        """A clock that was set back must not hold anything up for long."""
        while True:
            await asyncio.sleep(RESCHEDULE_INTERVAL_S)
            with suppress(RpcError):  # a full disk
                await self.reschedule()

    async def reschedule(self) -> None:
        await self._store.write(
            "reschedule notifications",
            notifications.reschedule(
                self._site.clock.wall_ms(), DELAY_MS_FIRST, DELAY_MS_MAX, POSTPONED_MS
            ),
        )

    async def _serve(self, channel: Channel.ValueType) -> None:
        """Keeps as many deliveries of a channel under way as may be."""
        busy: set[str] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                changed = self._changed.next()
                now_ms = self._site.clock.wall_ms()
                for due in await self._startable(channel, now_ms, busy):
                    busy.add(due.account_id)
                    tasks.create_task(self._deliver(due, busy))
                next_ms = await self._store.read(notifications.next_due_ms(channel, now_ms))
                timeout_s = None if next_ms is None else (next_ms - now_ms) / 1000
                await self._changed.wait(changed, timeout_s)
                await asyncio.sleep(ROUND_INTERVAL_S)

    async def _startable(
        self, channel: Channel.ValueType, now_ms: int, busy: set[str]
    ) -> list[Due]:
        room = AT_ONCE_MAX[channel] - len(busy)
        if not room:
            return []
        found = await self._store.read(notifications.due(channel, now_ms, AT_ONCE_MAX[channel]))
        return [due for due in found if due.account_id not in busy][:room]

    async def _deliver(self, due: Due, busy: set[str]) -> None:
        try:
            await self.attempt(due)
        except RpcError:
            # What came of it could not be noted (a full disk): it is due again, and will be sent twice.
            await asyncio.sleep(RETRY_INTERVAL_S)
        finally:
            busy.discard(due.account_id)
            self._changed.notify()
