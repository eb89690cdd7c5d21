"""The whole main path, from a user's side: the command line and plain generated gRPC stubs."""

import stat
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from duohuo.v1 import (
    account_service_pb2,
    account_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
)
from duohuo.v1.money_pb2 import Money
from ops.drill import identifier_of
from tests.integration.conftest import PASSWORD, Cli, RunningMesh, wait_until


def new_user(cli: Cli, home: str, money: int = 0, *, login_at: str | None = None) -> str:
    """Registers a user with this home, with money if wanted, and logs in."""
    identifier = identifier_of(home, ["a", "b"])
    cli.json("register", identifier)
    if money:
        cli.json("fund", identifier, str(money))
    cli.json("login", identifier, "--center", login_at or home)
    return identifier


def balance(cli: Cli, user: str, center: str = "a") -> int:
    found: int = cli.json("balance", user, "--center", center)["balance"]["minor_units"]
    return found


def test_a_user_registered_at_a_logs_in_at_b_at_once(mesh: RunningMesh) -> None:
    """The second read answers before the copy has arrived."""
    identifier = identifier_of("a", ["a", "b"])
    mesh.cli.json("register", identifier, "--center", "a")
    session = mesh.cli.json("login", identifier, "--center", "b")
    assert session["origin_center"] == "b"


