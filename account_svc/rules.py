"""What a request must look like, and which profile fields it changes. Plain functions."""

from collections.abc import Iterable

from grpc import StatusCode

from account_svc import password_rules
from duohuo.v1.account_service_pb2 import Profile, RegisterRequest, UpdateProfileRequest
from runtime.errors import RpcError, invalid
from runtime.identifiers import InvalidIdentifier, normalise
from runtime.ids import is_client_made

REQUESTS_KEPT_MS = 40 * 24 * 3600 * 1000
"""How long a request id of a profile or password is remembered: 30 days are promised, and clocks lie."""
IDENTIFIERS_MAX = 8
"""So many may belong to an account. Centers that do not see each other may go beyond it a little."""
PROFILE_FIELD_LENGTH_MAX = {"display_name": 64, "language": 35, "time_zone": 64}


def check_identifier(identifier: str) -> str:
    """The identifier in its normal form. Raises RpcError."""
    try:
        return normalise(identifier)
    except InvalidIdentifier:
        raise invalid(
            "identifier", "must be an e-mail address or a phone number such as +8613912345678"
        ) from None


def check_request_id(request_id: str) -> None:
    if not is_client_made(request_id):
        raise invalid("request_id", "must be 8 to 64 letters, digits, '-' or '_'")


def check_register(request: RegisterRequest) -> str:
    """The normalised identifier of a registration that is in order. Raises RpcError."""
    check_request_id(request.request_id)
    identifier = check_identifier(request.identifier)
    password_rules.check("password", request.password, identifier)
    _check_field("display_name", request.display_name)
    return identifier


def identifier_taken() -> RpcError:
    return RpcError(StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN", "this identifier has an account")


def idempotency_conflict() -> RpcError:
    return RpcError(
        StatusCode.ALREADY_EXISTS,
        "IDEMPOTENCY_CONFLICT",
        "this id already names something else; the first one stands",
    )


def changed_fields(request: UpdateProfileRequest) -> dict[str, str]:
    """The profile fields a request sets, by name. Raises RpcError."""
    check_request_id(request.request_id)
    if not request.update_mask.paths:
        raise invalid("update_mask", "must name at least one profile field")
    fields = {}
    for path in request.update_mask.paths:
        if path not in PROFILE_FIELD_LENGTH_MAX:
            raise invalid(
                "update_mask", f"may name only {', '.join(sorted(PROFILE_FIELD_LENGTH_MAX))}"
            )
        value: str = getattr(request.profile, path)
        _check_field(path, value)
        fields[path] = value
    return fields


def profile_of(fields: Iterable[tuple[str, str]]) -> Profile:
    """A profile from its stored fields; fields of a newer version are left out."""
    return Profile(**{name: value for name, value in fields if name in PROFILE_FIELD_LENGTH_MAX})


def _check_field(name: str, value: str) -> None:
    if len(value) > PROFILE_FIELD_LENGTH_MAX[name]:
        raise invalid(name, f"must have at most {PROFILE_FIELD_LENGTH_MAX[name]} characters")
