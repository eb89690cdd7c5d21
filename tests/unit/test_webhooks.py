"""What a receiver is given to check calls with. In every case of doubt it says no."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from duohuo.v1.money_pb2 import Money
from duohuo.v1.transfer_service_pb2 import APPLICATION_STATE_FAILED, Application
from duohuo.webhooks import HEADER, TOLERANCE_S, InvalidWebhook, sign, verified
from runtime.destinations import URL_LENGTH_MAX
from transfer_svc import notifications, notifier, webhook_client

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


PAGE = Path("docs/notifications.md").read_text()


def block(language: str) -> str:
    """The one code block of a language in docs/notifications.md."""
    _, _, rest = PAGE.partition(f"```{language}\n")
    return rest.partition("```")[0]


def test_the_receiver_of_the_documentation_takes_each_event_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: NOW_S)
    program: dict[str, Any] = {}
    exec(block("python"), program)  # noqa: S102 - our own page
    body = block("json").encode()
    signature = sign(body, "the-secret-you-gave", NOW_S)
    for _ in range(2):
        assert program["receive"]({"Duohuo-Signature": signature}, body) == 204
    assert program["receive"]({}, body) == 400
    assert program["receive"]({"Duohuo-Signature": sign(body, OTHER, NOW_S)}, body) == 400
    event = json.loads(body)
    assert capsys.readouterr().out == f"{event['application_id']} {event['state']}\n"


def test_the_event_of_the_documentation_is_one_of_ours() -> None:
    event = json.loads(block("json"))
    application = Application(
        application_id=event["application_id"],
        transfer_id=event["transfer_id"],
        state=APPLICATION_STATE_FAILED,
        reason=event["reason"],
        amount=Money(**event["amount"]),
    )
    application.decide_time.FromJsonString(event["time"])
    assert json.loads(notifications.body(application)) == event


def test_the_documentation_names_the_limits_and_the_signature_as_they_are() -> None:
    assert f"{HEADER}: {GOOD}" in PAGE
    for said in (
        f"more than {TOLERANCE_S // 60} minutes old",
        f"within {webhook_client.TIMEOUT_S:g} seconds",
        f"after {notifier.DELAY_MS_FIRST // 2000} to {notifier.DELAY_MS_FIRST // 1000} seconds",
        f"up to {notifier.DELAY_MS_MAX // 3_600_000} hours: {notifier.ATTEMPTS_MAX} attempts",
        f"each host at most {notifier.PER_HOST_MAX}",
        f"in the last {notifications.RESTORED_AGE_MS_MAX // 86_400_000} days",
        f"at most {URL_LENGTH_MAX} characters",
    ):
        assert said in " ".join(PAGE.split()), said
