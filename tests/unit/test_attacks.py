"""docs/attacks.md has every attack, and names no test that is not there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "attacks.md").read_text()
ATTACKS = 72


def test_every_attack_has_its_row() -> None:
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", TABLE, re.MULTILINE)]
    assert rows == list(range(1, ATTACKS + 1))


def test_every_named_test_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)
    assert len(named) > ATTACKS / 2
    lost = [
        (file, name) for file, name in named if f"def {name}(" not in (TESTS / file).read_text()
    ]
    assert not lost
