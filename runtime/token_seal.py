"""Seals by which any center tells session tokens, and proofs of known devices, from made-up ones.

The seal is an HMAC (RFC 2104) by a key that all centers share. It opens nothing: a token counts because its
origin has stored it, and a known device still needs the password. So a key that gets out lets nobody in; it
lets rubbish through to other centers, and guesses past the lock-outs.
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

    def device_proof(self, identifier: str, nonce: str) -> str:
        """Shows later that somebody has logged in on this device (OWASP, "device cookies")."""
        return f"d-{nonce}.{_seal(self._keys[0], _device(identifier, nonce))}"

    def device_of(self, identifier: str, proof: str) -> str | None:
        """The nonce of a proof for this identifier; None if it is not one."""
        nonce, _, seal = proof.removeprefix("d-").rpartition(".")
        return nonce if self._fits(_device(identifier, nonce), seal) else None

    def holds(self, token: str) -> bool:
        """Was this made by a center of this mesh?"""
        sealed, _, seal = token.rpartition(".")
        return self._fits(sealed, seal)

    def _fits(self, sealed: str, seal: str) -> bool:
        return any(
            hmac.compare_digest(_seal(key, sealed).encode(), seal.encode()) for key in self._keys
        )


def _device(identifier: str, nonce: str) -> str:
    return f"device {nonce} {identifier}"


def _seal(key: bytes, sealed: str) -> str:
    mac = hmac.digest(key, sealed.encode(), "sha256")[:_SEAL_BYTES]
    return urlsafe_b64encode(mac).rstrip(b"=").decode()
