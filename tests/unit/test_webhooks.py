"""What a receiver is given to check calls with. In every case of doubt it says no."""

import json
import subprocess
import sys
from typing import Any

import pytest

from duohuo.webhooks import InvalidWebhook, sign, verified

SECRET, OTHER = "a-secret-of-the-test", "the-secret-of-another"
NOW_S = 1_900_000_000
BODY = json.dumps({"id": "decided-q-a-001-1", "state": "SUCCEEDED"}).encode()
GOOD = sign(BODY, SECRET, NOW_S)
DIGEST = GOOD.partition("v1=")[2]


def accepts(signature: str | None, **changed: Any) -> bool:
    given: dict[str, Any] = {"body": BODY, "secret": SECRET, "now_s": NOW_S, **changed}
    body, secret = given.pop("body"), given.pop("secret")
    try:
        event = verified(body, signature, secret, **given)
    except InvalidWebhook:
        return False
    assert event == json.loads(body)
    return True


def test_the_signature_is_what_the_documentation_says() -> None:
    """Made with another program: openssl dgst -sha256 -hmac SECRET, of "1900000000." and the body."""
    digest = "e2f81d3c451dc9cf6ff18aed7326f8c8550c5195da489eadc32b0fcf44bec6e0"
    assert f"t={NOW_S},v1={digest}" == GOOD


@pytest.mark.parametrize("age_s", [-300, 0, 300])
def test_a_recent_call_with_the_right_secret_is_believed(age_s: int) -> None:
    assert accepts(GOOD, now_s=NOW_S + age_s)


@pytest.mark.parametrize("age_s", [-301, 300.5, 86_400, float("nan")])
def test_a_call_of_another_time_is_not(age_s: float) -> None:
    assert not accepts(GOOD, now_s=NOW_S + age_s)


@pytest.mark.parametrize(
    "signature",
    [
        None,
        "",
        "t=,v1=",
        DIGEST,
        f"v1={DIGEST}",
        f"t={NOW_S}",
        f"t={NOW_S},v1=",
        f"t={NOW_S},v1={DIGEST[:-1]}",
        f"t={NOW_S},v1={DIGEST.upper()}",
        f"t={NOW_S},v0={DIGEST}",
        f"t={NOW_S + 1},v1={DIGEST}",
        f"t={NOW_S},t={NOW_S},v1={DIGEST}",
        f"t=+{NOW_S},v1={DIGEST}",
        f"t={NOW_S}.0,v1={DIGEST}",
        f"t=\u0661,v1={DIGEST}",
        f"t={NOW_S},v1=\u00e9{DIGEST}",
        sign(BODY, OTHER, NOW_S),
        sign(BODY + b" ", SECRET, NOW_S),
    ],
)
def test_what_is_not_signed_with_the_secret_is_not(signature: str | None) -> None:
    assert not accepts(signature)


def test_a_changed_body_is_not() -> None:
    assert not accepts(GOOD, body=BODY.replace(b"SUCCEEDED", b"FAILED"))


def test_without_a_secret_nothing_is() -> None:
    assert not accepts(sign(BODY, "", NOW_S), secret="")


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"{}", b"null", b'{"id": ""}'])
def test_what_is_signed_but_no_event_is_not(body: bytes) -> None:
    assert not accepts(sign(body, SECRET, NOW_S), body=body)


def test_a_secret_can_be_changed_without_a_gap() -> None:
    """A call may carry the signatures of both."""
    both = f"{sign(BODY, OTHER, NOW_S)},v1={DIGEST}"
    assert accepts(both)
    assert accepts(both, secret=OTHER)


def test_it_needs_the_standard_library_alone() -> None:
    """Users may copy the file."""
    program = (
        "import runpy, sys; sys.path = [p for p in sys.path if 'packages' not in p];"
        "print(runpy.run_path('duohuo/webhooks.py')['TOLERANCE_S'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "300\n"
