"""`duohuo why TRANSFER` tells in plain words what happened, from what centers keep for ever.

The facts are those of real ledgers and queues; names stand for ids, and times are seconds after noon.
"""

import re
from collections.abc import AsyncIterator, Sequence
from unittest.mock import AsyncMock, patch

import pytest

from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    CHANNEL_EMAIL,
    CHANNEL_WEBHOOK,
    DELIVERY_STATE_DEAD,
    DELIVERY_STATE_DELIVERED,
    FindTransfersResponse,
    SpanRecord,
    TransferFacts,
)
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_QUEUED,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    Application,
    TransferRequest,
)
from ops import story
from ops.story import Known
from runtime.clock import iso, timestamp
from runtime.dispatcher import Incoming
from runtime.store import query
from tests.fakes import NOON_MS, FakeClock, account
from tests.unit.bank import Bank, Center, bank
from transfer_svc import applications, attempts, histories, notifications
from transfer_svc.payees import Payees
from transfer_svc.service import TransferService
from transfer_svc.states import Decision

ALICE, ALAN, BOB = account(0), account(2), account(1)
"""At home at a, a and b."""
NAMES = {ALICE: "ALICE", ALAN: "ALAN", BOB: "BOB"}
ID = "transfer-1"


@pytest.fixture
async def two() -> AsyncIterator[Bank]:
    async with bank("a", "b") as opened:
        await opened.deposit(ALICE, 1000, "deposit-1")
        yield opened


def later(two: Bank, by_ms: int = 1000) -> None:
    clock = two.centers["a"].site.clock  # the one of all centers
    assert isinstance(clock, FakeClock)
    clock.advance(by_ms)


async def collected(two: Bank, wanted: str, *asked: str) -> list[TransferFacts]:
    """What the centers that answer know together."""
    return story.merged(
        {
            name: FindTransfersResponse(
                transfers=await two.centers[name].store.read(histories.find(wanted))
            )
            for name in asked or two.centers
        }
    )


def readable(text: str) -> list[str]:
    for one, name in NAMES.items():
        text = text.replace(one, name)
    for second in range(200):
        text = text.replace(iso(NOON_MS + second * 1000), f"{second} s")
    return text.splitlines()


async def told(
    two: Bank, *asked: str, wanted: str = ID, spans: Sequence[SpanRecord] = ()
) -> list[str]:
    (facts,) = await collected(two, wanted, *asked)
    return readable(story.text(Known(facts, spans)))


async def test_at_one_home(two: Bank) -> None:
    later(two)
    await two.pay(ALICE, ALAN, 250, ID, asked="b")
    await two.settle()
    expected = [
        "transfer transfer-1 of ALICE",
        "1 s  b   ALICE asked center b to pay 250 CNY to ALAN at once.",
        (
            "1 s  a   Center a, the payer's home, decided to pay. It saw a balance of 1000 CNY;"
            " 750 CNY were left."
        ),
        (
            "1 s  a   Center a, the payee's home, credited ALAN with 250 CNY: 0 CNY before, 250 CNY"
            " after."
        ),
        "It ended as CREDITED.",
    ]
    assert await told(two) == expected
    # b's copy knows as much.
    assert await told(two, "b") == expected


async def test_between_homes_as_far_as_it_has_come(two: Bank) -> None:
    await two.pay(ALICE, BOB, 250, ID, asked="b")
    decided = [
        "transfer transfer-1 of ALICE",
        "0 s  b   ALICE asked center b to pay 250 CNY to BOB at once.",
        (
            "0 s  a   Center a, the payer's home, decided to pay. It saw a balance of 1000 CNY;"
            " 750 CNY were left. 250 CNY went into transit to center b, the payee's home."
        ),
    ]
    assert await told(two) == [
        *decided,
        (
            "The money is still in transit: the payer's home has not heard yet that center b has"
            " credited or refused it."
        ),
    ]
    later(two)
    await two.settle()
    assert await told(two) == [
        *decided,
        (
            "1 s  b   Center b, the payee's home, credited BOB with 250 CNY: 0 CNY before, 250 CNY"
            " after."
        ),
        "It ended as CREDITED.",
    ]


