"""Session tokens that any center tells from made-up ones without asking: `s-<origin>-<secret>.<seal>`.

The seal is an HMAC (RFC 2104) by a key that all centers share. It keeps rubbish from the centers that it
names; it opens nothing: a token counts because its origin has stored it. So a key that gets out lets
nobody in.
"""

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Sequence

_SEAL_BYTES = 16


class TokenSeal:
    """The mesh's keys: the first one seals, all of them count, so that a key can be exchanged."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or min(map(len, keys)) < _SEAL_BYTES:
            raise ValueError(f"token keys must have at least {_SEAL_BYTES} bytes")
        self._keys = tuple(keys)

    def token(self, origin: str, secret: str) -> str:
        """A token of that center."""
        sealed = f"s-{origin}-{secret}"
        return f"{sealed}.{_seal(self._keys[0], sealed)}"

    def holds(self, token: str) -> bool:
        """Was this made by a center of this mesh?"""
        sealed, _, seal = token.rpartition(".")
        return any(
            hmac.compare_digest(_seal(key, sealed).encode(), seal.encode()) for key in self._keys
        )


def _seal(key: bytes, sealed: str) -> str:
    mac = hmac.digest(key, sealed.encode(), "sha256")[:_SEAL_BYTES]
    return urlsafe_b64encode(mac).rstrip(b"=").decode()
