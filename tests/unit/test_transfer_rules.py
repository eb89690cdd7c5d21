"""What a transfer must look like."""

from collections.abc import Callable

import pytest
from grpc import StatusCode

from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import (
    TRANSFER_STATE_CREDITED,
    TRANSFER_STATE_DEBITED,
    TRANSFER_STATE_FAILED,
    TRANSFER_STATE_REFUNDED,
    ApplyTransferRequest,
    TransferRequest,
    TransferResult,
)
from runtime.clock import timestamp
from runtime.errors import RpcError
from tests.fakes import NOON_MS, account
from transfer_svc import rules
from transfer_svc.rules import AMOUNT_MINOR_UNITS_MAX, APPLICATION_LIFETIME_MS_MAX

ALICE, BOB = account(1), account(2)


def transfer(**changes: object) -> TransferRequest:
    """A good transfer, but for the changes; a payee replaces the good one."""
    payee = {} if any("payee" in name for name in changes) else {"payee_account_id": BOB}
    amount = Money(currency_code="CNY", minor_units=100)
    good = {"transfer_id": "t" * 8, "payer_account_id": ALICE, "amount": amount, "memo": "rent"}
    return TransferRequest(**{**good, **payee, **changes})  # type: ignore[arg-type]


def field_refused(check: Callable[[], object]) -> str:
    """The field, or the reason, of the refusal; empty if there is none."""
    try:
        check()
    except RpcError as error:
        return "" if error.ran else error.field_name or error.reason
    return ""


@pytest.mark.parametrize(
    ("currency", "minor_units", "field"),
    [
        ("CNY", 1, ""),
        ("CNY", AMOUNT_MINOR_UNITS_MAX, ""),
        ("CNY", 0, "amount.minor_units"),
        ("CNY", -1, "amount.minor_units"),
        ("CNY", AMOUNT_MINOR_UNITS_MAX + 1, "amount.minor_units"),
        ("CNY", 2**63 - 1, "amount.minor_units"),
        ("CNY", -(2**63), "amount.minor_units"),
        ("", 1, "amount.currency_code"),
        ("cny", 1, "amount.currency_code"),
        ("CN", 1, "amount.currency_code"),
        ("CNYX", 1, "amount.currency_code"),
        ("CNY\n", 1, "amount.currency_code"),
        ("C.Y", 1, "amount.currency_code"),
        ("XXX", 1, "amount.currency_code"),
    ],
)
def test_an_amount_is_positive_bounded_and_in_a_currency(
    currency: str, minor_units: int, field: str
) -> None:
    amount = Money(currency_code=currency, minor_units=minor_units)
    assert field_refused(lambda: rules.check_amount(amount)) == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, ""),
        ({"payee_identifier": "bob@example.com"}, ""),
        ({"memo": "x" * 140}, ""),
        ({"memo": ""}, ""),
        ({"transfer_id": "short"}, "transfer_id"),
        ({"transfer_id": "no spaces please"}, "transfer_id"),
        ({"payer_account_id": "alice@example.com"}, "payer_account_id"),
        ({"payer_account_id": "external.a.CNY"}, "payer_account_id"),
        ({"payee_account_id": "transit.a.b.CNY"}, "payee_account_id"),
        ({"payee_account_id": ""}, "payee_account_id"),
        ({"payee_account_id": ALICE}, "SELF_TRANSFER"),
        ({"payee_identifier": "nobody"}, "payee_identifier"),
        ({"payee_identifier": "s-a-" + "x" * 43}, "payee_identifier"),
        ({"payee_account_id": None}, "payee"),
        ({"memo": "x" * 141}, "memo"),
        ({"amount": Money()}, "amount.currency_code"),
        ({"amount": None}, "amount.currency_code"),
    ],
    ids=str,
)
def test_a_transfer_names_who_pays_whom_what(changes: dict[str, object], field: str) -> None:
    assert field_refused(lambda: rules.check_transfer(transfer(**changes))) == field


DIFFERENT = [
    transfer(),
    transfer(payer_account_id=account(3)),
    transfer(payee_account_id=account(3)),
    transfer(payee_identifier="bob@example.com"),
    transfer(payee_identifier=BOB),
    transfer(payee_account_id=None),
    transfer(amount=Money(currency_code="USD", minor_units=100)),
    transfer(amount=Money(currency_code="CNY", minor_units=101)),
    transfer(memo=""),
    transfer(memo="rent'"),
]


def test_the_body_hash_tells_every_field_apart() -> None:
    hashes = {rules.body_hash(request) for request in DIFFERENT}
    assert len(hashes) == len(DIFFERENT)


def test_the_body_hash_does_not_depend_on_what_is_no_part_of_the_body() -> None:
    assert rules.body_hash(transfer()) == rules.body_hash(transfer(transfer_id="another-id"))


