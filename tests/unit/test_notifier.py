"""A decided application is one notification, sent until the receiver has it or it is a dead letter."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from random import Random

import pytest

from duohuo import webhooks
from duohuo.internal.v1.peer_services_pb2 import LookupContactRequest, LookupContactResponse
from duohuo.v1.operator_service_pb2 import (
    CHANNEL_EMAIL,
    CHANNEL_WEBHOOK,
    DELIVERY_STATE_DEAD,
    DELIVERY_STATE_DELIVERED,
    DELIVERY_STATE_DROPPED,
    DELIVERY_STATE_UNWANTED,
    DELIVERY_STATE_WAITING,
    Channel,
    DeliveryState,
    DropNotificationRequest,
    ListNotificationsRequest,
    RetryNotificationsRequest,
)
from duohuo.v1.transfer_service_pb2 import APPLICATION_STATE_SUCCEEDED
from runtime.dispatcher import Incoming
from runtime.endpoint import Call, Endpoint, Reply
from runtime.errors import RpcError, unreachable
from runtime.mesh import Mesh
from runtime.store import SqliteStore, query
from sync_bus import audit
from sync_bus.site import Site
from tests.fakes import (
    NOON_MS,
    FakeClock,
    FakeCourier,
    RecordingEndpoint,
    account,
    fails,
    says,
    see,
    site,
    stamp,
    temporary_store,
)
from tests.unit.centers import until
from tests.unit.test_applications import accept, decide, made
from transfer_svc import app, applications, notifications, notifier
from transfer_svc.courier import Undelivered
from transfer_svc.dead_letters import DeadLetters
from transfer_svc.notifier import ATTEMPTS_MAX, DELAY_MS_FIRST, DELAY_MS_MAX, Notifier, delay_ms
from transfer_svc.states import Decision, IllegalTransition

SECRET = "a-secret-of-the-test"
URL = "https://hooks.example.com/"
BOTH = LookupContactResponse(
    known=True, webhook_url=URL, webhook_secret=SECRET, email_address="alice@example.com"
)
INCOMING = Incoming("", 5.0)
DAY_MS = 86_400_000
LOST = Undelivered("TIMEOUT")


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    async with temporary_store(app.SCHEMA, app.TOPICS, ["b"]) as opened:
        yield opened


@dataclass
class Bench:
    """A notifier at center a. The accounts' home is b."""

    store: SqliteStore
    courier: FakeCourier
    clock: FakeClock
    site: Site
    home: RecordingEndpoint
    here: RecordingEndpoint
    notifier: Notifier

    async def attempt(self, channel: Channel.ValueType = CHANNEL_WEBHOOK) -> int:
        """Tries what is due on a channel, once; returns how many that were."""
        unit = notifications.due(channel, self.clock.wall_ms(), 100)
        due = await self.store.read(unit)
        for one in due:
            await self.notifier.attempt(one)
        return len(due)

    async def state(
        self, channel: Channel.ValueType = CHANNEL_WEBHOOK
    ) -> tuple[DeliveryState.ValueType, int, str]:
        rows = await self.store.read(
            query("SELECT state, attempts, last_error FROM delivery WHERE channel = ?", channel)
        )
        (row,) = rows
        return row[0], row[1], row[2]


def bench(store: SqliteStore, *failures: Undelivered) -> Bench:
    clock = FakeClock()
    clock.advance(10)  # after the decisions
    plain = site("a", "a", "b", clock=clock)
    home, here = RecordingEndpoint(says(BOTH)), RecordingEndpoint(says(LookupContactResponse()))
    endpoints: dict[str, Endpoint] = {"a": here, "b": home}
    own = replace(plain, mesh=Mesh("a", endpoints, clock))
    courier = FakeCourier(*failures)
    return Bench(store, courier, clock, own, home, here, Notifier(own, store, courier))


async def decided(
    store: SqliteStore, number: int = 1, decision: Decision = Decision.SUCCEEDED, payer: int = 1
) -> str:
    """Has an application of an account ended; returns the id of what is to be said."""
    application = made(number, payer=account(payer))
    await accept(store, application)
    reason = "INSUFFICIENT_FUNDS" if decision is Decision.FAILED else ""
    assert await decide(store, application, decision, reason) is not None
    return notifications.notification_id(application.application_id)


