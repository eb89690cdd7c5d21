"""What a transfer must look like, and how refusals are worded. Plain functions, no I/O."""

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from grpc import StatusCode

from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    ApplyTransferRequest,
    CaptureHoldRequest,
    ReserveFundsRequest,
    TransferRequest,
    TransferResult,
)
from runtime.clock import milliseconds
from runtime.errors import RpcError, invalid
from runtime.ids import account_slot, is_client_made, place_of

AMOUNT_MINOR_UNITS_MAX = 10**15
BALANCE_MINOR_UNITS_MAX = 10**17
"""No decision lets an account, or what a center's books have from outside, grow beyond it. So all the money
of a mesh of up to 20 centers fits into BOOKED_MINOR_UNITS_MAX, and no sum of balances can overflow."""
BOOKED_MINOR_UNITS_MAX = 4 * 10**18
"""Behind every decision the database refuses more. A refund always fits: it was in the books before."""
MEMO_LENGTH_MAX = 140
PAYEE_HOME_UNAVAILABLE = "PAYEE_HOME_UNAVAILABLE"
NO_CURRENCY = "XXX"  # ISO 4217: no currency
DAY_MS = 24 * 3600 * 1000
APPLICATION_LIFETIME_MS_MAX = 30 * DAY_MS
HOLD_LIFETIME_MS_DEFAULT, HOLD_LIFETIME_MS_MAX = 7 * DAY_MS, 30 * DAY_MS
HOLDS_OPEN_MAX = 100
"""Of one account at a time, so that every decision can look at all of them."""
PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX = 50, 100
_CURRENCY = re.compile(r"[A-Z]{3}")


class _Refusal(NamedTuple):
    code: StatusCode
    message: str
    advice: str = ""


_NO, _NONE = StatusCode.FAILED_PRECONDITION, StatusCode.NOT_FOUND
_REFUSALS = {
    "INSUFFICIENT_FUNDS": _Refusal(_NO, "the balance does not suffice"),
    "CURRENCY_MISMATCH": _Refusal(_NO, "the account has another currency"),
    "BALANCE_LIMIT": _Refusal(_NO, "the payee's balance would be too large"),
    "BOOKS_LIMIT": _Refusal(
        _NO,
        "the books of the payer's home center cannot take so much",
        "Send less; operators must look at what is in transit between the centers.",
    ),
    "PAYEE_NOT_FOUND": _Refusal(_NONE, "there is no such payee"),
    "SELF_TRANSFER": _Refusal(StatusCode.INVALID_ARGUMENT, "payer and payee are the same account"),
    "CANCELLED": _Refusal(_NO, "the transfer was cancelled"),
    "IDEMPOTENCY_CONFLICT": _Refusal(
        StatusCode.ALREADY_EXISTS,
        "this id already names something else; the first one stands",
    ),
    "EXPIRED": _Refusal(_NO, "the transfer was not decided in time"),
    "ACCOUNT_FROZEN": _Refusal(
        _NO, "the payer's account is frozen", "Ask your bank why, and to unfreeze the account."
    ),
    "ACCOUNT_CLOSED": _Refusal(_NO, "the account is closed", "Use another account."),
    "PAYEE_FROZEN": _Refusal(
        _NO,
        "the payee's account is frozen and takes no money",
        "Your money is yours; ask the payee for another account, or try again later.",
    ),
    "PAYEE_CLOSED": _Refusal(
        _NO,
        "the payee's account is closed and takes no money",
        "Your money is yours; ask the payee for another account.",
    ),
    "LIMIT_PER_TRANSFER": _Refusal(
        _NO,
        "the amount is above the account's limit for one transfer",
        "Send less at a time, or ask your bank for a higher limit.",
    ),
    "LIMIT_PER_DAY": _Refusal(
        _NO,
        "the account's limit for one day (UTC) would be passed",
        "Send less, try again tomorrow with a new id, or ask your bank for a higher limit.",
    ),
    "HOLDS_LIMIT": _Refusal(
        _NO,
        f"the account has {HOLDS_OPEN_MAX} open holds, as many as it may",
        "Capture or release some of them first.",
    ),
    "HOLD_NOT_FOUND": _Refusal(_NONE, "you have no such hold"),
    "HOLD_CAPTURED": _Refusal(
        _NO, "the hold has been captured", "See its transfer; reserve again for another payment."
    ),
    "HOLD_RELEASED": _Refusal(
        _NO, "the hold has been released", "The money is available; reserve again, or transfer it."
    ),
    "HOLD_EXPIRED": _Refusal(
        _NO, "the hold has expired", "The money is available; reserve again, or transfer it."
    ),
    "CAPTURE_TOO_LARGE": _Refusal(
        _NO, "more than the hold's amount cannot be captured", "Capture at most what is held."
    ),
    "CONTROL_CHANGED": _Refusal(
        StatusCode.ABORTED,
        "the account has been changed by another operator meanwhile",
        "Look at it again, and decide anew.",
    ),
    "ACCOUNT_NOT_EMPTY": _Refusal(
        _NO, "an account with money cannot be closed", "Have its balance paid out first."
    ),
    "ACCOUNT_HAS_HOLDS": _Refusal(
        _NO, "an account with open holds cannot be closed", "Capture or release them first."
    ),
    "ACCOUNT_HAS_TRANSIT": _Refusal(
        _NO,
        "money of this account is on its way and may come back",
        "Try again once its transfers are settled; see duohuo verify.",
    ),
}


