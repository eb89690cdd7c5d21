"""What a caller is told when a call did not succeed, in the rich gRPC error model.

Every error has a stable reason (google.rpc.ErrorInfo, domain `duohuo`), and says whether the call
definitely did not run: only then, or when it is safe to run twice, may it be sent elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from duohuo.v1.announcement_service_pb2 import Announcement

DOMAIN = "duohuo"
CENTER_UNREACHABLE = "CENTER_UNREACHABLE"
ROLE_UNREACHABLE = "ROLE_UNREACHABLE"
"""A service of a center does not answer, and its gateway does."""
_CODES = {code.value[0]: code for code in StatusCode}


@dataclass
class RpcError(Exception):
    """A call that ended without its answer.

    `ran` is False when the call definitely had no effect; True means that it may have had one.
    """

    code: StatusCode
    reason: str
    message: str
    ran: bool = False
    retry_after_ms: int | None = None
    advice: str = ""
    field_name: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    announcements: Sequence[Announcement] = ()
    """What users are told of the outage that this comes from."""
    answered: bool = field(default=False, compare=False)
    """Whoever was asked has said this. That somebody else is unreachable says nothing against it."""

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}: {self.message}"

    def to_status(self) -> status_pb2.Status:
        """The google.rpc.Status that travels in `grpc-status-details-bin`."""
        packed: list[AnyMessage] = []
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)
        info.metadata.update(self.details)
        info.metadata["ran"] = "maybe" if self.ran else "no"
        parts: list[
            error_details_pb2.ErrorInfo
            | error_details_pb2.RetryInfo
            | error_details_pb2.BadRequest
            | error_details_pb2.LocalizedMessage
            | Announcement
        ] = [info]
        if self.retry_after_ms is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(self.retry_after_ms)
            parts.append(retry)
        if self.field_name:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field_name, description=self.message
            )
            parts.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.advice:
            parts.append(error_details_pb2.LocalizedMessage(locale="en", message=self.advice))
        parts += self.announcements
        for part in parts:
            wrapped = AnyMessage()
            wrapped.Pack(part)
            packed.append(wrapped)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)

    @classmethod
    def from_status(cls, status: status_pb2.Status) -> "RpcError":
        """The inverse of `to_status`. An error without our details may have run."""
        code = _CODES.get(status.code, StatusCode.UNKNOWN)
        error = cls(code, "", status.message, ran=True, answered=True)
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad = error_details_pb2.BadRequest()
        localized = error_details_pb2.LocalizedMessage()
        announcements: list[Announcement] = []
        for detail in status.details:
            if detail.Unpack(info):
                error.reason = info.reason
                error.ran = info.metadata.get("ran") != "no"
                error.details = {k: v for k, v in info.metadata.items() if k != "ran"}
            elif detail.Unpack(retry):
                error.retry_after_ms = retry.retry_delay.ToMilliseconds()
            elif detail.Unpack(bad) and bad.field_violations:
                error.field_name = bad.field_violations[0].field
            elif detail.Unpack(localized):
                error.advice = localized.message
            elif detail.Is(Announcement.DESCRIPTOR):
                announcements.append(Announcement.FromString(detail.value))
        error.announcements = tuple(announcements)
        return error


def invalid(field_name: str, message: str, reason: str = "INVALID_FIELD") -> RpcError:
    """The request is wrong and must be changed before it is sent again."""
    return RpcError(StatusCode.INVALID_ARGUMENT, reason, message, field_name=field_name)


def is_silence(error: RpcError) -> bool:
    """Has whoever was asked not answered at all?"""
    return error.reason == CENTER_UNREACHABLE and not error.answered


def unreachable(center: str, *, ran: bool) -> RpcError:
    """The center did not answer."""
    return RpcError(
        StatusCode.UNAVAILABLE,
        CENTER_UNREACHABLE,
        f"center {center} did not answer",
        ran=ran,
        retry_after_ms=1000,
    )


def session_invalid() -> RpcError:
    """The one answer to every token that is not a live session, whatever is wrong with it."""
    return RpcError(
        StatusCode.UNAUTHENTICATED,
        "SESSION_INVALID",
        "the session is unknown, expired or ended",
        advice="Log in again.",
    )