def test_a_session_made_at_a_is_accepted_at_b(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", login_at="a")
    assert mesh.cli.json("whoami", user, "--center", "b")["identifiers"] == [user]


def test_logging_out_at_one_center_ends_the_session_at_the_other(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", login_at="a")
    kept = (mesh.cli.state / "sessions.json").read_text()
    mesh.cli.json("logout", user)
    (mesh.cli.state / "sessions.json").write_text(kept)
    assert mesh.cli.refused("whoami", user, "--center", "b")["reason"] == "SESSION_INVALID"


def test_revoking_ends_the_sessions_of_all_centers(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", login_at="a")
    at_a = (mesh.cli.state / "sessions.json").read_text()
    mesh.cli.json("login", user, "--center", "b")
    listed = mesh.cli.json("sessions", user)
    assert {s["origin_center"] for s in listed["sessions"]} == {"a", "b"}
    mesh.cli.json("sessions", user, "--revoke", "--center", "b")
    (mesh.cli.state / "sessions.json").write_text(at_a)
    wait_until(lambda: mesh.cli.run("whoami", user, "--center", "a").returncode == 1)


def test_one_session_is_ended_from_another_center(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", login_at="a")
    at_a = (mesh.cli.state / "sessions.json").read_text()
    here = mesh.cli.json("login", user, "--center", "b")
    listed = mesh.cli.json("sessions", user)["sessions"]
    (name,) = (one["session_id"] for one in listed if one["session_id"] != here["session_id"])
    mesh.cli.json("sessions", user, "--end", name, "--center", "b")
    listed = mesh.cli.json("sessions", user)["sessions"]
    assert [one["session_id"] for one in listed] == [here["session_id"]]
    assert listed[0]["last_use_time"]
    (mesh.cli.state / "sessions.json").write_text(at_a)
    assert mesh.cli.refused("whoami", user, "--center", "a")["reason"] == "SESSION_INVALID"


def test_a_password_change_ends_all_other_sessions_everywhere(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", login_at="a")
    at_a = (mesh.cli.state / "sessions.json").read_text()
    mesh.cli.json("login", user, "--center", "b")
    at_b = (mesh.cli.state / "sessions.json").read_text()
    mesh.cli.json("login", user, "--center", "b")
    mesh.cli.json("passwd", user, "--center", "b", DUOHUO_NEW_PASSWORD="another-good-one")
    assert mesh.cli.json("whoami", user, "--center", "b")["identifiers"] == [user]
    (mesh.cli.state / "sessions.json").write_text(at_b)
    assert mesh.cli.refused("whoami", user, "--center", "b")["reason"] == "SESSION_INVALID"
    (mesh.cli.state / "sessions.json").write_text(at_a)
    wait_until(lambda: mesh.cli.run("whoami", user, "--center", "a").returncode == 1)


def test_a_password_changed_at_one_center_works_at_the_other(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a")
    mesh.cli.json("passwd", user, "--center", "b", DUOHUO_NEW_PASSWORD="another-good-one")
    for center in ("a", "b"):
        mesh.cli.json("login", user, "--center", center, DUOHUO_PASSWORD="another-good-one")
    assert mesh.cli.refused("login", user, "--center", "a")["reason"] == "BAD_CREDENTIALS"


def test_a_profile_edited_at_one_center_appears_at_the_other(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "b")
    mesh.cli.json("profile", user, "--name", "Edited", "--center", "b")
    wait_until(
        lambda: (
            mesh.cli.json("whoami", user, "--center", "a")["profile"]["display_name"] == "Edited"
        )
    )


@pytest.mark.parametrize(("payer_home", "payee_home"), [("a", "a"), ("a", "b"), ("b", "a")])
def test_money_moves_within_and_across_homes(
    mesh: RunningMesh, payer_home: str, payee_home: str
) -> None:
    payer = new_user(mesh.cli, payer_home, 1000)
    payee = new_user(mesh.cli, payee_home)
    done = mesh.cli.json("transfer", payee, "300", "--from", payer, "--center", "b")
    assert done["state"] == "CREDITED"
    assert (balance(mesh.cli, payer), balance(mesh.cli, payee)) == (700, 300)


@pytest.mark.parametrize("origin", ["a", "b"])
@pytest.mark.parametrize(
    ("amount", "state", "reason"),
    [(400, "SUCCEEDED", ""), (5000, "FAILED", "INSUFFICIENT_FUNDS")],
)
def test_an_application_is_decided_at_the_payers_home(
    mesh: RunningMesh, origin: str, amount: int, state: str, reason: str
) -> None:
    payer, payee = new_user(mesh.cli, "a", 1000), new_user(mesh.cli, "b")
    queued = mesh.cli.json("apply", payee, str(amount), "--from", payer, "--center", origin)
    assert queued["origin_center"] == origin

    def decided() -> bool:
        (found,) = mesh.cli.json("applications", payer, "--center", origin)["applications"]
        if "decide_time" not in found:
            return False
        assert (found["state"], found["reason"]) == (state, reason)
        return True

    wait_until(decided)


def test_refusals_say_what_is_wrong_and_move_nothing(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b", 100)
    reasons = [
        mesh.cli.refused("transfer", payee, "101", "--from", payer)["reason"],
        mesh.cli.refused("transfer", "nobody@example.com", "1", "--from", payer)["reason"],
        mesh.cli.refused("transfer", payee, "1", "--currency", "EUR", "--from", payer)["reason"],
        mesh.cli.refused("transfer", payer, "1", "--from", payer)["reason"],
        mesh.cli.refused("transfer", payee, "0", "--from", payer)["reason"],
    ]
    assert reasons == [
        "INSUFFICIENT_FUNDS",
        "PAYEE_NOT_FOUND",
        "CURRENCY_MISMATCH",
        "SELF_TRANSFER",
        "AMOUNT",
    ]
    assert balance(mesh.cli, payer) == 100


def test_the_same_transfer_id_moves_money_once(mesh: RunningMesh) -> None:
    payer, payee, transfer_id = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b"), str(uuid4())
    ask = ("transfer", payee, "--from", payer, "--id", transfer_id)
    first = mesh.cli.json(*ask, "40")
    assert mesh.cli.json(*ask, "40", "--center", "b") == first
    assert mesh.cli.refused(*ask, "41")["reason"] == "IDEMPOTENCY_CONFLICT"
    assert balance(mesh.cli, payer) == 60


def test_a_payee_of_another_currency_at_another_home_gets_nothing_and_the_payer_all(
    mesh: RunningMesh,
) -> None:
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b")
    mesh.cli.json("fund", payee, "5", "--currency", "EUR")
    error = mesh.cli.refused("transfer", payee, "40", "--from", payer)
    assert error["reason"] == "CURRENCY_MISMATCH"
    assert balance(mesh.cli, payer) == 100


def test_an_account_registered_twice_is_taken(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a")
    assert mesh.cli.refused("register", user.upper())["reason"] == "IDENTIFIER_TAKEN"


def test_another_users_account_is_none_of_yours(mesh: RunningMesh) -> None:
    alice, bob = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b")
    victim = mesh.cli.json("whoami", alice)["account_id"]
    token = _token(mesh.cli, bob)
    with grpc.insecure_channel(mesh.described["centers"]["b"]["gateway"]) as channel:
        stub = transfer_service_pb2_grpc.TransferServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.GetBalance(
                transfer_service_pb2.GetBalanceRequest(account_id=victim),
                metadata=(("authorization", f"Bearer {token}"),),
                timeout=5,
            )
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_tokens_are_kept_for_their_owner_alone_and_stored_hashed(mesh: RunningMesh) -> None:
    user = new_user(mesh.cli, "a", login_at="a")
    kept = mesh.cli.state / "sessions.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    token = _token(mesh.cli, user).encode()
    for file in mesh.cli.state.rglob("*"):
        if file.is_file() and file != kept:
            assert token not in file.read_bytes(), file


def test_both_roads_carry_and_are_visible(mesh: RunningMesh) -> None:
    new_user(mesh.cli, "a", 10)

    def by_road(topic: str, road: str) -> int:
        found: int = sum(
            entry[road]
            for entry in mesh.cli.json("status")["centers"]["b"]["status"]["roads"]
            if entry["topic"] == topic
        )
        return found

    wait_until(lambda: by_road("accounts", "from_jetstream") > 0)
    wait_until(lambda: by_road("changes", "from_feed") > 0)
    assert by_road("changes", "from_jetstream") == 0


def test_why_tells_the_story_of_a_transfer_across_centers(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b")
    done = mesh.cli.json("transfer", payee, "40", "--from", payer, "--center", "b")

    def story() -> bool:
        traces = mesh.cli.json("why", done["transfer_id"])["traces"]
        assert len(traces) == 1
        (spans,) = traces.values()
        steps = {(span["name"], span["attributes"]["duohuo.center"]) for span in spans}
        return steps >= {
            ("duohuo.v1.TransferService/Transfer", "b"),
            ("transfer Transfer", "a"),
            ("store decide transfer", "a"),
            ("publish ledger", "a"),
            ("apply posting", "b"),
            ("apply posting", "a"),
        }

    wait_until(story)


def test_why_says_when_nobody_knows_the_id(mesh: RunningMesh) -> None:
    assert "no center" in mesh.cli.refused("why", "0" * 32)["message"]


def test_verify_passes(mesh: RunningMesh) -> None:
    assert mesh.cli.json("verify")["passed"] is True


def test_health_and_reflection_answer_any_grpc_client(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.described["centers"]["a"]["gateway"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "duohuo.v1.TransferService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([asked]), timeout=5)
        names = {service.name for service in answer.list_services_response.service}
    assert names == {
        "duohuo.v1.AccountService",
        "duohuo.v1.AnnouncementService",
        "duohuo.v1.SessionService",
        "duohuo.v1.TransferService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_plain_generated_stubs_do_everything_at_any_gateway(mesh: RunningMesh) -> None:
    """Register, log in, edit, read: served-by, home and causal metadata come with each answer."""
    identifier = identifier_of("a", ["a", "b"])
    with grpc.insecure_channel(mesh.described["centers"]["b"]["gateway"]) as channel:
        accounts = account_service_pb2_grpc.AccountServiceStub(channel)
        account, call = accounts.Register.with_call(
            account_service_pb2.RegisterRequest(
                identifier=identifier, password=PASSWORD, request_id=str(uuid4())
            ),
            timeout=10,
        )
        trailing: Any = call.trailing_metadata()
        metadata = dict(trailing)
        assert account.home_center == metadata["duohuo-home"] == metadata["duohuo-served-by"] == "a"
        session = session_service_pb2_grpc.SessionServiceStub(channel).Login(
            session_service_pb2.LoginRequest(identifier=identifier, password=PASSWORD), timeout=10
        )
        edited = accounts.UpdateProfile(
            account_service_pb2.UpdateProfileRequest(
                account_id=account.account_id,
                profile=account_service_pb2.Profile(display_name="Plain"),
                update_mask=FieldMask(paths=["display_name"]),
                request_id=str(uuid4()),
            ),
            metadata=(
                ("authorization", f"Bearer {session.token}"),
                ("duohuo-causal", str(metadata["duohuo-causal"])),
            ),
            timeout=10,
        )
        assert edited.profile.display_name == "Plain"


def test_watched_applications_stream_to_their_decision(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "a")
    account_id = mesh.cli.json("whoami", payer)["account_id"]
    metadata = (("authorization", f"Bearer {_token(mesh.cli, payer)}"),)
    with grpc.insecure_channel(mesh.described["centers"]["b"]["gateway"]) as channel:
        stub = transfer_service_pb2_grpc.TransferServiceStub(channel)
        stub.ApplyTransfer(
            transfer_service_pb2.ApplyTransferRequest(
                transfer_id=str(uuid4()),
                payer_account_id=account_id,
                payee_identifier=payee,
                amount=Money(currency_code="CNY", minor_units=30),
            ),
            metadata=metadata,
            timeout=10,
        )
        # A second one after the watch has begun, so that the stream shows at least one decision.
        watched = stub.WatchApplications(
            transfer_service_pb2.WatchApplicationsRequest(payer_account_id=account_id),
            metadata=metadata,
            timeout=20,
        )
        stub.ApplyTransfer(
            transfer_service_pb2.ApplyTransferRequest(
                transfer_id=str(uuid4()),
                payer_account_id=account_id,
                payee_identifier=payee,
                amount=Money(currency_code="CNY", minor_units=20),
            ),
            metadata=metadata,
            timeout=10,
        )
        states = (application.state for application in watched)
        assert transfer_service_pb2.APPLICATION_STATE_SUCCEEDED in states
        watched.cancel()


def test_a_watch_ends_with_the_session_that_opened_it(mesh: RunningMesh) -> None:
    payer = new_user(mesh.cli, "a")
    account_id = mesh.cli.json("whoami", payer)["account_id"]
    metadata = (("authorization", f"Bearer {_token(mesh.cli, payer)}"),)
    with grpc.insecure_channel(mesh.described["centers"]["b"]["gateway"]) as channel:
        watched = transfer_service_pb2_grpc.TransferServiceStub(channel).WatchApplications(
            transfer_service_pb2.WatchApplicationsRequest(payer_account_id=account_id),
            metadata=metadata,
            timeout=30,
        )
        mesh.cli.json("sessions", payer, "--revoke")
        with pytest.raises(grpc.RpcError) as ended:
            next(watched)
    assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_why_follows_an_application_into_the_center_that_decided_it(mesh: RunningMesh) -> None:
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "b")
    queued = mesh.cli.json("apply", payee, "40", "--from", payer, "--center", "b")

    def story() -> bool:
        traces = mesh.cli.json("why", queued["application_id"])["traces"]
        steps = {
            (span["name"], span["attributes"]["duohuo.center"])
            for spans in traces.values()
            for span in spans
        }
        return steps >= {
            ("transfer ApplyTransfer", "b"),
            ("attempt application", "b"),
            ("transfer Decide", "a"),
            ("store decide transfer", "a"),
            ("apply posting", "b"),
        }

    wait_until(story)


def test_an_application_that_home_does_not_know_is_not_denied(mesh: RunningMesh) -> None:
    """While its origin is cut off, nobody else can say that it does not exist."""
    payer, payee = new_user(mesh.cli, "a", 100), new_user(mesh.cli, "a")
    mesh.cli.json("link", "cut", "a", "b")
    try:
        mesh.cli.json("login", payer, "--center", "b")
        queued = mesh.cli.json("apply", payee, "40", "--from", payer, "--center", "b")
        mesh.cli.json("login", payer, "--center", "a")
        error = mesh.cli.refused("cancel", queued["application_id"], payer, "--center", "a")
        assert error["reason"] == "HOME_CENTER_UNAVAILABLE"
        assert "center b" in error["message"]
    finally:
        mesh.cli.json("link", "heal", "a", "b")


def test_a_refusal_carries_rich_details(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.described["centers"]["a"]["gateway"]) as channel:
        stub = account_service_pb2_grpc.AccountServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Register(
                account_service_pb2.RegisterRequest(
                    identifier="x@example.com", password="short", request_id=str(uuid4())
                ),
                timeout=5,
            )
    trailing: Any = refused.value.trailing_metadata()
    details = dict(trailing)["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.domain, info.metadata["ran"]) == ("duohuo", "no")
    assert bad.field_violations[0].field == "password"


def _token(cli: Cli, user: str) -> str:
    from ops.client import Sessions

    return Sessions.load(cli.state).of(user).token