@dataclass(frozen=True, slots=True)
class Order:
    """A transfer as its payer's home decides it. `payee_account_id` is empty if nobody is known."""

    transfer_id: str
    payer_account_id: str
    payee_account_id: str
    currency: str
    minor_units: int
    memo: str
    body_hash: bytes
    application_id: str = ""
    asked_center: str = ""
    """Whose gateway took the payer's call."""


def check_amount(amount: Money) -> None:
    """Raises RpcError unless this is an amount that can be moved."""
    if not _CURRENCY.fullmatch(amount.currency_code) or amount.currency_code == NO_CURRENCY:
        raise invalid("amount.currency_code", "must be an ISO 4217 code such as CNY", "CURRENCY")
    if not 0 < amount.minor_units <= AMOUNT_MINOR_UNITS_MAX:
        raise invalid("amount.minor_units", f"must be from 1 to {AMOUNT_MINOR_UNITS_MAX}", "AMOUNT")


def check_client_made(field_name: str, value: str) -> None:
    """Raises RpcError unless this can be an id that a client made."""
    if not is_client_made(value):
        raise invalid(field_name, "must be 8 to 64 letters, digits, '-' or '_'", "KEY")


def check_transfer(request: TransferRequest | ApplyTransferRequest) -> None:
    """Raises RpcError unless the request can be decided."""
    check_client_made("transfer_id", request.transfer_id)
    _check_parties(request)


def check_reserve(request: ReserveFundsRequest) -> None:
    """Raises RpcError unless the request can be decided."""
    check_client_made("hold_id", request.hold_id)
    _check_parties(request)


def check_capture(request: CaptureHoldRequest) -> None:
    """Raises RpcError unless the request can be decided."""
    check_client_made("hold_id", request.hold_id)
    check_client_made("transfer_id", request.transfer_id)
    if request.HasField("amount"):
        check_amount(request.amount)


def check_limit(field_name: str, minor_units: int) -> None:
    """Raises RpcError unless this can be a limit; 0 is none."""
    if not 0 <= minor_units <= BALANCE_MINOR_UNITS_MAX:
        raise invalid(field_name, f"must be from 0 to {BALANCE_MINOR_UNITS_MAX}", "AMOUNT")


