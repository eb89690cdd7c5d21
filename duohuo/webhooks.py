"""For those who receive Duohuo's webhooks: is this call from Duohuo, and recent? Standard library only.

    from duohuo.webhooks import verified
    event = verified(body, headers.get("Duohuo-Signature"), secret)  # raises InvalidWebhook

`body` are the bytes as they came, before anything has parsed them. An event may come more than once:
remember `event["id"]`. See docs/notifications.md.
"""

import hashlib
import hmac
import json
import re
import time
from typing import Any

__all__ = ["HEADER", "TOLERANCE_S", "InvalidWebhook", "sign", "verified"]

HEADER = "Duohuo-Signature"
TOLERANCE_S = 300
"""How far the receiver's clock and the time of sending may be apart."""
_TIME = re.compile(r"[0-9]{1,12}")


class InvalidWebhook(Exception):
    """Not from Duohuo, not for this receiver, or not now: answer 400 and do nothing."""


def sign(body: bytes, secret: str, time_s: int) -> str:
    """The value of the header for a body that is sent at this moment."""
    return f"t={time_s},v1={_digest(body, secret, str(time_s))}"


def verified(
    body: bytes,
    signature: str | None,
    secret: str,
    *,
    now_s: float | None = None,
    tolerance_s: float = TOLERANCE_S,
) -> dict[str, Any]:
    """The event in `body`. Raises InvalidWebhook, in every case of doubt.

    `signature` is the header's value, None if there is none; `secret` is the one given with the webhook.
    """
    if not secret:
        raise InvalidWebhook("there is no secret to check with")
    if not signature:
        raise InvalidWebhook("the signature is missing")
    times, digests = [], []
    for part in signature.split(","):
        name, _, value = part.strip().partition("=")
        if name == "t":
            times.append(value)
        elif name == "v1":
            digests.append(value.encode())
    if len(times) != 1 or not _TIME.fullmatch(times[0]) or not digests:
        raise InvalidWebhook("the signature is malformed")
    expected = _digest(body, secret, times[0]).encode()
    if not any(hmac.compare_digest(expected, given) for given in digests):
        raise InvalidWebhook("the signature is wrong")
    now_s = time.time() if now_s is None else now_s
    if not abs(now_s - int(times[0])) <= tolerance_s:
        raise InvalidWebhook("the signature is too old, or a clock is wrong")
    try:
        event = json.loads(body)
    except ValueError:
        raise InvalidWebhook("the body is not JSON") from None
    if not isinstance(event, dict) or not event.get("id"):
        raise InvalidWebhook("the body is not an event")
    return event


def _digest(body: bytes, secret: str, time_s: str) -> str:
    return hmac.new(secret.encode(), time_s.encode() + b"." + body, hashlib.sha256).hexdigest()