@pytest.mark.parametrize("asked", [("a",), ("b",), ("a", "b")], ids="+".join)
async def test_a_refusal_tells_the_balance_that_was_seen_not_the_one_of_now(
    two: Bank, asked: tuple[str, ...]
) -> None:
    later(two)
    await two.pay(ALICE, BOB, 1001, ID, asked="b")
    later(two)
    await two.deposit(ALICE, 5000, "deposit-2")
    await two.settle()
    assert await told(two, *asked) == [
        "transfer transfer-1 of ALICE",
        "1 s  b   ALICE asked center b to pay 1001 CNY to BOB at once.",
        (
            "1 s  a   Center a, the payer's home, refused: the balance did not suffice"
            " (INSUFFICIENT_FUNDS). It saw that ALICE had 1000 CNY."
        ),
        "It ended as FAILED.",
    ]


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("PAYEE_NOT_FOUND", "there was no such payee"),
        ("CANCELLED", "the payer had withdrawn it"),
        ("EXPIRED", "its time had run out"),
    ],
)
async def test_a_refusal_for_another_reason_speaks_of_no_balance(
    two: Bank, refused: str, words: str
) -> None:
    await two.pay(ALICE, BOB, 1, ID, refused=refused)
    assert (await told(two))[2:] == [
        f"0 s  a   Center a, the payer's home, refused: {words} ({refused}).",
        "It ended as FAILED.",
    ]


@pytest.mark.parametrize("asked", [("a",), ("b",), ("a", "b")], ids="+".join)
async def test_a_refund_tells_why_the_other_center_refused(
    two: Bank, asked: tuple[str, ...]
) -> None:
    await two.deposit(BOB, 70, "deposit-2", "USD")
    await two.pay(ALICE, BOB, 250, ID, asked="b")
    later(two)
    await two.deliver("a", "b")
    later(two)
    await two.deposit(BOB, 5, "deposit-3", "USD")
    await two.settle()
    assert (await told(two, *asked))[2:] == [
        (
            "0 s  a   Center a, the payer's home, decided to pay. It saw a balance of 1000 CNY;"
            " 750 CNY were left. 250 CNY went into transit to center b, the payee's home."
        ),
        (
            "1 s  b   Center b, the payee's home, would not credit it: the account has another"
            " currency (CURRENCY_MISMATCH). It saw that BOB had 70 USD."
        ),
        "2 s  a   Center a, the payer's home, gave 250 CNY back: 750 CNY before, 1000 CNY after.",
        "It ended as REFUNDED.",
    ]


async def test_a_deposit(two: Bank) -> None:
    assert await told(two, wanted="deposit-1") == [
        "transfer deposit-1 of outside",
        "0 s  a   An operator asked to put in 1000 CNY to ALICE.",
        (
            "0 s  a   Center a, the payee's home, credited ALICE with 1000 CNY: 0 CNY before,"
            " 1000 CNY after."
        ),
        "It ended as CREDITED.",
    ]


APPLICATION = "application-1"


async def queued(two: Bank) -> Center:
    """Alice's application at b, which is not her home."""
    b = two.centers["b"]
    application = Application(
        application_id=APPLICATION,
        transfer_id=ID,
        state=APPLICATION_STATE_QUEUED,
        payer_account_id=ALICE,
        payee_identifier="bob@example.com",
        origin_center="b",
        amount=Money(currency_code="CNY", minor_units=250),
        create_time=timestamp(NOON_MS),
        expire_time=timestamp(NOON_MS + 100_000),
    )
    unit = applications.accept(application, b"body", "a", b.site.stamps.now())
    await b.store.write("accept", unit)
    return b


async def attempt(two: Bank, error: str, took_ms: int) -> None:
    begin_ms = two.centers["b"].site.clock.wall_ms()
    later(two, took_ms)
    unit = attempts.record(APPLICATION, "a", begin_ms, begin_ms + took_ms, error)
    await two.centers["b"].store.write("attempt", unit)


QUEUED = [
    "transfer transfer-1 of ALICE",
    (
        "0 s  b   ALICE asked to pay 250 CNY to somebody named by an identifier. Center b queued it as"
        " application application-1, good until 100 s."
    ),
]


@pytest.mark.parametrize("wanted", [ID, APPLICATION])
async def test_a_queued_one_tells_each_attempt(two: Bank, wanted: str) -> None:
    await queued(two)
    await attempt(two, "CENTER_UNREACHABLE", 1000)
    await attempt(two, "DEADLINE_EXCEEDED", 5000)
    assert await told(two, wanted=wanted) == [
        *QUEUED,
        (
            "0 s  b   Attempt 1: asked center a; no decision, because it could not be reached"
            " (CENTER_UNREACHABLE), after 1000 ms."
        ),
        (
            "1 s  b   Attempt 2: asked center a; no decision, because it did not answer in time"
            " (DEADLINE_EXCEEDED), after 5000 ms."
        ),
        "No center that answered knows of a decision yet.",
    ]


