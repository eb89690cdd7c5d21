"""Which passwords may be set, and the one form in which they are hashed. Plain functions.

Length and a list instead of classes of characters: NIST SP 800-63B, section 3.1.1.2.
"""

import unicodedata
from functools import lru_cache

from runtime.errors import invalid
from runtime.identifiers import InvalidIdentifier, normalise

LENGTH_MIN, LENGTH_MAX = 8, 128
"""In code points of the normal form."""


def normal(password: str) -> str:
    """The same for one password typed on two keyboards, which may differ in composition and in spaces (RFC
    8265, OpaqueString)."""
    spaces = "".join(" " if unicodedata.category(one) == "Zs" else one for one in password)
    return unicodedata.normalize("NFC", spaces)


def check(field_name: str, password: str, *identifiers: str) -> None:
    """Raises RpcError INVALID_FIELD for a password that may not be set by who has these identifiers."""
    wanted = normal(password)
    if not LENGTH_MIN <= len(wanted) <= LENGTH_MAX:
        raise invalid(field_name, f"must have {LENGTH_MIN} to {LENGTH_MAX} characters")
    if wanted.casefold() in _commonest() or _is_one_of(wanted, identifiers):
        raise invalid(field_name, "is among the first that others would try; choose another one")


def _is_one_of(password: str, identifiers: tuple[str, ...]) -> bool:
    try:
        meant = normalise(password)
    except InvalidIdentifier:
        meant = password.casefold()
    return any(meant in (one, one.partition("@")[0]) for one in identifiers)


@lru_cache(maxsize=1)
def _commonest() -> frozenset[str]:
    """The commonest in the leaks that zxcvbn has counted, as far as they are long enough."""
    # Imported on first use: 30,000 words that only account services need.
    from zxcvbn.frequency_lists import FREQUENCY_LISTS

    return frozenset(one for one in FREQUENCY_LISTS["passwords"] if len(one) >= LENGTH_MIN)
