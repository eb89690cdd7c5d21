"""The gateway and the services read the same key from the same bytes."""

from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import example, given
from hypothesis import strategies as st

from duohuo.v1.account_service_pb2 import RegisterRequest, UpdateProfileRequest
from duohuo.v1.session_service_pb2 import LoginRequest
from duohuo.v1.transfer_service_pb2 import (
    ApplyTransferRequest,
    ListApplicationsRequest,
    TransferRequest,
)
from runtime.wire import MalformedMessage, string_field

REQUESTS: list[type[Message]] = [
    RegisterRequest,
    UpdateProfileRequest,
    LoginRequest,
    TransferRequest,
    ApplyTransferRequest,
    ListApplicationsRequest,
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: texts,
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
}


def fields_of(kind: type[Message]) -> list[Any]:
    """The fields of a message type, whichever implementation of protobuf describes them."""
    return list(kind.DESCRIPTOR.fields)


def string_fields(kind: type[Message]) -> list[Any]:
    """Those that could be a key: not one of a oneof, whose members displace each other."""
    return [
        field
        for field in fields_of(kind)
        if field.type == FieldDescriptor.TYPE_STRING and field.containing_oneof is None
    ]


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        one: st.SearchStrategy[Any] = messages(GetMessageClass(field.message_type))
    else:
        one = SCALARS[field.type]
    return st.lists(one, max_size=3) if field.is_repeated else one


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> Message:
    """Any message of a type, with any of its fields set."""
    wanted = draw(st.lists(st.sampled_from(fields_of(kind)), unique_by=lambda field: field.name))
    return kind(**{field.name: draw(values(field)) for field in wanted})


requests = st.sampled_from(REQUESTS).flatmap(messages)


@given(requests)
def test_every_string_field_is_read_as_protobuf_reads_it(request: Message) -> None:
    for field in string_fields(type(request)):
        found = string_field(request.SerializeToString(), field.number)
        assert found == getattr(request, field.name)


@given(st.sampled_from(REQUESTS), st.lists(requests, min_size=1, max_size=3), st.data())
def test_whatever_both_parsers_accept_they_read_alike(
    read_as: type[Message], written: list[Message], data: st.DataObject
) -> None:
    """Bytes of other types, repeated fields, and bytes damaged in one place."""
    encoded = bytearray(b"".join(message.SerializeToString() for message in written))
    if encoded and data.draw(st.booleans()):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = read_as.FromString(bytes(encoded))
        found = {f.name: string_field(bytes(encoded), f.number) for f in string_fields(read_as)}
    except (DecodeError, MalformedMessage):
        return
    assert found == {name: getattr(parsed, name) for name in found}


@given(st.binary(max_size=60), st.integers(1, 20))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 1)
@example(b"\xff" * 11, 1)
def test_random_bytes_are_read_or_malformed(data: bytes, number: int) -> None:
    try:
        found = string_field(data, number)
    except MalformedMessage:
        return
    assert found.encode() in data


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05ab",
        b"\x08",
        b"\x08\x80",
        b"\x09123",
        b"\x0d123",
        b"\x0a\x01\xff",
        b"\x0b",
    ],
    ids=["no length", "short", "no varint", "open varint", "i64", "i32", "no UTF-8", "group"],
)
def test_a_broken_message_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        string_field(data, 1)


def test_of_a_repeated_field_the_last_counts() -> None:
    first, last = RegisterRequest(identifier="first"), RegisterRequest(identifier="last")
    assert string_field(first.SerializeToString() + last.SerializeToString(), 1) == "last"
