"""Ids that say where they belong, so that any request can be routed without a look-up.

account      u<slot>-<hex>             u3fa-0192f0c1...
application  q-<origin>-<slot>-<hex>   q-a-3fa-0192f0c1...
token        s-<origin>-<secret>.<seal>  s-a-Jx0...  (made by runtime/token_seal.py)
"""

import re
import secrets
from dataclasses import dataclass
from typing import Protocol

import uuid_utils

from runtime.identifiers import InvalidIdentifier, normalise
from runtime.placement import slot_of

CENTER_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_ACCOUNT = re.compile(r"u([0-9a-f]{3})-[0-9a-f]{32}")
_APPLICATION = re.compile(rf"q-({CENTER_NAME.pattern})-([0-9a-f]{{3}})-[0-9a-f]{{32}}")
_TOKEN = re.compile(rf"s-({CENTER_NAME.pattern})-[A-Za-z0-9_-]{{43}}\.[A-Za-z0-9_-]{{22}}")
_CLIENT_MADE = re.compile(r"[A-Za-z0-9_-]{8,64}")


class Ids(Protocol):
    """Where new ids come from, handed in."""

    def unique(self) -> str:
        """32 hex digits, never seen before, growing with time."""
        ...

    def secret(self) -> str:
        """43 URL-safe characters (256 bits) that nobody can guess."""
        ...


class RandomIds:
    """Version 7 UUIDs (RFC 9562) and the operating system's randomness."""

    def unique(self) -> str:
        return uuid_utils.uuid7().hex

    def secret(self) -> str:
        return secrets.token_urlsafe(32)


@dataclass(frozen=True, slots=True)
class Place:
    """What an id says about where it belongs."""

    slot: int | None = None
    origin: str | None = None


def account_id(slot: int, unique: str) -> str:
    return f"u{slot:03x}-{unique}"


def application_id(origin: str, slot: int, unique: str) -> str:
    return f"q-{origin}-{slot:03x}-{unique}"


def account_slot(account: str) -> int | None:
    """The slot inside an account id; None if it is not one."""
    match = _ACCOUNT.fullmatch(account)
    return int(match[1], 16) if match else None


def is_client_made(value: str) -> bool:
    """May this be a transfer, deposit or request id?"""
    return _CLIENT_MADE.fullmatch(value) is not None


def place_of(key: str) -> Place | None:
    """Reads the place from an account id, application id, token or identifier; None if it is none."""
    if (slot := account_slot(key)) is not None:
        return Place(slot=slot)
    if match := _APPLICATION.fullmatch(key):
        return Place(slot=int(match[2], 16), origin=match[1])
    if match := _TOKEN.fullmatch(key):
        return Place(origin=match[1])
    try:
        return Place(slot=slot_of(normalise(key)))
    except InvalidIdentifier:
        return None
