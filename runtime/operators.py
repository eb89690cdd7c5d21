"""Who may act at the operators' port: named people with a role, known by the hashes of their tokens.

The file has a line for each: `NAME ROLE SHA256 [EXPIRES]`, the role viewer or operator, the hash in hex,
the last day as 2026-12-31 (UTC).
"""

import re
from datetime import date
from hashlib import sha256
from typing import Literal, NamedTuple, get_args

Role = Literal["viewer", "operator"]
NAME = re.compile(r"[a-z][a-z0-9._-]{0,31}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Operator(NamedTuple):
    """One of them. A viewer may look at everything; an operator may act."""

    name: str
    role: Role
    hashed: str
    last_day: date | None = None
    """The token's last day; None if it does not expire."""

    def line(self) -> str:
        """As the file has it."""
        expires = [self.last_day.isoformat()] if self.last_day else []
        return " ".join([self.name, self.role, self.hashed, *expires])


def token_hash(token: str) -> str:
    """How a token is stored: it is 256 random bits, so a plain hash cannot be reversed or guessed."""
    return sha256(token.encode()).hexdigest()


def parse(text: str) -> list[Operator]:
    """The operators of a file. Raises ValueError, which names the line and repeats nothing of it."""
    found: list[Operator] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            name, role, hashed, *expires = words
            last_day = date.fromisoformat(" ".join(expires)) if expires else None
        except ValueError:
            raise ValueError(f"line {number} is not NAME ROLE SHA256 [EXPIRES]") from None
        if role not in get_args(Role) or not NAME.fullmatch(name) or not _HASH.fullmatch(hashed):
            raise ValueError(f"line {number} is not NAME ROLE SHA256 [EXPIRES]")
        if any(one.name == name for one in found):
            raise ValueError(f"line {number} repeats a name")
        found.append(Operator(name, "viewer" if role == "viewer" else "operator", hashed, last_day))
    return found
