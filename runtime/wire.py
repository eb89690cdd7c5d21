"""Reads one string field out of an encoded protobuf message without decoding the rest.

https://protobuf.dev/programming-guides/encoding/
"""

_VARINT, _I64, _LENGTH_DELIMITED, _I32 = 0, 1, 2, 5


class MalformedMessage(ValueError):
    """The bytes are not a protobuf message."""


def string_field(data: bytes, number: int) -> str:
    """The value of a top-level string field; empty if absent, the last one if repeated."""
    position, value = 0, ""
    while position < len(data):
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type == _I64:
            position += 8
        elif wire_type == _I32:
            position += 4
        elif wire_type == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
            end = position + length
            if tag >> 3 == number and end <= len(data):
                try:
                    value = data[position:end].decode()
                except UnicodeDecodeError:
                    raise MalformedMessage from None
            position = end
        else:
            raise MalformedMessage
    if position != len(data):
        raise MalformedMessage
    return value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70 and position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise MalformedMessage