@pytest.mark.parametrize("request_made", DIFFERENT, ids=range(len(DIFFERENT)))
def test_an_application_has_the_body_of_the_transfer_it_applies_for(
    request_made: TransferRequest,
) -> None:
    """The expiry is no part of it: home must find application and transfer to be the same."""
    applied = ApplyTransferRequest.FromString(request_made.SerializeToString())
    applied.expire_time.FromMilliseconds(NOON_MS)
    assert rules.body_hash(applied) == rules.body_hash(request_made)


@pytest.mark.parametrize(
    ("after_ms", "expires_after_ms"),
    [
        (None, APPLICATION_LIFETIME_MS_MAX),
        (1, 1),
        (APPLICATION_LIFETIME_MS_MAX, APPLICATION_LIFETIME_MS_MAX),
        (0, None),
        (-1, None),
        (APPLICATION_LIFETIME_MS_MAX + 1, None),
    ],
)
def test_an_application_expires_within_30_days(
    after_ms: int | None, expires_after_ms: int | None
) -> None:
    request = ApplyTransferRequest()
    if after_ms is not None:
        request.expire_time.CopyFrom(timestamp(NOON_MS + after_ms))
    if expires_after_ms is None:
        assert field_refused(lambda: rules.expiry_ms(request, NOON_MS)) == "expire_time"
    else:
        assert rules.expiry_ms(request, NOON_MS) == NOON_MS + expires_after_ms


@pytest.mark.parametrize(
    ("wanted", "size"), [(0, 50), (1, 1), (100, 100), (101, None), (-1, None), (2**31 - 1, None)]
)
def test_a_page_has_1_to_100_lines(wanted: int, size: int | None) -> None:
    if size is None:
        assert field_refused(lambda: rules.page_size(wanted)) == "page_size"
    else:
        assert rules.page_size(wanted) == size


@pytest.mark.parametrize(
    ("token", "after"), [("", None), ("0", 0), ("17", 17), ("9" * 18, 10**18 - 1)]
)
def test_a_page_token_is_a_number(token: str, after: int | None) -> None:
    assert rules.page_after(token) == after


@pytest.mark.parametrize("token", ["x", "-1", "1.5", " 1", "1\n", "٣", "²", "9" * 19, "1" * 5000])
def test_a_page_token_of_nobody_is_refused(token: str) -> None:
    assert field_refused(lambda: rules.page_after(token)) == "page_token"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("INSUFFICIENT_FUNDS", StatusCode.FAILED_PRECONDITION),
        ("CURRENCY_MISMATCH", StatusCode.FAILED_PRECONDITION),
        ("BALANCE_LIMIT", StatusCode.FAILED_PRECONDITION),
        ("PAYEE_NOT_FOUND", StatusCode.NOT_FOUND),
        ("SELF_TRANSFER", StatusCode.INVALID_ARGUMENT),
        ("CANCELLED", StatusCode.FAILED_PRECONDITION),
        ("EXPIRED", StatusCode.FAILED_PRECONDITION),
        ("IDEMPOTENCY_CONFLICT", StatusCode.ALREADY_EXISTS),
        ("BOOKS_LIMIT", StatusCode.FAILED_PRECONDITION),
        ("ACCOUNT_FROZEN", StatusCode.FAILED_PRECONDITION),
        ("ACCOUNT_CLOSED", StatusCode.FAILED_PRECONDITION),
        ("PAYEE_FROZEN", StatusCode.FAILED_PRECONDITION),
        ("PAYEE_CLOSED", StatusCode.FAILED_PRECONDITION),
        ("LIMIT_PER_TRANSFER", StatusCode.FAILED_PRECONDITION),
        ("LIMIT_PER_DAY", StatusCode.FAILED_PRECONDITION),
    ],
)
def test_a_refused_transfer_is_an_error_with_its_reason(reason: str, code: StatusCode) -> None:
    for state in (TRANSFER_STATE_FAILED, TRANSFER_STATE_REFUNDED):
        with pytest.raises(RpcError) as refused:
            rules.answer(TransferResult(state=state, reason=reason))
        assert (refused.value.code, refused.value.reason) == (code, reason)
        assert not refused.value.ran
        assert refused.value.message


@pytest.mark.parametrize(
    "reason",
    [
        *("ACCOUNT_FROZEN", "ACCOUNT_CLOSED", "PAYEE_FROZEN", "PAYEE_CLOSED"),
        *("LIMIT_PER_TRANSFER", "LIMIT_PER_DAY", "HOLDS_LIMIT", "HOLD_CAPTURED", "HOLD_RELEASED"),
        *("HOLD_EXPIRED", "CAPTURE_TOO_LARGE", "ACCOUNT_NOT_EMPTY", "ACCOUNT_HAS_HOLDS"),
        "ACCOUNT_HAS_TRANSIT",
    ],
)
def test_a_refusal_says_what_to_do(reason: str) -> None:
    assert rules.refusal(reason).advice.endswith(".")


def test_a_transfer_that_was_made_or_is_on_its_way_is_an_answer() -> None:
    for state in (TRANSFER_STATE_CREDITED, TRANSFER_STATE_DEBITED):
        result = TransferResult(state=state)
        assert rules.answer(result) is result
