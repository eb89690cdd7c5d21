"""Identifiers: what a user registers and logs in with, in one normal form."""

import re
from functools import lru_cache

IDENTIFIER_LENGTH_MAX = 254
_PHONE = re.compile(r"[+\uff0b][\d\s().\-/\u2010-\u2015\uff0d]+")


class InvalidIdentifier(ValueError):
    """Neither an e-mail address nor a phone number."""


@lru_cache(maxsize=10_000)
def normalise(identifier: str) -> str:
    """One form for all spellings of an e-mail address or E.164 phone number.

    E-mail addresses are compared without regard to case, as people expect, although RFC 5321 would
    allow a server to tell two spellings of a local part apart. Raises InvalidIdentifier.
    """
    stripped = identifier.strip()
    if len(stripped) > IDENTIFIER_LENGTH_MAX:
        raise InvalidIdentifier
    return _normal_email(stripped) if "@" in stripped else _normal_phone(stripped)


def _normal_email(address: str) -> str:
    # Imported on first use: the command line starts in half the time without it.
    from email_validator import EmailNotValidError, validate_email

    try:
        checked = validate_email(address, check_deliverability=False, test_environment=True)
    except EmailNotValidError:
        raise InvalidIdentifier from None
    # The domain is normal as it is (UTS 46); folding it once more would make two domains one.
    return f"{checked.local_part.casefold()}@{checked.domain}"


def _normal_phone(number: str) -> str:
    import phonenumbers

    if not _PHONE.fullmatch(number):
        raise InvalidIdentifier
    try:
        parsed = phonenumbers.parse(number, None)
    except phonenumbers.NumberParseException:
        raise InvalidIdentifier from None
    if not phonenumbers.is_possible_number(parsed):
        raise InvalidIdentifier
    normal = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)
    if phonenumbers.parse(normal, None) != parsed:
        raise InvalidIdentifier  # it would mean another number when read again
    return normal
