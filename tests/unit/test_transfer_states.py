"""The state machines: what is in their tables happens, everything else is an error."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duohuo.v1.operator_service_pb2 import AccountStatus
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    ApplicationState,
    HoldState,
    TransferState,
)
from transfer_svc import states
from transfer_svc.states import (
    APPLICATION_OPEN,
    HOLD_MOVED,
    Decision,
    HoldEvent,
    IllegalTransition,
    TransferEvent,
    Wish,
    decision_of,
    next_application_state,
    next_hold_state,
    next_transfer_state,
    progress,
)

# What each state becomes; "-" is an error.
APPLICATION = """
              DEBITED    SUCCEEDED  FAILED     CANCELLED  EXPIRED    CANCEL
UNSPECIFIED   -          -          -          -          -          -
QUEUED        DELIVERED  SUCCEEDED  FAILED     CANCELLED  EXPIRED    CANCELLING
CANCELLING    DELIVERED  SUCCEEDED  FAILED     CANCELLED  EXPIRED    CANCELLING
DELIVERED     DELIVERED  SUCCEEDED  FAILED     -          -          -
SUCCEEDED     SUCCEEDED  SUCCEEDED  -          -          -          -
FAILED        FAILED     -          FAILED     -          -          -
CANCELLED     -          -          -          CANCELLED  -          -
EXPIRED       -          -          -          -          EXPIRED    -
"""
TRANSFER = """
              CREDITED   REFUSED
UNSPECIFIED   -          -
FAILED        -          -
DEBITED       CREDITED   REFUNDED
CREDITED      CREDITED   -
REFUNDED      -          REFUNDED
"""
HOLD = """
              CAPTURE    RELEASE    EXPIRE     MOVE
UNSPECIFIED   -          -          -          -
REFUSED       -          -          -          -
HELD          CAPTURED   RELEASED   EXPIRED    MOVED
CAPTURED      -          -          -          -
RELEASED      -          RELEASED   -          -
EXPIRED       -          -          -          -
MOVED         -          -          -          -
"""
# What operators want of an account: the status it shall have.
ACCOUNT = """
              OPEN       FROZEN     CLOSED
