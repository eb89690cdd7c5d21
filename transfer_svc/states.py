"""The state machines of this service, each one table. What is not in a table is an error.

A transfer between two homes is a saga of two local transactions (Garcia-Molina, Salem: "Sagas", 1987):
the payer's home debits, the payee's home credits or refuses, the payer's home refunds what was
refused. Each step may arrive twice, so each state also lists the events it has already seen.

An application is a transfer waiting to be decided. Only the payer's home decides; the application
follows. It reaches exactly one of its four ends. Its user may withdraw it: as long as nobody here knows
whether home has decided it is CANCELLING, and home is asked to cancel it instead of to execute it.

A hold keeps money back until one of three things ends it. An account is open or frozen until it is closed.
"""

from collections.abc import Mapping
from enum import Enum

from duohuo.v1.operator_service_pb2 import (
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_FROZEN,
    ACCOUNT_STATUS_OPEN,
    AccountStatus,
)
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_CANCELLED,
    APPLICATION_STATE_CANCELLING,
    APPLICATION_STATE_DELIVERED,
    APPLICATION_STATE_EXPIRED,
    APPLICATION_STATE_FAILED,
    APPLICATION_STATE_QUEUED,
    APPLICATION_STATE_SUCCEEDED,
    HOLD_STATE_CAPTURED,
    HOLD_STATE_EXPIRED,
    HOLD_STATE_HELD,
    HOLD_STATE_RELEASED,
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    ApplicationState,
    HoldState,
    TransferState,
)

HOLD_MOVED: HoldState.ValueType = HoldState.ValueType(100)
"""A hold whose account has left for another center, where another row goes on. Nobody is shown this."""


class TransferEvent(Enum):
    """What the payee's home says about a debited transfer."""

    CREDITED = "credited"
    REFUSED = "refused"


class Decision(Enum):
    """What the payer's home says about a transfer, as an application hears it."""

    DEBITED = "debited"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Wish(Enum):
    """What its user wants of an application, while home's decision is not known."""

    CANCEL = "withdrawn"


class HoldEvent(Enum):
    """What ends a hold."""

    CAPTURE = "captured"
    RELEASE = "released"
    EXPIRE = "expired"
    MOVE = "moved"


TRANSFER: Mapping[tuple[TransferState.ValueType, TransferEvent], TransferState.ValueType] = {
    (TRANSFER_STATE_DEBITED, TransferEvent.CREDITED): TRANSFER_STATE_CREDITED,
    (TRANSFER_STATE_DEBITED, TransferEvent.REFUSED): TRANSFER_STATE_REFUNDED,
    (TRANSFER_STATE_CREDITED, TransferEvent.CREDITED): TRANSFER_STATE_CREDITED,
    (TRANSFER_STATE_REFUNDED, TransferEvent.REFUSED): TRANSFER_STATE_REFUNDED,
}

_Q, _W, _D = APPLICATION_STATE_QUEUED, APPLICATION_STATE_CANCELLING, APPLICATION_STATE_DELIVERED
_S, _F = APPLICATION_STATE_SUCCEEDED, APPLICATION_STATE_FAILED
_C, _E = APPLICATION_STATE_CANCELLED, APPLICATION_STATE_EXPIRED

APPLICATION: Mapping[
    tuple[ApplicationState.ValueType, Decision | Wish], ApplicationState.ValueType
] = {
    (_Q, Wish.CANCEL): _W,
    (_Q, Decision.DEBITED): _D,
    (_Q, Decision.SUCCEEDED): _S,
    (_Q, Decision.FAILED): _F,
    (_Q, Decision.CANCELLED): _C,
    (_Q, Decision.EXPIRED): _E,
    (_W, Wish.CANCEL): _W,
    # Home may have decided before it heard of the wish: what it has decided stands.
    (_W, Decision.DEBITED): _D,
    (_W, Decision.SUCCEEDED): _S,
    (_W, Decision.FAILED): _F,
    (_W, Decision.CANCELLED): _C,
    (_W, Decision.EXPIRED): _E,
    (_D, Decision.DEBITED): _D,
    (_D, Decision.SUCCEEDED): _S,
    (_D, Decision.FAILED): _F,
    # The same decision may come twice: as the answer to a request, and over the log.
    (_S, Decision.DEBITED): _S,
    (_S, Decision.SUCCEEDED): _S,
    (_F, Decision.DEBITED): _F,
    (_F, Decision.FAILED): _F,
    (_C, Decision.CANCELLED): _C,
    (_E, Decision.EXPIRED): _E,
}