async def count(store: SqliteStore, table: str) -> int:
    (row,) = await store.read(query(f"SELECT count(*) FROM {table}"))  # noqa: S608 - constant names
    return int(row[0])


async def test_one_record_for_each_end_however_often_it_is_decided(store: SqliteStore) -> None:
    await accept(store, made())
    await decide(store, made(), Decision.DEBITED)
    assert await count(store, "notification") == 0
    for _ in range(3):
        await decide(store, made(), Decision.SUCCEEDED)
    with pytest.raises(IllegalTransition):
        await decide(store, made(), Decision.FAILED)
    assert (await count(store, "notification"), await count(store, "delivery")) == (1, 2)


async def test_a_copy_of_another_center_s_application_notifies_nobody(store: SqliteStore) -> None:
    application = made(origin="b")
    application.state = APPLICATION_STATE_SUCCEEDED
    await store.write("copy", applications.copy(application, b"body"))
    assert await count(store, "notification") == 0


async def test_the_webhook_is_signed_and_says_what_happened(store: SqliteStore) -> None:
    told = bench(store)
    noted = await decided(store, decision=Decision.FAILED)
    assert await told.attempt() == 1
    ((url, headers, body),) = told.courier.posted
    event = webhooks.verified(body, headers[webhooks.HEADER], SECRET, now_s=NOON_MS / 1000)
    assert url == URL
    assert event == {
        "id": noted,
        "type": "application.decided",
        "application_id": made().application_id,
        "transfer_id": "transfer-1",
        "state": "FAILED",
        "reason": "INSUFFICIENT_FUNDS",
        "amount": {"currency_code": "CNY", "minor_units": 5},
        "time": "2030-03-17T17:46:40.009+00:00",
    }
    assert await told.state() == (DELIVERY_STATE_DELIVERED, 0, "")
    assert await told.attempt() == 0


@pytest.mark.parametrize(
    ("decision", "subject"),
    [
        (Decision.SUCCEEDED, "Your transfer was made"),
        (Decision.FAILED, "Your transfer was refused"),
        (Decision.CANCELLED, "Your transfer was cancelled"),
        (Decision.EXPIRED, "Your transfer was not made in time"),
    ],
)
async def test_the_mail_says_so_too(store: SqliteStore, decision: Decision, subject: str) -> None:
    told = bench(store)
    noted = await decided(store, decision=decision)
    await told.attempt(CHANNEL_EMAIL)
    (mail,) = told.courier.mailed
    assert (mail.recipient, mail.message_id, mail.subject) == ("alice@example.com", noted, subject)
    assert made().transfer_id in mail.text
    assert "rent" not in mail.text


async def test_what_fails_is_tried_later_with_the_same_body(store: SqliteStore) -> None:
    told = bench(store, LOST, Undelivered("HTTP_500"))
    await decided(store)
    await told.attempt()
    assert await told.state() == (DELIVERY_STATE_WAITING, 1, "TIMEOUT")
    assert await told.attempt() == 0
    for _ in range(2):
        told.clock.advance(DELAY_MS_FIRST * 2)
        assert await told.attempt() == 1
    assert await told.state() == (DELIVERY_STATE_DELIVERED, 2, "")
    assert len({body for _, _, body in told.courier.posted}) == 1
    assert len({headers[webhooks.HEADER] for _, headers, _ in told.courier.posted}) == 3


