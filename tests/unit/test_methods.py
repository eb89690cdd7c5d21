"""The .proto files declare all that the gateway must know, for every RPC of the design."""

import pytest
from google.protobuf.descriptor import FieldDescriptor

from duohuo.v1.routing_pb2 import (
    ACCESS_OPERATOR,
    ACCESS_PEER,
    ACCESS_PUBLIC,
    ACCESS_UNSPECIFIED,
    ACCESS_USER,
    ACCESS_VIEWER,
    POLICY_HOME,
    POLICY_HOME_FIRST,
    POLICY_LOCAL,
    POLICY_LOCAL_FIRST,
    POLICY_LOCAL_THEN_HOME,
    POLICY_ORIGIN,
    POLICY_ORIGIN_THEN_HOME,
    POLICY_UNSPECIFIED,
    Policy,
)
from runtime.config import ROLES
from runtime.methods import (
    OPERATOR_FILES,
    PEER_FILES,
    PUBLIC_FILES,
    Method,
    method,
    methods_in,
    peer_method,
    service_methods,
)

PUBLIC, OPERATOR, PEER = map(methods_in, (PUBLIC_FILES, OPERATOR_FILES, PEER_FILES))
EVERY = [*PUBLIC.values(), *OPERATOR.values(), *PEER.values()]
every_rpc = pytest.mark.parametrize("declared", EVERY, ids=lambda declared: declared.path)
public_rpcs = pytest.mark.parametrize("declared", PUBLIC.values(), ids=lambda one: one.path)

# Section 9 of the design: RPC, request fields, response, response fields.
TRANSFER = "transfer_id payer_account_id payee_account_id payee_identifier amount memo"
DESIGNED = [
    ("AccountService/Register", "identifier password display_name request_id", "Account", ""),
    ("AccountService/AddIdentifier", "account_id identifier request_id", "Account", ""),
    ("AccountService/RemoveIdentifier", "account_id identifier request_id", "Account", ""),
    ("AccountService/GetAccount", "account_id", "Account", ""),
    ("AccountService/ExportAccount", "account_id", "AccountExport", "account notification values"),
    ("AccountService/UpdateProfile", "account_id profile update_mask request_id", "Account", ""),
    (
        "AccountService/ChangePassword",
        "account_id old_password new_password request_id",
        "ChangePasswordResponse",
        "",
    ),
    (
        "AccountService/GetNotification",
        "account_id",
        "Notification",
        "webhook_url webhook_secret_set email",
    ),
    (
        "AccountService/SetNotification",
        "account_id webhook_url webhook_secret email request_id",
        "Notification",
        "",
    ),
    (
        "SessionService/Login",
        "identifier password device",
        "Session",
        "token account_id origin_center expire_time",
    ),
    ("SessionService/GetSession", "token", "Session", ""),
    ("SessionService/ListSessions", "account_id", "ListSessionsResponse", "sessions"),
    ("SessionService/Logout", "token", "LogoutResponse", ""),
    ("SessionService/RevokeSession", "account_id", "RevokeSessionResponse", ""),
    ("SessionService/RevokeSessions", "account_id", "RevokeSessionsResponse", ""),
    ("TransferService/GetBalance", "account_id", "Balance", "balance available stale as_of"),
    ("TransferService/Transfer", TRANSFER, "TransferResult", ""),
    (
        "TransferService/ReserveFunds",
        "hold_id payer_account_id payee_account_id payee_identifier amount memo expire_time",
        "Hold",
        "hold_id state amount expire_time captured transfer_id",
    ),
    (
        "TransferService/CaptureHold",
        "payer_account_id hold_id transfer_id amount",
        "CaptureHoldResponse",
        "hold transfer",
    ),
    ("TransferService/ReleaseHold", "payer_account_id hold_id", "Hold", "state"),
    (
        "TransferService/ApplyTransfer",
        f"{TRANSFER} expire_time",
        "Application",
        "application_id state reason attempts",
    ),
    ("TransferService/GetApplication", "application_id", "Application", ""),
    ("TransferService/ListApplications", "payer_account_id", "ListApplicationsResponse", ""),
    ("TransferService/WatchApplications", "payer_account_id", "Application", ""),
    ("TransferService/CancelApplication", "application_id", "Application", ""),
    ("TransferService/ListEntries", "account_id", "ListEntriesResponse", "entries"),
    ("AnnouncementService/ListAnnouncements", "", "ListAnnouncementsResponse", "announcements"),
    ("AnnouncementService/WatchAnnouncements", "", "ListAnnouncementsResponse", "announcements"),
]


@pytest.mark.parametrize(
    ("path", "asked", "response", "answered"), DESIGNED, ids=[row[0] for row in DESIGNED]
)
def test_every_rpc_of_the_design_exists(
    path: str, asked: str, response: str, answered: str
) -> None:
    declared = PUBLIC[f"/duohuo.v1.{path}"]
    assert set(asked.split()) <= set(declared.request_type.DESCRIPTOR.fields_by_name)
    assert declared.response_type.DESCRIPTOR.name == response
    assert set(answered.split()) <= set(declared.response_type.DESCRIPTOR.fields_by_name)


