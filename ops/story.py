"""A transfer's story in plain words, from the facts that centers keep and the spans they still have.

Everything here is a plain function on what was collected. A story has chapters; each chapter is a function
that yields sentences from the facts, and the sentences of all chapters are told in order of time. Times are
each center's own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import (
    DELIVERY_STATE_DEAD,
    DELIVERY_STATE_DELIVERED,
    DELIVERY_STATE_DROPPED,
    DELIVERY_STATE_WAITING,
    ApplicationFact,
    Channel,
    Delivery,
    EntryFact,
    FindTransfersResponse,
    SpanRecord,
    TransferFacts,
)
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    ApplicationState,
    TransferState,
)
from runtime.clock import iso, milliseconds

_WORDS = {
    "INSUFFICIENT_FUNDS": "the balance did not suffice",
    "CURRENCY_MISMATCH": "the account has another currency",
    "BALANCE_LIMIT": "the payee's balance would have been too large",
    "PAYEE_NOT_FOUND": "there was no such payee",
    "SELF_TRANSFER": "payer and payee are the same account",
    "CANCELLED": "the payer had withdrawn it",
    "EXPIRED": "its time had run out",
    "IDEMPOTENCY_CONFLICT": "its id already names another transfer",
    "BOOKS_LIMIT": "a system account would have been too large",
    "ACCOUNT_FROZEN": "the payer's account was frozen",
    "ACCOUNT_CLOSED": "the payer's account was closed",
    "PAYEE_FROZEN": "the payee's account was frozen",
    "PAYEE_CLOSED": "the payee's account was closed",
    "LIMIT_PER_TRANSFER": "it was more than the payer may pay at once",
    "LIMIT_PER_DAY": "it was more than the payer may still pay that day",
    "CENTER_UNREACHABLE": "it could not be reached",
    "ROLE_UNREACHABLE": "its transfer service could not be reached",
    "DEADLINE_EXCEEDED": "it did not answer in time",
    "CENTER_RECOVERING": "it was getting its data back from the others",
    "DISK_FULL": "its disk was full",
}
_SEEN = ("INSUFFICIENT_FUNDS", "CURRENCY_MISMATCH", "BALANCE_LIMIT")
"""Reasons that are found in a balance."""
_TRANSFER = "duohuo.v1.TransferService/Transfer"


class Sentence(NamedTuple):
    """What happened, when, and at which center."""

    time_ms: int
    center: str
    text: str


class Known(NamedTuple):
    """A transfer as all centers that answered know it, and the spans that are still kept of it."""

    facts: TransferFacts
    spans: Sequence[SpanRecord]


def merged(answers: Mapping[str, FindTransfersResponse]) -> list[TransferFacts]:
    """One story's facts from all centers': what a center says of its own doing counts most."""
    found: dict[tuple[str, str], list[tuple[str, TransferFacts]]] = {}
    for center, answer in answers.items():
        for facts in answer.transfers:
            found.setdefault((facts.payer_account_id, facts.transfer_id), []).append(
                (center, facts)
            )
    return [_merged(told) for _, told in sorted(found.items())]


def _merged(told: Sequence[tuple[str, TransferFacts]]) -> TransferFacts:
    first = told[0][1]
    whole = TransferFacts(transfer_id=first.transfer_id, payer_account_id=first.payer_account_id)
    entries: dict[tuple[str, int], EntryFact] = {}
    applications: dict[str, tuple[bool, bool, int, ApplicationFact]] = {}
    decision: tuple[bool, int] | None = None
    for center, facts in told:
        if facts.HasField("decision"):
            # A later state has a greater number.
            weight = (center == facts.decision.center, facts.decision.state)
            if decision is None or weight > decision:
                decision = weight
                whole.decision.CopyFrom(facts.decision)
        for application in facts.applications:
            ended = application.HasField("decide_time")
            own = center == application.origin_center
            one = (own, ended, application.state, application)
            known = applications.setdefault(application.application_id, one)
            if one[:3] > known[:3]:
                applications[application.application_id] = one
        entries |= {(entry.account_id, entry.number): entry for entry in facts.entries}
        if facts.HasField("receipt"):
            whole.receipt.CopyFrom(facts.receipt)
        if facts.HasField("refusal"):
            whole.refusal.CopyFrom(facts.refusal)
        if facts.HasField("hold"):
            whole.hold.CopyFrom(facts.hold)
        # Each is known to one center alone.
        whole.deliveries.extend(facts.deliveries)
    whole.entries.extend(entry for _, entry in sorted(entries.items()))
    whole.applications.extend(
        sorted(
            (application for *_, application in applications.values()),
            key=lambda one: (milliseconds(one.create_time), one.application_id),
        )
    )
    return whole


def sentences(known: Known) -> list[Sentence]:
    """The story in order of time; what happened in one millisecond, in the order of the chapters."""
    told = [sentence for chapter in CHAPTERS for sentence in chapter(known)]
    return sorted(told, key=lambda sentence: sentence.time_ms)


def outcome(facts: TransferFacts) -> str:
    """Where the transfer stands now."""
    if facts.HasField("decision"):
        state = facts.decision.state
        if state == TRANSFER_STATE_DEBITED:
            return (
                "The money is still in transit: the payer's home has not heard yet that"
                f" center {facts.decision.payee_home} has credited or refused it."
            )
        return f"It ended as {TransferState.Name(state).removeprefix('TRANSFER_STATE_')}."
    return "No center that answered knows of a decision yet."


def text(known: Known) -> str:
    """The story for people."""
    facts = known.facts
    lines = [f"transfer {facts.transfer_id} of {_payer(facts)}"]
    lines += [f"{iso(one.time_ms)}  {one.center:<3} {one.text}" for one in sentences(known)]
    return "\n".join([*lines, outcome(facts)])


def _asked(known: Known) -> Iterator[Sentence]:
    facts = known.facts
    for one in facts.applications:
        yield Sentence(
            milliseconds(one.create_time),
            one.origin_center,
            f"{_payer(facts)} asked to pay {_money(one.amount)} to {_payee(one.payee_account_id)}."
            f" Center {one.origin_center} queued it as application {one.application_id},"
            f" good until {iso(milliseconds(one.expire_time))}.",
        )
    # Of a capture the hold tells.
    if facts.applications or facts.HasField("hold") or not facts.HasField("decision"):
        return
    decision = facts.decision
    what = f"{_money(decision.amount)} to {_payee(decision.payee_account_id)}"
    calls = _calls(known.spans)
    for span in calls:
        center = span.attributes.get("duohuo.center", "?")
        yield Sentence(
            span.start_unix_nanos // 1_000_000,
            center,
            f"{_payer(facts)} asked center {center} to pay {what} at once.",
        )
    if _from_outside(facts):
        yield Sentence(
            milliseconds(decision.decide_time),
            decision.center,
            f"An operator asked to put in {what}.",
        )
    elif not calls:
        # The call itself was a little earlier; when exactly, only spans tell.
        yield Sentence(
            milliseconds(decision.decide_time),
            decision.asked_center,
            f"{_payer(facts)} asked center {decision.asked_center} to pay {what} at once.",
        )


def _held(known: Known) -> Iterator[Sentence]:
    facts = known.facts
    if not facts.HasField("hold"):
        return
    hold = facts.hold
    yield Sentence(
        milliseconds(hold.create_time),
        hold.center,
        f"{_home(hold.center, 'payer')} kept {_money(hold.amount)} back for this, as hold"
        f" {hold.hold_id}, until {iso(milliseconds(hold.expire_time))}.",
    )
    if facts.HasField("decision"):
        yield Sentence(
            milliseconds(facts.decision.decide_time),
            hold.center,
            f"{_payer(facts)} had hold {hold.hold_id} captured: {_money(facts.decision.amount)} of"
            f" the {_money(hold.amount)}.",
        )


def _attempted(known: Known) -> Iterator[Sentence]:
    for application in known.facts.applications:
        for position, one in enumerate(application.attempts):
            begin_ms = milliseconds(one.begin_time)
            forgotten = (
                f"(The {one.number - 1} attempts before are no longer kept.) "
                if position == 0 and one.number > 1
                else ""
            )
            came = f"no decision, because {_reason(one.error)}" if one.error else "it decided"
            yield Sentence(
                begin_ms,
                application.origin_center,
                f"{forgotten}Attempt {one.number}: asked center {one.asked_center}; {came},"
                f" after {milliseconds(one.end_time) - begin_ms} ms.",
            )


def _decided(known: Known) -> Iterator[Sentence]:
    facts = known.facts
    if not facts.HasField("decision") or _from_outside(facts):
        return
    decision = facts.decision
    at_ms, center = milliseconds(decision.decide_time), decision.center
    if decision.state == TRANSFER_STATE_FAILED:
        yield Sentence(
            at_ms,
            center,
            f"{_home(center, 'payer')} refused: {_reason(decision.reason)}."
            f"{_balance_seen(facts, decision.reason)}",
        )
        return
    said = f"{_home(center, 'payer')} decided to pay."
    paid = _entry(facts, "debit", "transfer", account=facts.payer_account_id)
    if paid is not None:
        said += f" It saw a balance of {_before(paid)}; {_money(paid.balance_after)} were left."
    if decision.payee_home != center:
        said += (
            f" {_money(decision.amount)} went into transit to center {decision.payee_home}, the"
            " payee's home."
        )
    yield Sentence(at_ms, center, said)


def _answered_by_payees_home(known: Known) -> Iterator[Sentence]:
    facts = known.facts
    decision = facts.decision
    got = _entry(facts, "credit", "transfer", "deposit", account=decision.payee_account_id)
    if got is not None:
        yield Sentence(
            milliseconds(got.create_time),
            got.center,
            f"{_home(got.center, 'payee')} credited {got.account_id} with {_money(got.amount)}:"
            f" {_before(got)} before, {_money(got.balance_after)} after.",
        )
    reason = facts.receipt.reason
    back = _entry(facts, "refund", account=facts.payer_account_id)
    if reason:
        center = facts.receipt.center
        when = facts.refusal.refuse_time if facts.HasField("refusal") else None
        # Between the decision and the refund; when exactly is kept with the balance only.
        when = when or (back.create_time if back else decision.decide_time)
        yield Sentence(
            milliseconds(when),
            center,
            f"{_home(center, 'payee')} would not credit it: {_reason(reason)}."
            f"{_balance_seen(facts, reason)}",
        )
    if back is not None:
        yield Sentence(
            milliseconds(back.create_time),
            back.center,
            f"{_home(back.center, 'payer')} gave {_money(back.amount)} back:"
            f" {_before(back)} before, {_money(back.balance_after)} after.",
        )


def _told(known: Known) -> Iterator[Sentence]:
    for one in known.facts.applications:
        if not one.HasField("decide_time"):
            continue
        state = ApplicationState.Name(one.state).removeprefix("APPLICATION_STATE_")
        because = f", because {_reason(one.reason)}" if one.reason else ""
        yield Sentence(
            milliseconds(one.decide_time),
            one.origin_center,
            f"Application {one.application_id} ended as {state}{because};"
            " its payer was told on every open watch, and is told whenever asking.",
        )
    origins = {one.application_id: one.origin_center for one in known.facts.applications}
    for delivery in known.facts.deliveries:
        yield from _delivered(delivery, origins.get(delivery.subject_id, "?"))
    if known.facts.applications:
        return
    for span in _calls(known.spans):
        center = span.attributes.get("duohuo.center", "?")
        took_ms = (span.end_unix_nanos - span.start_unix_nanos) / 1e6
        refused = span.attributes.get("duohuo.reason", "")
        yield Sentence(
            span.end_unix_nanos // 1_000_000,
            center,
            f"Center {center} told {_payer(known.facts)} after {took_ms:.1f} ms"
            + (f": {_reason(refused)}." if refused else "."),
        )


def _delivered(delivery: Delivery, origin: str) -> Iterator[Sentence]:
    """How the payer was told by one channel; nothing of a channel that the payer does not want."""
    channel = Channel.Name(delivery.channel).removeprefix("CHANNEL_").lower()
    failed = f"after {delivery.attempts} failed attempts" if delivery.attempts else ""
    why = f", the last because of {delivery.last_error}" if delivery.last_error else ""
    end_ms = milliseconds(delivery.end_time)
    if delivery.state == DELIVERY_STATE_DELIVERED:
        said = f"The payer's {channel} took the message {failed}".strip()
        yield Sentence(end_ms, origin, f"{said}.")
    elif delivery.state in (DELIVERY_STATE_DEAD, DELIVERY_STATE_DROPPED):
        said = f"Center {origin} gave up telling the payer by {channel} {failed}".strip()
        yield Sentence(end_ms, origin, f"{said}{why}.")
    elif delivery.state == DELIVERY_STATE_WAITING:
        said = f"The payer is to be told by {channel} {failed}".strip()
        yield Sentence(milliseconds(delivery.next_attempt_time), origin, f"{said}{why}.")


CHAPTERS: Sequence[Callable[[Known], Iterable[Sentence]]] = (
    _asked,
    _held,
    _attempted,
    _decided,
    _answered_by_payees_home,
    _told,
)


def _calls(spans: Sequence[SpanRecord]) -> list[SpanRecord]:
    """The users' own calls: gateways' spans of Transfer, each center's view of its caller."""
    return sorted(
        (
            span
            for span in spans
            if span.name == _TRANSFER
            and span.kind == "SERVER"
            and span.attributes.get("duohuo.role") == "gateway"
        ),
        key=lambda span: span.start_unix_nanos,
    )