async def test_after_all_attempts_it_is_a_dead_letter_until_an_operator_retries(
    store: SqliteStore,
) -> None:
    told = bench(store, *[LOST] * ATTEMPTS_MAX)
    noted = await decided(store)
    for _ in range(ATTEMPTS_MAX):
        assert await told.attempt() == 1
        told.clock.advance(DELAY_MS_MAX)
    assert await told.attempt() == 0
    assert await told.state() == (DELIVERY_STATE_DEAD, ATTEMPTS_MAX, "TIMEOUT")
    assert await store.read(notifications.counts()) == {
        "notifications_waiting": 1,  # the mail
        "notifications_dead": 1,
    }
    letters = DeadLetters(told.site, store)
    (listed,) = (await letters.ListNotifications(ListNotificationsRequest(), INCOMING)).deliveries
    assert (listed.notification_id, listed.channel) == (noted, CHANNEL_WEBHOOK)
    assert (listed.attempts, listed.last_error) == (ATTEMPTS_MAX, "TIMEOUT")
    assert URL not in str(listed)
    retried = await letters.RetryNotifications(RetryNotificationsRequest(), INCOMING)
    assert [one.state for one in retried.deliveries] == [DELIVERY_STATE_WAITING]
    (action,) = await store.read(audit.find(noted))
    assert (action.action, action.before) == ("notification retry", "undelivered by webhook")
    assert await told.attempt() == 1
    assert (await told.state())[0] == DELIVERY_STATE_DELIVERED
    with pytest.raises(RpcError, match="NOT_UNDELIVERED"):
        await letters.RetryNotifications(RetryNotificationsRequest(notification_id=noted), INCOMING)


async def test_what_another_attempt_would_not_change_is_a_dead_letter_at_once(
    store: SqliteStore,
) -> None:
    told = bench(store, Undelivered("HTTP_410", final=True))
    await decided(store)
    await told.attempt()
    assert await told.state() == (DELIVERY_STATE_DEAD, 1, "HTTP_410")


async def test_an_operator_drops_what_is_not_delivered_and_nothing_else(store: SqliteStore) -> None:
    told = bench(store, LOST)
    noted = await decided(store)
    await told.attempt()
    await told.attempt(CHANNEL_EMAIL)
    letters = DeadLetters(told.site, store)
    drop = DropNotificationRequest(notification_id=noted)
    dropped = await letters.DropNotification(drop, Incoming("", 1.0, operator="ann"))
    (action,) = await store.read(audit.find(noted))
    assert (action.who, action.action, action.after) == ("ann", "notification drop", "DROPPED")
    assert [(one.channel, one.state) for one in dropped.deliveries] == [
        (CHANNEL_WEBHOOK, DELIVERY_STATE_DROPPED)
    ]
    told.clock.advance(DELAY_MS_MAX)
    assert await told.attempt() == 0
    with pytest.raises(RpcError, match="NOT_UNDELIVERED"):
        await letters.DropNotification(drop, INCOMING)
    with pytest.raises(RpcError, match="must name one"):
        await letters.DropNotification(DropNotificationRequest(), INCOMING)


async def test_who_wants_nothing_gets_nothing(store: SqliteStore) -> None:
    told = bench(store)
    told.home.answer = says(LookupContactResponse(known=True))
    await decided(store)
    await told.attempt()
    assert told.courier.posted == []
    assert (await told.state())[0] == DELIVERY_STATE_UNWANTED


async def test_home_s_word_counts_more_than_the_copy_s(store: SqliteStore) -> None:
    told = bench(store)
    told.here.answer = says(LookupContactResponse(known=True))
    await decided(store)
    await told.attempt()
    assert len(told.courier.posted) == 1
    assert told.here.calls == []


async def test_the_copy_is_enough_while_home_is_away(store: SqliteStore) -> None:
    told = bench(store)
    told.home.answer, told.here.answer = fails(unreachable("b", ran=False)), says(BOTH)
    await decided(store)
    await told.attempt()
    (asked,) = told.here.calls
    assert LookupContactRequest.FromString(asked.request).account_id == account(1)
    assert len(told.courier.posted) == 1