def _check_parties(
    request: TransferRequest | ApplyTransferRequest | ReserveFundsRequest,
) -> None:
    if account_slot(request.payer_account_id) is None:
        raise invalid("payer_account_id", "is not an account id")
    match request.WhichOneof("payee"):
        case "payee_account_id":
            if account_slot(request.payee_account_id) is None:
                raise invalid("payee_account_id", "is not an account id")
            if request.payee_account_id == request.payer_account_id:
                raise refusal("SELF_TRANSFER")
        case "payee_identifier":
            place = place_of(request.payee_identifier)
            if place is None or place.slot is None or place.origin is not None:
                raise invalid("payee_identifier", "is not an e-mail address or phone number")
        case None:
            raise invalid("payee", "payee_account_id or payee_identifier must be given")
    if len(request.memo) > MEMO_LENGTH_MAX:
        raise invalid("memo", f"must have at most {MEMO_LENGTH_MAX} characters")
    check_amount(request.amount)


def body_hash(request: TransferRequest | ApplyTransferRequest | ReserveFundsRequest) -> bytes:
    """What a transfer id, or a hold's, is bound to: the same id with another body is a conflict."""
    payee_kind = request.WhichOneof("payee") or ""
    body: tuple[object, ...] = (
        request.payer_account_id,
        payee_kind,
        getattr(request, payee_kind) if payee_kind else "",
        request.amount.currency_code,
        request.amount.minor_units,
        request.memo,
    )
    if isinstance(request, ReserveFundsRequest):
        body = (*body, milliseconds(request.expire_time))
    return sha256(repr(body).encode()).digest()


def capture_hash(request: CaptureHoldRequest) -> bytes:
    """What the transfer id of a capture is bound to. No transfer has the same."""
    body = (
        "capture",
        request.payer_account_id,
        request.hold_id,
        request.amount.currency_code,
        request.amount.minor_units,
    )
    return sha256(repr(body).encode()).digest()


def hold_expiry_ms(request: ReserveFundsRequest, now_ms: int) -> int:
    """When a hold ends by itself. Raises RpcError."""
    if not request.HasField("expire_time"):
        return now_ms + HOLD_LIFETIME_MS_DEFAULT
    wanted_ms = milliseconds(request.expire_time)
    if not now_ms < wanted_ms <= now_ms + HOLD_LIFETIME_MS_MAX:
        raise invalid("expire_time", "must be in the future, and at most 30 days ahead")
    return wanted_ms


def expiry_ms(request: ApplyTransferRequest, now_ms: int) -> int:
    """When the application gives up. Raises RpcError."""
    latest_ms = now_ms + APPLICATION_LIFETIME_MS_MAX
    if not request.HasField("expire_time"):
        return latest_ms
    wanted_ms = milliseconds(request.expire_time)
    if not now_ms < wanted_ms <= latest_ms:
        raise invalid("expire_time", "must be in the future, and at most 30 days ahead")
    return wanted_ms


def page_size(wanted: int) -> int:
    if not 0 <= wanted <= PAGE_SIZE_MAX:
        raise invalid("page_size", f"must be from 1 to {PAGE_SIZE_MAX}")
    return wanted or PAGE_SIZE_DEFAULT


def page_after(token: str) -> int | None:
    """The number after which a page starts; None for the first page. Raises RpcError."""
    if not token:
        return None
    if not token.isascii() or not token.isdigit() or len(token) > 18:
        raise invalid("page_token", "was not made by this service")
    return int(token)


def refusal(reason: str) -> RpcError:
    """The error for a business refusal. Nothing moved."""
    code, message, advice = _REFUSALS[reason]
    return RpcError(code, reason, message, advice=advice)


def speaks_of_home(error: RpcError) -> bool:
    """Home was asked for a decision: does the error say something of home, and not of this transfer?"""
    away = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED)
    if error.reason == "WRONG_HOME":
        return True  # it has moved: it will be asked where it is once that is known here
    return error.code in away and error.reason != PAYEE_HOME_UNAVAILABLE


def answer(result: TransferResult) -> TransferResult:
    """The result as a caller gets it: a refusal is an error. Raises RpcError."""
    if result.state in (TRANSFER_STATE_FAILED, TRANSFER_STATE_REFUNDED):
        raise refusal(result.reason)
    return result