async def test_attempts_that_are_no_longer_kept_are_counted(two: Bank) -> None:
    await queued(two)
    for _ in range(attempts.KEPT_MAX + 2):
        await attempt(two, "CENTER_UNREACHABLE", 1000)
    lines = await told(two)
    assert len(lines) == len(QUEUED) + attempts.KEPT_MAX + 1
    assert lines[2] == (
        "2 s  b   (The 2 attempts before are no longer kept.) Attempt 3: asked center a; no"
        " decision, because it could not be reached (CENTER_UNREACHABLE), after 1000 ms."
    )


@pytest.mark.parametrize("wanted", [ID, APPLICATION])
async def test_a_decided_application_from_its_acceptance_to_its_payers_hearing_of_it(
    two: Bank, wanted: str
) -> None:
    b = await queued(two)
    await attempt(two, "CENTER_UNREACHABLE", 1000)
    await two.pay(ALICE, BOB, 250, ID, application=APPLICATION)
    await attempt(two, "", 1000)
    decided = applications.decide(APPLICATION, Decision.DEBITED, "", BOB, b.site.stamps.now())
    await b.store.write("decided", decided)
    later(two)
    await two.settle()
    notified = notifications.finish(
        notifications.notification_id(APPLICATION),
        CHANNEL_WEBHOOK,
        DELIVERY_STATE_DELIVERED,
        NOON_MS + 7000,
    )
    await b.store.write("notified", notified)
    lines = await told(two, wanted=wanted)
    assert lines == [
        QUEUED[0],
        QUEUED[1].replace("somebody named by an identifier", "BOB"),
        (
            "0 s  b   Attempt 1: asked center a; no decision, because it could not be reached"
            " (CENTER_UNREACHABLE), after 1000 ms."
        ),
        "1 s  b   Attempt 2: asked center a; it decided, after 1000 ms.",
        (
            "1 s  a   Center a, the payer's home, decided to pay. It saw a balance of 1000 CNY;"
            " 750 CNY were left. 250 CNY went into transit to center b, the payee's home."
        ),
        (
            "3 s  b   Center b, the payee's home, credited BOB with 250 CNY: 0 CNY before, 250 CNY"
            " after."
        ),
        (
            "3 s  b   Application application-1 ended as SUCCEEDED; its payer was told on every open"
            " watch, and is told whenever asking."
        ),
        "3 s  b   The payer is to be told by email.",
        "7 s  b   The payer's webhook took the message.",
        "It ended as CREDITED.",
    ]
    assert "bob@example.com" not in str(await collected(two, wanted))


def call(
    center: str, at_ms: int, took_ms: int, reason: str = "", role: str = "gateway"
) -> SpanRecord:
    return SpanRecord(
        name="duohuo.v1.TransferService/Transfer",
        kind="SERVER",
        start_unix_nanos=(NOON_MS + at_ms) * 1_000_000,
        end_unix_nanos=(NOON_MS + at_ms + took_ms) * 1_000_000,
        attributes={"duohuo.center": center, "duohuo.role": role, "duohuo.reason": reason},
    )


async def test_spans_that_are_still_kept_say_where_it_was_asked_and_when_it_was_answered(
    two: Bank,
) -> None:
    later(two)
    await two.pay(ALICE, ALAN, 250, ID, asked="b")
    spans = [
        call("b", 2000, 1000),
        call("b", 0, 2000, "DEADLINE_EXCEEDED"),
        call("a", 1000, 0, role="mesh"),
    ]
    lines = await told(two, spans=spans)
    assert [line for line in lines if re.match(r"\d s  b", line)] == [
        "0 s  b   ALICE asked center b to pay 250 CNY to ALAN at once.",
        "2 s  b   ALICE asked center b to pay 250 CNY to ALAN at once.",
        (
            "2 s  b   Center b told ALICE after 2000.0 ms: it did not answer in time"
            " (DEADLINE_EXCEEDED)."
        ),
        "3 s  b   Center b told ALICE after 1000.0 ms.",
    ]
    assert len(lines) == 8