async def test_only_home_says_that_nobody_wants_to_know(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits without counting attempts, and goes on when home is back."""
    monkeypatch.setattr(notifier, "ROUND_INTERVAL_S", 0)
    told = bench(store)
    told.home.answer = fails(unreachable("b", ran=False))
    await decided(store)
    await told.attempt()
    assert await told.state() == (DELIVERY_STATE_WAITING, 0, notifier.CONTACT_UNKNOWN)
    assert await told.attempt() == 0
    told.home.answer = says(BOTH)
    see(told.site.mesh, "b", answering=False)
    running = asyncio.create_task(told.notifier.run())
    see(told.site.mesh, "b", answering=True)
    await until(lambda: bool(told.courier.posted))
    await stop(running)


async def test_a_clock_set_back_holds_nothing_up(store: SqliteStore) -> None:
    told = bench(store, LOST)
    await decided(store)
    await told.attempt()
    await told.notifier.reschedule()
    assert await told.attempt() == 0
    told.clock.jump(-3_600_000)
    await told.notifier.reschedule()
    assert await told.attempt() == 1


async def test_a_slow_receiver_holds_up_nobody_else(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One account has many due and its server hangs; another account's are delivered."""
    monkeypatch.setattr(notifier, "ROUND_INTERVAL_S", 0)
    told = bench(store)
    hanging, release = asyncio.Event(), asyncio.Event()

    async def post(self: FakeCourier, url: str, _headers: object, body: bytes) -> None:
        self.posted.append((url, {}, body))
        if "slow" in url:
            hanging.set()
            await release.wait()

    monkeypatch.setattr(FakeCourier, "post", post)

    def answer(call: Call) -> Reply:
        asked = LookupContactRequest.FromString(call.request).account_id
        name = "slow" if asked == account(1) else "quick"
        contact = LookupContactResponse(
            known=True, webhook_url=f"https://{name}.example.com/", webhook_secret=SECRET
        )
        return Reply(contact.SerializeToString(), {})

    told.home.answer = told.here.answer = answer
    for number in range(1, 41):
        await decided(store, number, payer=1)
    await decided(store, 41, payer=2)
    running = asyncio.create_task(told.notifier.run())
    await hanging.wait()
    await until(lambda: any("quick" in url for url, _, _ in told.courier.posted))
    assert sum("slow" in url for url, _, _ in told.courier.posted) == 1
    release.set()
    await until(lambda: len(told.courier.posted) == 41)
    await stop(running)


async def test_a_host_of_many_accounts_gets_a_few_calls_at_a_time(store: SqliteStore) -> None:
    told = bench(store)
    told.notifier._hosts["hooks.example.com"] = notifier.PER_HOST_MAX
    await decided(store)
    await told.attempt()
    assert await told.state() == (DELIVERY_STATE_WAITING, 0, "HOST_BUSY")
    told.notifier._hosts.clear()
    told.clock.advance(notifier.BUSY_MS)
    await told.attempt()
    assert (await told.state())[0] == DELIVERY_STATE_DELIVERED
    assert not told.notifier._hosts


async def restored(store: SqliteStore, age_ms: int) -> None:
    """The application comes back from another center after its end, so many ms later."""
    await decided(store)
    await store.write("lose", query("DELETE FROM delivery"))
    await store.write("lose", query("DELETE FROM notification"))
    for expected in (1, 0):
        unit = notifications.of_restored("a", stamp(age_ms), 10)
        assert await store.write("restore", unit) == expected


async def test_an_origin_that_lost_its_disk_tells_again_what_was_decided_lately(
    store: SqliteStore,
) -> None:
    await restored(store, notifications.RESTORED_AGE_MS_MAX)
    told = bench(store)
    told.clock.advance(notifications.RESTORED_AGE_MS_MAX)
    assert await told.attempt() == 1
    assert (await told.state())[0] == DELIVERY_STATE_DELIVERED


async def test_but_not_what_is_long_past(store: SqliteStore) -> None:
    await restored(store, notifications.RESTORED_AGE_MS_MAX + 10)
    told = bench(store)
    told.clock.advance(notifications.RESTORED_AGE_MS_MAX * 2)
    assert await told.attempt() == 0
    assert await told.state() == (DELIVERY_STATE_DROPPED, 0, "TOO_OLD")


def test_back_off_doubles_and_ends_after_days_but_before_a_restored_center_forgets() -> None:
    random = Random(0)  # noqa: S311 - only jitter
    delays = [delay_ms(attempts, random) for attempts in range(1, ATTEMPTS_MAX)]
    for attempts, delay in enumerate(delays, start=1):
        longest = min(DELAY_MS_FIRST * 2 ** (attempts - 1), DELAY_MS_MAX)
        assert longest / 2 <= delay < longest
    assert len(set(delays)) == len(delays)
    latest_ms = sum(min(DELAY_MS_FIRST << n, DELAY_MS_MAX) for n in range(ATTEMPTS_MAX))
    assert DAY_MS < sum(delays) < latest_ms < notifications.RESTORED_AGE_MS_MAX


async def stop(running: "asyncio.Task[None]") -> None:
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
