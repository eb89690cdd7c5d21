"""Text that would be a statement, a line end or a control character elsewhere is text here and stays it."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from duohuo.v1 import (
    account_service_pb2,
    account_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
)
from duohuo.v1.money_pb2 import Money
from ops.client import Sessions
from tests.integration.conftest import PASSWORD, RunningMesh
from tests.integration.test_main_path import new_user

TEXTS = (
    "'; DROP TABLE account; --",
    "' OR '1'='1",
    '" OR ""="',
    "1); DELETE FROM session WHERE (1=1",
    "' UNION SELECT password_hash FROM credential --",
    "%' ESCAPE '!' --",
    "?1 :name @name $name",
    "/* */ -- #",
    "\\x27; ATTACH 'x.db' AS x",
    "line\r\nlevel=error forged",
    "\x1b[2J\x1b]0;title\x07",
    "a\0b",
    "{{7*7}} ${7*7} %s %n {0}",
    "\u202egnp.exe \ufeff\u2028",
)


@pytest.fixture
def channel(mesh: RunningMesh) -> Iterator[grpc.Channel]:
    agent = (("grpc.primary_user_agent", "'; DROP TABLE session; -- \x1b[2J"),)
    with grpc.insecure_channel(mesh.described["centers"]["b"]["gateway"], options=agent) as made:
        yield made


def test_hostile_text_is_kept_as_it_is(mesh: RunningMesh, channel: grpc.Channel) -> None:
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b")
    login = Sessions.load(mesh.cli.state).of(payer)
    sent = {"metadata": (("authorization", f"Bearer {login.token}"),), "timeout": 10}
    accounts: Any = account_service_pb2_grpc.AccountServiceStub(channel)
    transfers: Any = transfer_service_pb2_grpc.TransferServiceStub(channel)
    for text in TEXTS:
        named = accounts.UpdateProfile(
            account_service_pb2.UpdateProfileRequest(
                account_id=login.account_id,
                profile=account_service_pb2.Profile(display_name=text),
                update_mask=FieldMask(paths=["display_name"]),
                request_id=str(uuid4()),
            ),
            **sent,
        )
        assert named.profile.display_name == text
        transfers.Transfer(
            transfer_service_pb2.TransferRequest(
                transfer_id=str(uuid4()),
                payer_account_id=login.account_id,
                payee_identifier=payee,
                amount=Money(currency_code="CNY", minor_units=1),
                memo=text,
            ),
            **sent,
        )
    asked = transfer_service_pb2.ListEntriesRequest(account_id=login.account_id, page_size=100)
    entries = transfers.ListEntries(asked, **sent).entries
    assert [entry.memo for entry in entries][::-1][1:] == list(TEXTS)
    assert mesh.cli.json("verify")["passed"] is True


def test_hostile_keys_name_nothing(mesh: RunningMesh, channel: grpc.Channel) -> None:
    user = new_user(mesh.cli, "a")
    token = Sessions.load(mesh.cli.state).of(user).token
    sessions: Any = session_service_pb2_grpc.SessionServiceStub(channel)
    transfers: Any = transfer_service_pb2_grpc.TransferServiceStub(channel)
    account_id = mesh.cli.json("whoami", user)["account_id"]
    for text in TEXTS:
        for ask, request in (
            (
                sessions.Login,
                session_service_pb2.LoginRequest(identifier=user + text, password=PASSWORD),
            ),
            (sessions.GetSession, session_service_pb2.GetSessionRequest(token=token + text)),
            (
                transfers.GetBalance,
                transfer_service_pb2.GetBalanceRequest(account_id=account_id + text),
            ),
            (
                transfers.ListEntries,
                transfer_service_pb2.ListEntriesRequest(account_id=account_id, page_token=text),
            ),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                ask(request, metadata=(("authorization", f"Bearer {token}"),), timeout=10)
            assert refused.value.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
            )
            assert text not in str(refused.value.details())


def test_a_log_has_a_line_of_json_for_each_event(mesh: RunningMesh, channel: grpc.Channel) -> None:
    accounts: Any = account_service_pb2_grpc.AccountServiceStub(channel)
    for traceparent in ("x" * 10_000, "00-?[2J", f"00-{'f' * 5000}-{'f' * 16}-01"):
        with pytest.raises(grpc.RpcError) as refused:
            accounts.GetAccount(
                account_service_pb2.GetAccountRequest(account_id="nobody"),
                metadata=(("traceparent", traceparent),),
                timeout=10,
            )
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for log in mesh.cli.state.glob("*/serve.log"):
        lines = log.read_text().splitlines()
        assert lines
        assert all(isinstance(json.loads(line), dict) for line in lines)
