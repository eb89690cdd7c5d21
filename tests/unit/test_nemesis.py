"""What the nemesis drill reports, and that it only reads the centers' databases."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from ops.nemesis.run import Report
from ops.nemesis.stage import Databases

CALM = Report(
    seed=1,
    minutes=0.5,
    passed=True,
    tried=3,
    ok=1,
    refused=1,
    indefinite=1,
    by_kind={"login": {"ok": 1, "refused": 1, "unknown": 1}},
    reasons={"CENTER_UNREACHABLE": 2},
    sure_logins=1,
    faults={"kill": 2},
    skipped=[],
    settled_s=0.5,
    violations=[],
    history="nemesis-1.log",
)


def test_a_report_without_violations_says_so() -> None:
    text = CALM.text()
    assert "3 tried, 1 ok, 1 refused, 1 indefinite" in text
    assert text.endswith("0 violations, passed")


def test_many_violations_of_one_guarantee_do_not_hide_another() -> None:
    broken = [*(f"LOGIN: {number}" for number in range(50)), "ONCE: booked twice"]
    text = replace(CALM, passed=False, violations=broken).text()
    assert "LOGIN: and 47 more" in text
    assert "ONCE: booked twice" in text
    assert text.endswith("51 violations, FAILED")


def test_databases_are_only_read(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "account.db") as owner:
        owner.execute("CREATE TABLE item (name TEXT)")
        owner.execute("INSERT INTO item VALUES ('one')")
    owner.close()
    databases = Databases(tmp_path)
    assert databases.rows("account", "SELECT name FROM item WHERE name = ?", "one") == [("one",)]
    with pytest.raises(sqlite3.OperationalError):
        databases.rows("account", "DELETE FROM item")
    with pytest.raises(sqlite3.OperationalError):
        databases.rows("nothing", "SELECT 1")