async def test_one_id_of_two_payers_is_two_stories(two: Bank) -> None:
    await two.deposit(BOB, 1000, "deposit-2")
    await two.pay(ALICE, ALAN, 10, ID, asked="b")
    await two.pay(BOB, ALICE, 20, ID)
    await two.settle()
    found = await collected(two, ID)
    # Sign and kind tell Alice's own payment from what she got under the same id.
    assert [[entry.amount.minor_units for entry in facts.entries] for facts in found] == [
        [-10, 10],
        [20, -20],
    ]


async def test_the_home_is_believed_before_a_copy(two: Bank) -> None:
    await two.pay(ALICE, BOB, 250, ID, asked="b")
    await two.deliver("a", "b")
    b = await collected(two, ID, "b")
    assert b[0].decision.state == TRANSFER_STATE_DEBITED
    await two.deliver("b", "a")
    for asked in (("a", "b"), ("b", "a")):
        (facts,) = await collected(two, ID, *asked)
        assert facts.decision.state == TRANSFER_STATE_CREDITED


async def test_nothing_is_known_of_an_id_that_was_never_used(two: Bank) -> None:
    assert await collected(two, "transfer-2") == []


async def test_the_gateway_that_took_a_call_is_kept_with_the_transfer(two: Bank) -> None:
    a = two.centers["a"]
    rpc = TransferService(
        a.site, a.store, Payees(a.site, a.store), lambda _source: 0, lambda _: None, a.slots
    )
    request = TransferRequest(
        transfer_id=ID,
        payer_account_id=ALICE,
        payee_account_id=ALAN,
        amount=Money(currency_code="CNY", minor_units=250),
    )
    with patch.object(Payees, "resolve", AsyncMock(return_value=(ALAN, ""))):
        await rpc.Transfer(request, Incoming(ALICE, 1.0, gateway="b"))
    assert "0 s  b   ALICE asked center b to pay 250 CNY to ALAN at once." in await told(two)


async def test_a_refusal_tells_what_was_held_of_the_balance(two: Bank) -> None:
    a = two.centers["a"]
    held = query("UPDATE ledger_account SET held = 900 WHERE account_id = ?", ALICE)
    await a.store.write("hold", held)
    await two.pay(ALICE, BOB, 101, ID, asked="b")
    await two.settle()
    refused = (
        "0 s  a   Center a, the payer's home, refused: the balance did not suffice"
        " (INSUFFICIENT_FUNDS). It saw that ALICE had 1000 CNY, of which 900 CNY were held."
    )
    assert refused in await told(two, "a")
    assert refused in await told(two, "b")


async def test_deliveries_that_fail(two: Bank) -> None:
    b = await queued(two)
    cancelled = applications.decide(APPLICATION, Decision.EXPIRED, "", "", b.site.stamps.now())
    await b.store.write("expired", cancelled)
    noted = notifications.notification_id(APPLICATION)
    for unit in (
        notifications.failed(noted, CHANNEL_EMAIL, 2, "SMTP_450", NOON_MS + 9000),
        notifications.failed(noted, CHANNEL_WEBHOOK, 8, "HTTP_500", NOON_MS + 9000),
        notifications.finish(
            noted, CHANNEL_WEBHOOK, DELIVERY_STATE_DEAD, NOON_MS + 8000, "HTTP_500"
        ),
    ):
        await b.store.write("failed", unit)
    assert (await told(two))[-3:-1] == [
        (
            "8 s  b   Center b gave up telling the payer by webhook after 8 failed attempts, the last"
            " because of HTTP_500."
        ),
        (
            "9 s  b   The payer is to be told by email after 2 failed attempts, the last because of"
            " SMTP_450."
        ),
    ]


async def test_the_capture_of_a_hold_tells_of_the_hold(two: Bank) -> None:
    await two.reserve(ALICE, BOB, 60, "hold-1", lasts_ms=60_000)
    later(two)
    await two.capture(ALICE, "hold-1", ID, 40)
    assert await told(two) == [
        "transfer transfer-1 of ALICE",
        (
            "0 s  a   Center a, the payer's home, kept 60 CNY back for this, as hold hold-1, until 60"
            " s."
        ),
        "1 s  a   ALICE had hold hold-1 captured: 40 CNY of the 60 CNY.",
        (
            "1 s  a   Center a, the payer's home, decided to pay. It saw a balance of 1000 CNY; 960 CNY"
            " were left. 40 CNY went into transit to center b, the payee's home."
        ),
        (
            "The money is still in transit: the payer's home has not heard yet that center b has"
            " credited or refused it."
        ),
    ]
