"""What a transfer must look like, and how refusals are worded. Plain functions, no I/O."""

import re
from dataclasses import dataclass
from hashlib import sha256

from grpc import StatusCode

from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    ApplyTransferRequest,
    TransferRequest,
    TransferResult,
)
from runtime.clock import milliseconds
from runtime.errors import RpcError, invalid
from runtime.ids import account_slot, is_client_made, place_of

AMOUNT_MINOR_UNITS_MAX = 10**15
BALANCE_MINOR_UNITS_MAX = 10**17
MEMO_LENGTH_MAX = 140
NO_CURRENCY = "XXX"  # ISO 4217: no currency
APPLICATION_LIFETIME_MS_MAX = 30 * 24 * 3600 * 1000
PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX = 50, 100
_CURRENCY = re.compile(r"[A-Z]{3}")

_REFUSALS = {
    "INSUFFICIENT_FUNDS": (StatusCode.FAILED_PRECONDITION, "the balance does not suffice"),
    "CURRENCY_MISMATCH": (StatusCode.FAILED_PRECONDITION, "the account has another currency"),
    "BALANCE_LIMIT": (StatusCode.FAILED_PRECONDITION, "the payee's balance would be too large"),
    "PAYEE_NOT_FOUND": (StatusCode.NOT_FOUND, "there is no such payee"),
    "SELF_TRANSFER": (StatusCode.INVALID_ARGUMENT, "payer and payee are the same account"),
    "CANCELLED": (StatusCode.FAILED_PRECONDITION, "the transfer was cancelled"),
    "IDEMPOTENCY_CONFLICT": (
        StatusCode.ALREADY_EXISTS,
        "this id already names something else; the first one stands",
    ),
    "EXPIRED": (StatusCode.FAILED_PRECONDITION, "the transfer was not decided in time"),
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


def check_transfer(request: TransferRequest | ApplyTransferRequest) -> None:
    """Raises RpcError unless the request can be decided."""
    if not is_client_made(request.transfer_id):
        raise invalid("transfer_id", "must be 8 to 64 letters, digits, '-' or '_'", "KEY")
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


def body_hash(request: TransferRequest | ApplyTransferRequest) -> bytes:
    """What a transfer id is bound to: the same id with another body is a conflict."""
    payee_kind = request.WhichOneof("payee") or ""
    body = (
        request.payer_account_id,
        payee_kind,
        getattr(request, payee_kind) if payee_kind else "",
        request.amount.currency_code,
        request.amount.minor_units,
        request.memo,
    )
    return sha256(repr(body).encode()).digest()


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
    code, message = _REFUSALS[reason]
    return RpcError(code, reason, message)


def answer(result: TransferResult) -> TransferResult:
    """The result as a caller gets it: a refusal is an error. Raises RpcError."""
    if result.state in (TRANSFER_STATE_FAILED, TRANSFER_STATE_REFUNDED):
        raise refusal(result.reason)
    return result