OPEN          OPEN       FROZEN     CLOSED
FROZEN        OPEN       FROZEN     CLOSED
CLOSED        -          -          CLOSED
"""
Cell = tuple[str, str, str]


def cells(table: str) -> list[Cell]:
    """(state, event, next state) of each cell."""
    events, *rows = [line.split() for line in table.strip().splitlines()]
    return [
        (state, event, found)
        for state, *nexts in rows
        for event, found in zip(events, nexts, strict=True)
    ]


def application_state(name: str) -> ApplicationState.ValueType:
    return ApplicationState.Value(f"APPLICATION_STATE_{name}")


def application_event(name: str) -> Decision | Wish:
    return Wish[name] if name in Wish.__members__ else Decision[name]


def transfer_state(name: str) -> TransferState.ValueType:
    return TransferState.Value(f"TRANSFER_STATE_{name}")


def hold_state(name: str) -> HoldState.ValueType:
    return HOLD_MOVED if name == "MOVED" else HoldState.Value(f"HOLD_STATE_{name}")


def status(name: str) -> AccountStatus.ValueType:
    return AccountStatus.Value(f"ACCOUNT_STATUS_{name}")


def test_the_tables_here_are_complete() -> None:
    held = {(hold_state(state), HoldEvent[event]) for state, event, _ in cells(HOLD)}
    assert held == set(product((*HoldState.values(), HOLD_MOVED), HoldEvent))
    applied = {
        (application_state(state), application_event(event))
        for state, event, _ in cells(APPLICATION)
    }
    moved = {(transfer_state(state), TransferEvent[event]) for state, event, _ in cells(TRANSFER)}
    assert applied == set(product(ApplicationState.values(), (*Decision, *Wish)))
    assert moved == set(product(TransferState.values(), TransferEvent))


@pytest.mark.parametrize(("state", "event", "found"), cells(APPLICATION))
def test_an_application_moves_by_its_table(state: str, event: str, found: str) -> None:
    if found == "-":
        with pytest.raises(IllegalTransition, match=state):
            next_application_state(application_state(state), application_event(event))
    else:
        moved = next_application_state(application_state(state), application_event(event))
        assert moved == application_state(found)


@pytest.mark.parametrize(("state", "event", "found"), cells(TRANSFER))
def test_a_transfer_moves_by_its_table(state: str, event: str, found: str) -> None:
    if found == "-":
        with pytest.raises(IllegalTransition, match=state):
            next_transfer_state(transfer_state(state), TransferEvent[event])
    else:
        assert next_transfer_state(transfer_state(state), TransferEvent[event]) == transfer_state(
            found
        )


@pytest.mark.parametrize(("state", "event", "found"), cells(HOLD))
def test_a_hold_moves_by_its_table(state: str, event: str, found: str) -> None:
    if found == "-":
        with pytest.raises(IllegalTransition, match=state):
            next_hold_state(hold_state(state), HoldEvent[event])
    else:
        assert next_hold_state(hold_state(state), HoldEvent[event]) == hold_state(found)


def test_an_account_moves_by_its_table() -> None:
    here = {
        (status(before), status(wanted)): status(found)
        for before, wanted, found in cells(ACCOUNT)
        if found != "-"
    }
    assert here == states.ACCOUNT


@given(st.lists(st.sampled_from((*Decision, *Wish))))
def test_an_application_goes_forward_and_stays_as_it_has_ended(
    events: list[Decision | Wish],
) -> None:
    state = application_state("QUEUED")
    for event in events:
        before = state
        try:
            state = next_application_state(state, event)
        except IllegalTransition:
            continue
        assert state == before or (
            before in APPLICATION_OPEN and progress(state) > progress(before)
        )


@pytest.mark.parametrize("earlier", ApplicationState.values())
def test_a_copy_takes_every_later_state_even_if_it_missed_those_between(
    earlier: ApplicationState.ValueType,
) -> None:
    reached = {earlier}
    for _ in ApplicationState.values():
        reached |= {after for (before, _), after in states.APPLICATION.items() if before in reached}
    for state in ApplicationState.values():
        assert states.follows(state, earlier) == (state in reached - {earlier})


@given(st.lists(st.sampled_from(TransferEvent)))
def test_a_transfer_that_was_settled_stays_as_it_is(events: list[TransferEvent]) -> None:
    state = TRANSFER_STATE_DEBITED
    for event in events:
        before = state
        try:
            state = next_transfer_state(state, event)
        except IllegalTransition:
            continue
        assert before == TRANSFER_STATE_DEBITED or state == before


def test_an_application_has_exactly_four_ends() -> None:
    names = {state for state, _, _ in cells(APPLICATION)} - {"UNSPECIFIED"}
    ends = {name for name in names if application_state(name) not in APPLICATION_OPEN}
    assert ends == {"SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"}


@pytest.mark.parametrize(
    ("state", "reason", "decision"),
    [
        (TRANSFER_STATE_DEBITED, "", Decision.DEBITED),
        (TRANSFER_STATE_CREDITED, "", Decision.SUCCEEDED),
        (TRANSFER_STATE_FAILED, "INSUFFICIENT_FUNDS", Decision.FAILED),
        (TRANSFER_STATE_FAILED, "IDEMPOTENCY_CONFLICT", Decision.FAILED),
        (TRANSFER_STATE_FAILED, "CANCELLED", Decision.CANCELLED),
        (TRANSFER_STATE_FAILED, "EXPIRED", Decision.EXPIRED),
        (TRANSFER_STATE_REFUNDED, "CURRENCY_MISMATCH", Decision.FAILED),
    ],
)
def test_an_application_hears_what_became_of_its_transfer(
    state: TransferState.ValueType, reason: str, decision: Decision
) -> None:
    assert decision_of(state, reason) is decision


def test_a_transfer_without_a_state_decides_nothing() -> None:
    with pytest.raises(IllegalTransition):
        decision_of(transfer_state("UNSPECIFIED"), "")
