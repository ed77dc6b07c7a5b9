"""The protocol between the two processes of an agent: messages survive encoding, other bytes are refused."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Iterable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard.agent.messages import Abort, Command, Event, Failed, Outputs
from blockyard.agent.wire import LENGTH, MAX_BYTES, WireError, commands, events, frame

NUMBERS = st.floats(allow_nan=False)
COUNTS = st.integers(min_value=-(2**63), max_value=2**63 - 1)
st.register_type_strategy(float, NUMBERS)
st.register_type_strategy(int, COUNTS)


def received_commands(data: bytes) -> list[Command]:
    return list(commands(io.BytesIO(data)))


def received_events(data: bytes) -> list[Event]:
    async def receive() -> list[Event]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return [event async for event in events(reader)]

    return asyncio.run(receive())


def wire(messages: Iterable[Any]) -> bytes:
    return b"".join(map(frame, messages))


@pytest.mark.parametrize("kind", get_args(Command))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_commands_arrive_as_they_were_sent(kind: type[Any], data: st.DataObject) -> None:
    sent = data.draw(st.lists(st.from_type(kind), min_size=1, max_size=3))
    assert received_commands(wire(sent)) == sent


@pytest.mark.parametrize("kind", get_args(Event))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_events_arrive_as_they_were_sent(kind: type[Any], data: st.DataObject) -> None:
    sent = data.draw(st.lists(st.from_type(kind), min_size=1, max_size=3))
    assert received_events(wire(sent)) == sent


@pytest.mark.parametrize("receive", [received_commands, received_events])
def test_the_end_between_messages_is_the_end_and_within_one_is_an_error(receive: Any) -> None:
    message: Any = Abort("r1", 2) if receive is received_commands else Failed("why", config=True)
    whole = frame(message)
    assert receive(b"") == []
    assert receive(whole + whole) == [message, message]
    for end in range(1, len(whole)):
        with pytest.raises(WireError, match="ends after"):
            receive(whole + whole[:end])


@pytest.mark.parametrize("receive", [received_commands, received_events])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (LENGTH.pack(0), "no message"),
        (LENGTH.pack(MAX_BYTES + 1), "at most"),
        (b"GET / HTTP/1.1\r\n\r\n", "at most"),
        (LENGTH.pack(1) + b"\xc1", "no message"),
        (LENGTH.pack(7) + msgspec.msgpack.encode("foreign")[:7], "no message"),
    ],
)
def test_what_is_no_message_is_an_error(receive: Any, data: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        receive(data)


def test_the_directions_cannot_be_mixed_up() -> None:
    with pytest.raises(WireError):
        received_events(frame(Abort("r1")))
    with pytest.raises(WireError):
        received_commands(frame(Outputs([])))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_arbitrary_bytes_never_do_anything_else(data: bytes) -> None:
    for receive in (received_commands, received_events):
        with contextlib.suppress(WireError):
            receive(data)
