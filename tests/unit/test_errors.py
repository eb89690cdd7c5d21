"""Errors arrive at the caller as they were raised."""

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import DOMAIN, RpcError, invalid, session_invalid, unreachable

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
errors = st.builds(
    RpcError,
    code=st.sampled_from([code for code in StatusCode if code is not StatusCode.OK]),
    reason=st.from_regex(r"[A-Z][A-Z_]{2,20}", fullmatch=True),
    message=texts,
    ran=st.booleans(),
    retry_after_ms=st.none() | st.integers(0, 10**9),
    advice=texts,
    field_name=texts,
    details=st.dictionaries(texts.filter(lambda key: key != "ran"), texts, max_size=3),
)


@given(errors)
def test_an_error_survives_its_journey(error: RpcError) -> None:
    sent = error.to_status().SerializeToString()
    assert RpcError.from_status(status_pb2.Status.FromString(sent)) == error


@given(errors)
def test_every_error_says_its_reason_and_whether_it_ran_in_the_standard_way(
    error: RpcError,
) -> None:
    """Clients without our code read google.rpc.ErrorInfo."""
    status = error.to_status()
    info = error_details_pb2.ErrorInfo()
    assert status.code == error.code.value[0]
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, error.reason)
    assert info.metadata["ran"] == ("maybe" if error.ran else "no")


@pytest.mark.parametrize("reason", ["", "THEIRS"])
def test_an_error_of_somebody_else_may_have_run(reason: str) -> None:
    status = status_pb2.Status(code=14, message="broken pipe")
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="elsewhere"))
    error = RpcError.from_status(status)
    assert (error.code, error.ran, error.reason) == (StatusCode.UNAVAILABLE, True, reason)


@pytest.mark.parametrize("code", [17, 99, -1])
def test_a_code_that_does_not_exist_is_unknown(code: int) -> None:
    assert RpcError.from_status(status_pb2.Status(code=code)).code is StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("error", "code", "reason", "ran"),
    [
        (invalid("memo", "is long"), StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", False),
        (unreachable("b", ran=True), StatusCode.UNAVAILABLE, "CENTER_UNREACHABLE", True),
        (unreachable("b", ran=False), StatusCode.UNAVAILABLE, "CENTER_UNREACHABLE", False),
        (session_invalid(), StatusCode.UNAUTHENTICATED, "SESSION_INVALID", False),
    ],
    ids=str,
)
def test_reasons_are_stable(error: RpcError, code: StatusCode, reason: str, ran: bool) -> None:
    assert (error.code, error.reason, error.ran) == (code, reason, ran)
