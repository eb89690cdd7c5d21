"""What the command line makes of an error."""

import pytest
from grpc import StatusCode

from ops.output import _failure
from runtime.errors import RpcError, invalid


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            invalid("password", "must have 8 to 128 characters"),
            "password must have 8 to 128 characters",
        ),
        (invalid("user", "user must be an id"), "user must be an id"),
        (RpcError(StatusCode.NOT_FOUND, "NOT_FOUND", "there is none"), "there is none"),
    ],
)
def test_an_error_names_the_field_that_it_is_about(error: RpcError, message: str) -> None:
    told = _failure(error)
    assert told is not None
    assert told.message == message