def test_no_rpc_is_public_that_the_design_does_not_name() -> None:
    assert set(PUBLIC) == {f"/duohuo.v1.{path}" for path, *_ in DESIGNED}


# Section 3 of the design.
@pytest.mark.parametrize(
    ("path", "policy"),
    [
        ("AccountService/Register", POLICY_HOME),
        ("SessionService/Login", POLICY_LOCAL_FIRST),
        ("SessionService/GetSession", POLICY_ORIGIN),
        ("AccountService/GetAccount", POLICY_LOCAL_THEN_HOME),
        ("AccountService/ExportAccount", POLICY_LOCAL_THEN_HOME),
        ("AccountService/UpdateProfile", POLICY_HOME_FIRST),
        ("AccountService/AddIdentifier", POLICY_HOME_FIRST),
        ("AccountService/RemoveIdentifier", POLICY_HOME_FIRST),
        ("AccountService/ChangePassword", POLICY_HOME_FIRST),
        ("TransferService/GetBalance", POLICY_HOME_FIRST),
        ("TransferService/Transfer", POLICY_HOME),
        ("TransferService/ReserveFunds", POLICY_HOME),
        ("TransferService/CaptureHold", POLICY_HOME),
        ("TransferService/ReleaseHold", POLICY_HOME),
        ("TransferService/ApplyTransfer", POLICY_LOCAL_FIRST),
        ("TransferService/GetApplication", POLICY_ORIGIN_THEN_HOME),
        ("TransferService/CancelApplication", POLICY_ORIGIN_THEN_HOME),
    ],
)
def test_each_request_goes_where_the_design_sends_it(path: str, policy: Policy.ValueType) -> None:
    assert method(f"/duohuo.v1.{path}").policy == policy


@every_rpc
def test_every_rpc_declares_policy_access_and_a_role(declared: Method) -> None:
    assert declared.policy != POLICY_UNSPECIFIED
    assert declared.access != ACCESS_UNSPECIFIED
    assert declared.role in ROLES


@every_rpc
def test_key_and_owner_are_strings_of_the_request(declared: Method) -> None:
    fields = declared.request_type.DESCRIPTOR.fields_by_name
    for name in filter(None, (declared.key, declared.owner)):
        assert fields[name].type == FieldDescriptor.TYPE_STRING
        assert not fields[name].is_repeated
    if declared.policy != POLICY_LOCAL:
        assert declared.key_number == fields[declared.key].number


@public_rpcs
def test_a_users_rpc_is_bound_to_the_caller(declared: Method) -> None:
    """By its owner, or by an application id, whose payer the service compares with the caller."""
    assert declared.access in (ACCESS_PUBLIC, ACCESS_USER)
    if declared.access == ACCESS_USER:
        assert declared.owner or declared.key == "application_id"
        assert not declared.owner or declared.owner == declared.key


@public_rpcs
def test_only_a_login_may_not_be_repeated(declared: Method) -> None:
    """Everything else reads, ends something, or carries an id that makes it happen once."""
    assert declared.safe_to_repeat is (declared.name != "Login")


@pytest.mark.parametrize("name", ["WatchApplications", "WatchAnnouncements"])
def test_what_is_watched_streams(name: str) -> None:
    assert [one.streams for one in PUBLIC.values() if one.name == name] == [True]
    assert sum(one.streams for one in PUBLIC.values()) == 2


OPERATOR_NAMES = {one.name for one in OPERATOR.values()}


def test_operators_and_peers_have_rpcs_of_their_own() -> None:
    looks = {one.name for one in OPERATOR.values() if one.access == ACCESS_VIEWER}
    assert looks == {
        name for name in OPERATOR_NAMES if name.startswith(("Get", "List", "Find", "Count"))
    }
    acts = {one.name for one in OPERATOR.values() if one.access == ACCESS_OPERATOR}
    assert looks | acts == OPERATOR_NAMES
    assert {one.access for one in PEER.values()} == {ACCESS_PEER}
    assert {one.policy for one in [*OPERATOR.values(), *PEER.values()]} == {POLICY_LOCAL}


@pytest.mark.parametrize("role", ["account", "session", "transfer"])
def test_every_service_has_a_log_to_read_and_can_be_inspected(role: str) -> None:
    for name in ("Exchange", "Pull", "Inspect", "CollectFacts"):
        assert peer_method(role, name).role == role


def test_what_is_not_declared_is_not_found() -> None:
    with pytest.raises(KeyError):
        method("/duohuo.v1.AccountService/Nothing")
    with pytest.raises(LookupError):
        service_methods("duohuo.v1.NothingService")
