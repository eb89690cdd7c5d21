"""`-o json` shows messages as programs expect them: numbers, ISO times, short names of states."""

import json
from typing import Any

import pytest
from google.protobuf.message import Message

from duohuo.v1.account_service_pb2 import Account, Profile
from duohuo.v1.money_pb2 import Money
from duohuo.v1.operator_service_pb2 import CenterStatus, PeerStatus
from duohuo.v1.transfer_service_pb2 import (
    APPLICATION_STATE_QUEUED,
    TRANSFER_STATE_CREDITED,
    Application,
    Balance,
    TransferResult,
)
from ops.plain import plain
from runtime.clock import timestamp


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            Money(currency_code="CNY", minor_units=10**15),
            {"currency_code": "CNY", "minor_units": 10**15},
        ),
        (Balance(stale=True), {"stale": True}),
        (
            Balance(balance=Money(), as_of=timestamp(1_900_000_000_123)),
            {
                "balance": {"currency_code": "", "minor_units": 0},
                "stale": False,
                "as_of": "2030-03-17T17:46:40.123Z",
            },
        ),
        (
            Account(account_id="u", identifiers=["x", "y"], profile=Profile(display_name="Alice")),
            {
                "account_id": "u",
                "identifiers": ["x", "y"],
                "profile": {"display_name": "Alice", "language": "", "time_zone": ""},
                "home_center": "",
            },
        ),
        (
            CenterStatus(center="a", peers=[PeerStatus(center="b")], counts={"accounts": 3}),
            {
                "center": "a",
                "placement_epoch": 0,
                "slots": 0,
                "peers": [{"center": "b", "reachable": False, "clock_alarm": False}],
                "roads": [],
                "counts": {"accounts": 3},
                "silent_roles": [],
                "clock_wrong": False,
                "logs": [],
                "recoveries": [],
                "overdue": [],
                "paths": [],
                "draining": False,
            },
        ),
    ],
    ids=["money", "unset", "time", "lists", "maps"],
)
def test_a_message_is_shown_as_plain_data(message: Message, shown: dict[str, Any]) -> None:
    assert plain(message) == shown
    assert json.loads(json.dumps(plain(message))) == shown


def test_states_have_short_names_and_unknown_ones_their_number() -> None:
    assert plain(Application(state=APPLICATION_STATE_QUEUED))["state"] == "QUEUED"
    assert plain(TransferResult(state=TRANSFER_STATE_CREDITED))["state"] == "CREDITED"
    assert plain(TransferResult())["state"] == "UNSPECIFIED"
    future = TransferResult.FromString(b"\x10\x63")
    assert plain(future)["state"] == "99"


@pytest.mark.parametrize("field", ["payee_account_id", "payee_identifier"])
def test_of_a_oneof_only_what_is_set_is_shown(field: str) -> None:
    shown = plain(Application(**{field: "bob"}))  # type: ignore[arg-type]
    assert {name for name in shown if name.startswith("payee")} == {field}
