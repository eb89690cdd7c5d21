"""Every field that users and operators may send has a rule in its .proto, and the rule is held."""

from collections.abc import Iterator
from typing import Any

import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc import StatusCode

from duohuo.v1.operator_service_pb2 import (
    EntryName,
    FreezeAccountRequest,
    RetryParkedRequest,
)
from duohuo.v1.transfer_service_pb2 import ListEntriesRequest
from runtime.dispatcher import Dispatcher
from runtime.endpoint import ACCOUNT, Call
from runtime.errors import RpcError
from runtime.hlc import HybridClock
from runtime.methods import OPERATOR_FILES, PUBLIC_FILES, Method, methods_in
from tests.fakes import FakeClock
from tests.unit.test_ownership import Everything

METHODS = list(methods_in((*PUBLIC_FILES, *OPERATOR_FILES)).values())
WITHOUT = {
    "duohuo.v1.Money.minor_units": "AMOUNT refuses it, and LIMIT what is above a limit",
}
"""Fields whose rule is elsewhere, as it has a reason of its own."""
CANARY = "kanarie" * 1000


def fields_of(message: Any, seen: frozenset[str] = frozenset()) -> Iterator[Any]:
    """Of a message and of all those of ours inside it."""
    for field in message.fields:
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry:
            yield field
        elif inner.file.package.startswith("duohuo") and inner.full_name not in seen:
            yield from fields_of(inner, seen | {inner.full_name})


@pytest.mark.parametrize("called", METHODS, ids=lambda one: one.path)
def test_every_field_has_a_rule(called: Method) -> None:
    without = {
        field.full_name
        for field in fields_of(called.request_type.DESCRIPTOR)
        if not field.GetOptions().HasExtension(validate_pb2.field)
        and field.type != FieldDescriptor.TYPE_BOOL
    }
    assert without <= WITHOUT.keys()


def too_long(message: Message) -> Iterator[tuple[str, Message]]:
    """The message with one text of it too long, for each; and where that is."""
    for field in message.DESCRIPTOR.fields:
        made = type(message)()
        if field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                getattr(made, field.name).append(CANARY)
                yield field.name, made
            else:
                setattr(made, field.name, CANARY)
                yield field.name, made
        elif field.message_type is not None and not field.is_repeated:
            if not field.message_type.file.package.startswith("duohuo"):
                continue
            for path, inner in too_long(getattr(made, field.name)):
                whole = type(message)()
                getattr(whole, field.name).CopyFrom(inner)
                yield f"{field.name}.{path}", whole


@pytest.mark.parametrize(
    ("called", "path", "request_"),
    [(one, path, made) for one in METHODS for path, made in too_long(one.request_type())],
    ids=lambda part: part if isinstance(part, str) else getattr(part, "name", ""),
)
async def test_text_that_is_too_long_is_refused_before_anything_is_done(
    called: Method, path: str, request_: Message
) -> None:
    dispatcher = Dispatcher("a", HybridClock(FakeClock()))
    dispatcher.add(called.service, Everything())
    call = Call(called, request_.SerializeToString(), 1.0, {ACCOUNT: CANARY})
    answering = anext(dispatcher.stream(call)) if called.streams else dispatcher.unary(call)
    with pytest.raises(RpcError) as refused:
        await answering
    error = refused.value
    assert (error.code, error.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert error.field_name == path
    assert "kanarie" not in str(error.to_status())


@pytest.mark.parametrize(
    ("called", "request_", "path"),
    [
        ("TransferService/ListEntries", ListEntriesRequest(page_size=1001), "page_size"),
        ("OperatorService/FreezeAccount", FreezeAccountRequest(version=-1), "version"),
        (
            "OperatorService/RetryParked",
            RetryParkedRequest(name=EntryName(seq=-1)),
            "name.seq",
        ),
    ],
)
async def test_numbers_have_their_range(called: str, request_: Message, path: str) -> None:
    declared = next(one for one in METHODS if one.path.endswith(called))
    dispatcher = Dispatcher("a", HybridClock(FakeClock()))
    dispatcher.add(declared.service, Everything())
    with pytest.raises(RpcError) as refused:
        await dispatcher.unary(Call(declared, request_.SerializeToString(), 1.0))
    assert (refused.value.reason, refused.value.field_name) == ("INVALID_FIELD", path)
