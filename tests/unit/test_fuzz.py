"""Inputs that nobody has thought of are answered all the same; what was found with them stays mended."""

from dataclasses import dataclass
from random import Random

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from duohuo.internal.v1 import log_pb2
from duohuo.internal.v1.log_pb2 import (
    ControlChanged,
    CreditRefused,
    HoldChanged,
    Leg,
    LogEntry,
    LogRecord,
    Posting,
)
from duohuo.v1.account_service_pb2 import Account, GetAccountRequest
from runtime.clock import milliseconds
from runtime.endpoint import Reply, ask
from runtime.errors import RpcError
from runtime.methods import OPERATOR_FILES, PEER_FILES, PUBLIC_FILES, method
from sync_bus.jetstream import _delivery
from tests.fakes import RecordingEndpoint, account, stamp
from tests.fuzz import run_episode
from tests.unit.bank import bank

INPUTS = 2_000
GET_ACCOUNT = method("/duohuo.v1.AccountService/GetAccount")
HERS, HIS = account(0), account(1)
"""At home at a, and at b."""


@pytest.mark.parametrize("seed", [1, 17])
def test_every_input_is_answered_and_does_no_harm(seed: int) -> None:
    """17 has found that a center could tell of holds on another home's accounts."""
    _, counts, broken = run_episode(seed, INPUTS)
    assert broken == []
    assert counts.total() >= INPUTS * 0.95
    for kind in ("user", "operator", "peer"):
        assert counts[kind, "OK"] > 0
    assert counts["entry", "applied"] > 0
    assert counts["entry", "parked"] > 0


def test_no_number_of_a_message_is_too_large_for_a_database() -> None:
    """SQLite's integers have 64 bits and a sign; a larger one stopped the process."""
    files = (*PUBLIC_FILES, *OPERATOR_FILES, *PEER_FILES, log_pb2.DESCRIPTOR)
    unsigned = [
        field.full_name
        for file in files
        for message in file.message_types_by_name.values()
        for field in [*message.fields, *(f for m in message.nested_types for f in m.fields)]
        if field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64)
    ]
    assert unsigned == []


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63)])
def test_a_timestamp_from_outside_of_time_is_the_nearest(seconds: int) -> None:
    assert -(2**63) <= milliseconds(Timestamp(seconds=seconds)) < 2**63


@pytest.mark.parametrize(
    "record",
    [
        LogRecord(hold_changed=HoldChanged(payer_account_id=HIS, hold_id="hold-0001")),
        LogRecord(control_changed=ControlChanged(account_id=HIS)),
        LogRecord(posting=Posting(legs=[Leg(account_id=HERS), Leg(account_id=HIS)])),
    ],
    ids=lambda record: record.WhichOneof("body"),
)
async def test_a_center_tells_only_of_accounts_that_are_at_home_there(record: LogRecord) -> None:
    async with bank("a", "b") as two:
        b = two.centers["b"]
        with pytest.raises(ValueError, match="another home"):
            await b.store.write("apply", b.inbound.apply("a", record, stamp(0)))


async def test_only_the_payees_home_can_refuse_a_credit() -> None:
    """Else another center could give back to the payer what the payee gets as well."""
    async with bank("a", "b", "c") as three:
        a = three.centers["a"]
        await three.deposit(HERS, 100, "deposit-1")
        await three.pay(HERS, HIS, 40, "transfer-1")
        refused = CreditRefused(
            transfer_id="transfer-1", payer_account_id=HERS, reason="NO", payer_home="a"
        )
        unit = a.inbound.apply("c", LogRecord(credit_refused=refused), stamp(0))
        with pytest.raises(ValueError, match="only its home"):
            await a.store.write("apply", unit)
        await three.settle()
        assert (await a.balance(HERS), await a.balance(HIS)) == (60, 40)


async def test_an_answer_that_is_no_message_is_a_fault_of_its_sender() -> None:
    endpoint = RecordingEndpoint(lambda _call: Reply(b"\x0a\xff", {}))
    with pytest.raises(RpcError) as refused:
        await ask(endpoint, GET_ACCOUNT, GetAccountRequest(), Account, 1.0)
    assert (refused.value.reason, refused.value.ran) == ("ANSWER_MALFORMED", True)


@dataclass
class Message:
    """Of JetStream, as far as it is read."""

    data: bytes


def test_what_jetstream_brings_may_be_anything() -> None:
    """What is no entry is left out: it shows as a gap, which the feed fills."""
    random = Random(1)  # noqa: S311 - inputs may be guessed
    entry = LogEntry(topic="ledger", seq=7, record=b"record", generation=1)
    for _ in range(2_000):
        damaged = bytearray(entry.SerializeToString())
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
        payloads = [
            bytes(damaged),
            random.randbytes(random.randrange(40)),
            entry.SerializeToString(),
        ]
        delivery = _delivery([Message(one) for one in payloads])  # type: ignore[misc] # as far as it is read
        assert delivery.entries[-1] == entry
