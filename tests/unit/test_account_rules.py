"""What a registration and a profile must look like."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from account_svc import rules
from duohuo.v1.account_service_pb2 import Profile, RegisterRequest, UpdateProfileRequest
from runtime.errors import RpcError


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, ""),
        ({"password": "x" * 8}, ""),
        ({"password": "密" * 128}, ""),
        ({"display_name": ""}, ""),
        ({"display_name": "名" * 64}, ""),
        ({"password": "x" * 7}, "password"),
        ({"password": "x" * 129}, "password"),
        ({"display_name": "x" * 65}, "display_name"),
        ({"identifier": "alice"}, "identifier"),
        ({"identifier": ""}, "identifier"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "has spaces"}, "request_id"),
    ],
    ids=str,
)
def test_a_registration_is_in_order_or_names_the_wrong_field(
    changes: dict[str, str], field: str
) -> None:
    good = {"identifier": " Alice@Example.com", "password": "p" * 12, "request_id": "request-1"}
    request = RegisterRequest(**{**good, **changes})
    if field:
        with pytest.raises(RpcError) as refused:
            rules.check_register(request)
        assert refused.value.field_name == field
        assert request.password not in str(refused.value)
    else:
        assert rules.check_register(request) == "alice@example.com"


@pytest.mark.parametrize(
    ("paths", "changed"),
    [
        (["display_name"], {"display_name": "Alice"}),
        (["language", "display_name"], {"display_name": "Alice", "language": "fr"}),
        (["time_zone"], {"time_zone": ""}),
        (["display_name", "display_name"], {"display_name": "Alice"}),
        ([], None),
        (["account_id"], None),
        (["*"], None),
        (["profile.display_name"], None),
        (["display_name", "password_hash"], None),
    ],
)
def test_exactly_the_named_profile_fields_change(
    paths: list[str], changed: dict[str, str] | None
) -> None:
    """A named field that is not given is emptied; one that is given but not named is left alone."""
    request = UpdateProfileRequest(
        profile=Profile(display_name="Alice", language="fr"),
        update_mask=FieldMask(paths=paths),
        request_id="request-1",
    )
    if changed is None:
        with pytest.raises(RpcError) as refused:
            rules.changed_fields(request)
        assert refused.value.field_name == "update_mask"
    else:
        assert rules.changed_fields(request) == changed


def test_a_field_of_a_newer_version_is_left_out() -> None:
    fields = [("display_name", "Alice"), ("shoe_size", "42")]
    assert rules.profile_of(fields) == Profile(display_name="Alice")
