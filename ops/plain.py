"""Protobuf messages as plain data for `-o json`: numbers as numbers, times as ISO 8601, short enums."""

from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def plain(message: Message) -> Any:
    """A message as a dictionary; unset messages and oneofs are left out."""
    if isinstance(message, Timestamp):
        return message.ToJsonString()
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(value)
        elif field.is_repeated:
            found[field.name] = [_value(field, item) for item in value]
        else:
            found[field.name] = _value(field, value)
    return found


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    return _enum_name(field.enum_type, value) if field.enum_type is not None else value


def _enum_name(enum: Any, value: int) -> str:
    """QUEUED for APPLICATION_STATE_QUEUED."""
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    known = enum.values_by_number.get(value)
    return known.name.removeprefix(prefix) if known else str(value)