def _entry(facts: TransferFacts, *kinds: str, account: str) -> EntryFact | None:
    matching = (one for one in facts.entries if one.account_id == account and one.kind in kinds)
    return next(matching, None)


def _before(entry: EntryFact) -> str:
    before = entry.balance_after.minor_units - entry.amount.minor_units
    return f"{before} {entry.amount.currency_code}"


def _balance_seen(facts: TransferFacts, reason: str) -> str:
    if reason not in _SEEN:
        return ""
    if not facts.HasField("refusal"):
        return " Which balance it saw is not on record."
    seen = facts.refusal
    held = f", of which {_money(seen.held)} were held" if seen.held.minor_units else ""
    return f" It saw that {seen.account_id} had {_money(seen.balance)}{held}."


def _money(money: Money) -> str:
    return f"{abs(money.minor_units)} {money.currency_code}"


def _home(center: str, whose: str) -> str:
    """The beginning of a sentence about what a home did."""
    return f"Center {center}, the {whose}'s home,"


def _reason(reason: str) -> str:
    return f"{_WORDS[reason]} ({reason})" if reason in _WORDS else reason


def _from_outside(facts: TransferFacts) -> bool:
    """Is this a deposit?"""
    return "." in facts.payer_account_id


def _payer(facts: TransferFacts) -> str:
    return "outside" if _from_outside(facts) else facts.payer_account_id


def _payee(account_id: str) -> str:
    return account_id or "somebody named by an identifier"
