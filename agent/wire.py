"""Messages as bytes: a length, then msgpack; the same on both ends of the socket.

The other end may close the socket between two messages: that is a normal end. Anything else is a
``WireError``.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator
from typing import BinaryIO, TypeVar

import msgspec

from .messages import Command, Event

T = TypeVar("T")
LENGTH = struct.Struct("<I")
MAX_BYTES = 1 << 28  # far above any real message: a larger length means that the bytes are not ours

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_events = msgspec.msgpack.Decoder(Event)


class WireError(Exception):
    """The bytes are no message of this protocol, or only a part of one."""


def frame(message: Command | Event) -> bytes:
    """One message, ready to be sent."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def commands(stream: BinaryIO) -> Iterator[Command]:
    """What the HTTP process sends, until it closes its end. WireError."""
    while header := stream.read(LENGTH.size):
        size = _size(header)
        body = stream.read(size)
        if len(body) < size:
            raise WireError(f"a message ends after {len(body)} of {size} bytes")
        yield _decode(_commands, body)


async def events(reader: asyncio.StreamReader) -> AsyncIterator[Event]:
    """What the engine process sends, until its end is closed. WireError."""
    while True:
        try:
            header = await reader.readexactly(LENGTH.size)
        except asyncio.IncompleteReadError as end:
            if not end.partial:
                return
            header = end.partial
        size = _size(header)
        try:
            body = await reader.readexactly(size)
        except asyncio.IncompleteReadError as end:
            raise WireError(f"a message ends after {len(end.partial)} of {size} bytes") from None
        yield _decode(_events, body)


def _size(header: bytes) -> int:
    if len(header) < LENGTH.size:
        raise WireError(f"a length ends after {len(header)} of {LENGTH.size} bytes")
    size = int(LENGTH.unpack(header)[0])
    if size > MAX_BYTES:
        raise WireError(f"a message of {size} bytes is announced; at most {MAX_BYTES} are possible")
    return size


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise WireError(f"this is no message: {error}") from None
