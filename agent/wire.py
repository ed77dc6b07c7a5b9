"""Messages as bytes: a length, then msgpack. The same on both ends of the socket."""

from __future__ import annotations

import struct

import msgspec

from .messages import Command, Event

LENGTH = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_events = msgspec.msgpack.Decoder(Event)


def frame(message: Command | Event) -> bytes:
    """One message, ready to be sent."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def decode_command(body: bytes) -> Command:
    return _commands.decode(body)  # type: ignore[no-any-return]


def decode_event(body: bytes) -> Event:
    return _events.decode(body)  # type: ignore[no-any-return]
