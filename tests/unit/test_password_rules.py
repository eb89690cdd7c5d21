"""Which passwords may be set."""

import pytest

from account_svc import password_rules
from runtime.errors import RpcError

ALICE = "alice.liddell@example.com"


@pytest.mark.parametrize(
    "password",
    [
        "correct horse",
        "8letter!",
        "x" * 128,
        "密码密码密码密码",
        "e\u0301" * 128,  # 128 in the form that is hashed
        "pass phrase\u3000with a wide space",
    ],
)
def test_may_be_set(password: str) -> None:
    password_rules.check("password", password, ALICE)


@pytest.mark.parametrize(
    "password",
    ["", "7letter", "x" * 129, "e\u0301" * 7],
)
def test_has_another_length(password: str) -> None:
    with pytest.raises(RpcError, match="8 to 128"):
        password_rules.check("password", password, ALICE)


@pytest.mark.parametrize(
    "password",
    [
        "password",
        "PassWord",
        "12345678",
        "qwertyuiop",
        ALICE,
        "Alice.Liddell@Example.com",
        "alice.liddell",
        "ALICE.LIDDELL",
    ],
)
def test_would_be_guessed_first(password: str) -> None:
    with pytest.raises(RpcError, match="first that others would try") as refused:
        password_rules.check("password", password, ALICE)
    assert password not in str(refused.value)


def test_a_phone_number_is_no_password_for_itself() -> None:
    with pytest.raises(RpcError, match="first that others would try"):
        password_rules.check("password", "+86 139 1234 5678", "+8613912345678")


def test_one_password_has_one_form() -> None:
    assert password_rules.normal("cafe\u0301\u3000au lait") == "caf\u00e9 au lait"
    assert password_rules.normal("\uff21") != "A"  # wide letters are other letters
