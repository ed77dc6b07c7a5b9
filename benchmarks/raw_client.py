"""A client that costs as little as possible, so that a benchmark on few cores measures the server."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

from chat_load import Sample

_END = b"\r\n0\r\n\r\n"  # of a chunked response


def post(url: str, body: dict[str, Any]) -> bytes:
    """A chat request as it is sent."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


class Connection(asyncio.Protocol):
    """One connection: streamed requests, one after the other."""

    def __init__(self) -> None:
        self._received: list[bytes] = []
        self._tail = b""
        self._first = 0.0
        self._done: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, url: str) -> Connection:
        address = urlsplit(url)
        assert address.hostname and address.port
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address.hostname, address.port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        if not self._first and b"data: " in data:
            self._first = time.perf_counter()
        self._tail = (self._tail + data)[-len(_END) :]
        if self._tail == _END and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes, tokens: int) -> Sample:
        """A request for so many tokens. ConnectionError if the answer is another one."""
        self._received, self._tail, self._first = [], b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        begin = time.perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(60):
            await self._done
        end = time.perf_counter()
        answer = b"".join(self._received)
        # A token that completes no character has no text, so a real agent's events may be fewer.
        if not answer.startswith(b"HTTP/1.1 200") or b'"finish_reason":"length"' not in answer:
            raise ConnectionError(f"this is no whole answer: {answer[:500]!r}")
        return Sample(self._first - begin, end - begin, tokens, 200)

    def close(self) -> None:
        self._transport.close()
