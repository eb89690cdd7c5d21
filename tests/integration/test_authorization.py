"""Nobody acts for another, and no port serves what it is not for: of every RPC, from the descriptors."""

import json
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from duohuo.v1.routing_pb2 import ACCESS_USER
from ops.drill import identifier_of
from runtime.ids import RandomIds, account_id, account_slot, application_id, place_of
from runtime.methods import OPERATOR_FILES, PEER_FILES, PUBLIC_FILES, Method, methods_in
from tests.integration.conftest import RunningMesh

USERS = [one for one in methods_in(PUBLIC_FILES).values() if one.access == ACCESS_USER]
ACCOUNTS_OWN = [one for one in USERS if one.owner]
APPLICATIONS_OWN = [one for one in USERS if not one.owner]
Metadata = tuple[tuple[str, str], ...]
Outcome = tuple[str, str, str]
"""Code, reason and message."""


@dataclass
class People:
    """Alice, whose account others want, and Mallory, who is logged in; at home in different centers."""

    mesh: RunningMesh
    alice: str
    mallory: str
    token: str
    application: str

    def call(
        self, called: Method, key: str, metadata: Metadata = (), port: str = "gateway"
    ) -> Outcome:
        """What a call about somebody or something comes to, at center b."""
        request: Any = called.request_type()
        if called.key:
            setattr(request, called.key, key)
        if called.owner:
            setattr(request, called.owner, key)
        address = self.mesh.described["centers"]["b"][port]
        with grpc.insecure_channel(address) as channel:
            call: Any = (channel.unary_stream if called.streams else channel.unary_unary)(
                called.path
            )
            try:
                answer = call(request.SerializeToString(), timeout=5, metadata=metadata)
                if called.streams:
                    next(answer)
            except grpc.RpcError as error:
                return _outcome(error)
        return "OK", "", ""

    @property
    def as_mallory(self) -> Metadata:
        return (("authorization", f"Bearer {self.token}"),)


def _outcome(error: Any) -> Outcome:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            status_pb2.Status.FromString(value).details[0].Unpack(info)
            return error.code().name, info.reason, error.details()
    return error.code().name, "", error.details()


@pytest.fixture(scope="module")
def people(mesh: RunningMesh) -> People:
    cli, identifiers = mesh.cli, [identifier_of(center, ["a", "b"]) for center in "ab"]
    alice, mallory = (cli.json("register", one)["account_id"] for one in identifiers)
    cli.json("login", identifiers[0])
    applied = cli.json("apply", identifiers[1], "5", "--from", identifiers[0])
    cli.json("login", identifiers[1], "--center", "b")
    logins = json.loads((cli.state / "sessions.json").read_text())["logins"]
    return People(mesh, alice, mallory, logins[identifiers[1]]["token"], applied["application_id"])


def _like(account: str) -> str:
    """An account id of the same slot that nobody has."""
    slot = account_slot(account)
    assert slot is not None
    return account_id(slot, RandomIds().unique())


def _named(called: Method) -> str:
    return called.name


@pytest.mark.parametrize("called", ACCOUNTS_OWN, ids=_named)
def test_nobody_acts_on_anothers_account_or_learns_whether_it_exists(
    people: People, called: Method
) -> None:
    refused = people.call(called, people.alice, people.as_mallory)
    assert refused[:2] == ("PERMISSION_DENIED", "NOT_YOURS")
    assert people.call(called, _like(people.alice), people.as_mallory) == refused


@pytest.mark.parametrize("called", APPLICATIONS_OWN, ids=_named)
def test_anothers_application_is_as_if_it_were_not_there(people: People, called: Method) -> None:
    place = place_of(people.application)
    assert place is not None
    assert place.origin is not None
    assert place.slot is not None
    nobodys = application_id(place.origin, place.slot, RandomIds().unique())
    refused = people.call(called, people.application, people.as_mallory)
    assert refused[0] == "NOT_FOUND"
    assert people.call(called, nobodys, people.as_mallory) == refused


@pytest.mark.parametrize("called", USERS, ids=_named)
def test_only_a_session_says_who_calls(people: People, called: Method) -> None:
    """The mesh's own metadata counts for nothing at the users' port."""
    claims = (("duohuo-account", people.alice), ("duohuo-gateway", "a"), ("duohuo-session", "a-1"))
    key = people.alice if called.owner else people.application
    assert people.call(called, key, claims)[:2] == ("UNAUTHENTICATED", "SESSION_REQUIRED")
    refused = people.call(called, key, (*claims, *people.as_mallory))
    assert refused[0] in ("PERMISSION_DENIED", "NOT_FOUND")


@pytest.mark.parametrize(
    ("port", "files"),
    [
        ("gateway", (*OPERATOR_FILES, *PEER_FILES)),
        ("operator", (*PUBLIC_FILES, *PEER_FILES)),
    ],
    ids=["users' port", "operators' port"],
)
def test_no_port_serves_what_it_is_not_for(people: People, port: str, files: Any) -> None:
    for called in methods_in(files).values():
        assert people.call(called, people.mallory, people.as_mallory, port)[0] == "UNIMPLEMENTED"


@pytest.mark.parametrize("called", methods_in(OPERATOR_FILES).values(), ids=_named)
def test_users_are_no_operators(people: People, called: Method) -> None:
    for metadata in ((), people.as_mallory, (("duohuo-operator", "root"),)):
        refused = people.call(called, people.mallory, metadata, "operator")
        assert refused[0] == "UNAUTHENTICATED"