HOLD: Mapping[tuple[HoldState.ValueType, HoldEvent], HoldState.ValueType] = {
    (HOLD_STATE_HELD, HoldEvent.CAPTURE): HOLD_STATE_CAPTURED,
    (HOLD_STATE_HELD, HoldEvent.RELEASE): HOLD_STATE_RELEASED,
    (HOLD_STATE_HELD, HoldEvent.EXPIRE): HOLD_STATE_EXPIRED,
    (HOLD_STATE_HELD, HoldEvent.MOVE): HOLD_MOVED,
    # A request may come twice. Of a capture it is the transfer that knows its second time.
    (HOLD_STATE_RELEASED, HoldEvent.RELEASE): HOLD_STATE_RELEASED,
}

ACCOUNT: Mapping[
    tuple[AccountStatus.ValueType, AccountStatus.ValueType], AccountStatus.ValueType
] = {
    (status, wanted): wanted
    for status in (ACCOUNT_STATUS_OPEN, ACCOUNT_STATUS_FROZEN)
    for wanted in (ACCOUNT_STATUS_OPEN, ACCOUNT_STATUS_FROZEN, ACCOUNT_STATUS_CLOSED)
} | {(ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_CLOSED): ACCOUNT_STATUS_CLOSED}

_ON_THE_WAY = (_Q, _W, _D)
APPLICATION_UNDECIDED = frozenset({_Q, _W})
APPLICATION_OPEN = frozenset(_ON_THE_WAY)


class IllegalTransition(Exception):
    """A bug, or a decision that contradicts an earlier one."""


def next_transfer_state(
    state: TransferState.ValueType, event: TransferEvent
) -> TransferState.ValueType:
    try:
        return TRANSFER[state, event]
    except KeyError:
        raise IllegalTransition(f"{TransferState.Name(state)} cannot be {event.value}") from None


def next_application_state(
    state: ApplicationState.ValueType, event: Decision | Wish
) -> ApplicationState.ValueType:
    try:
        return APPLICATION[state, event]
    except KeyError:
        raise IllegalTransition(f"{ApplicationState.Name(state)} cannot be {event.value}") from None


def progress(state: ApplicationState.ValueType) -> int:
    """How far on its way an application is; it never goes back. The same for all ends."""
    return _ON_THE_WAY.index(state) if state in APPLICATION_OPEN else len(_ON_THE_WAY)


def next_hold_state(state: HoldState.ValueType, event: HoldEvent) -> HoldState.ValueType:
    try:
        return HOLD[state, event]
    except KeyError:
        name = "HOLD_MOVED" if state == HOLD_MOVED else HoldState.Name(state)
        raise IllegalTransition(f"{name} cannot be {event.value}") from None


def follows(state: ApplicationState.ValueType, earlier: ApplicationState.ValueType) -> bool:
    """Can an application be in this state after the earlier one?"""
    after = {end for (begin, _), end in APPLICATION.items() if begin == earlier}
    return state != earlier and state in after


def decision_of(state: TransferState.ValueType, reason: str) -> Decision:
    """How an application hears of its transfer's state."""
    if state == TRANSFER_STATE_DEBITED:
        return Decision.DEBITED
    if state == TRANSFER_STATE_CREDITED:
        return Decision.SUCCEEDED
    if state in (TRANSFER_STATE_FAILED, TRANSFER_STATE_REFUNDED):
        return {"CANCELLED": Decision.CANCELLED, "EXPIRED": Decision.EXPIRED}.get(
            reason, Decision.FAILED
        )
    raise IllegalTransition(f"no such transfer state: {state}")
