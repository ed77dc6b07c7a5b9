"""An agent without a model, for benchmarks of what stands before agents; ``gateway.py`` starts it.

It speaks the agent's HTTP: /status and /prefixes as a busy agent reports (something is new at every poll,
no prefixes), and chat completions as server-sent events of the agent's shape and size. The first token comes
at once; at each tick of STEP seconds every stream gets one more, as from an engine that decodes all of
them in one step. Bytes are made beforehand and the server is a bare protocol, because it shares a core
with the load generator and must not be what limits a benchmark.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from urllib.parse import parse_qs, urlsplit

from blockyard.agent.prefix_sketch import PrefixReport
from blockyard.agent.protocol import AgentStatus, TierStatus

STEP = 0.02  # seconds

_HEAD = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": 1, "model": "m", "object": "chat.completion.chunk"}
_USAGE = {"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200}


def _chunk(data: str) -> bytes:
    """One chunk of a chunked response: one server-sent event."""
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _chunk(json.dumps({**_HEAD, "choices": [choice]}, separators=(",", ":")))


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
FIRST = _event({"role": "assistant", "content": ""})
TOKEN = _event({"content": " mountain"})
LAST = (
    _event({"content": " mountain"}, "length")
    + _chunk(json.dumps({**_HEAD, "choices": [], "usage": _USAGE}, separators=(",", ":")))
    + _chunk("[DONE]")
    + b"0\r\n\r\n"
)


class Agent:
    """What all connections share: the streams that wait for the next tick, and the status."""

    def __init__(self) -> None:
        self._streams: dict[asyncio.Transport, int] = {}  # tokens that are left
        self._status = AgentStatus(
            version=1,
            incarnation=uuid.uuid4().hex,
            state="ready",
            model="m",
            capacity=1 << 20,
            device_tier=TierStatus(total=1000, free=1000),
        )

    async def tick(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + STEP, loop.time())
            await asyncio.sleep(due - loop.time())
            for transport, left in list(self._streams.items()):
                if left > 1 and not transport.is_closing():
                    transport.write(TOKEN)
                    self._streams[transport] = left - 1
                else:
                    transport.write(LAST)
                    del self._streams[transport]

    def answer(self, transport: asyncio.Transport, target: str, body: bytes) -> None:
        url = urlsplit(target)
        if url.path == "/status":
            self._status = self._status.model_copy(update={"version": self._status.version + 1})
            self._send(transport, self._status.model_dump_json())
        elif url.path == "/prefixes":
            known = parse_qs(url.query).get("incarnation")
            report = PrefixReport(incarnation=self._status.incarnation, version=0, oldest=0, uses=[])
            wait = 4.0 if known == [self._status.incarnation] else 0.0
            asyncio.get_running_loop().call_later(wait, self._send, transport, report.model_dump_json())
        else:
            tokens = json.loads(body)["max_tokens"]
            if tokens == 1:
                transport.write(STREAM + FIRST + LAST)
            else:
                transport.write(STREAM + FIRST + TOKEN)
                self._streams[transport] = tokens - 1

    @staticmethod
    def _send(transport: asyncio.Transport, text: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        transport.write(f"{head}{text}".encode())


class Connection(asyncio.Protocol):
    """Requests one after the other, each with a Content-Length if it has a body."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        request, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) >= length:
            self._buffer = rest[length:]
            self._agent.answer(self._transport, request.split(" ")[1], rest[:length])


async def main() -> None:
    agent = Agent()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(agent), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await agent.tick()


if __name__ == "__main__":
    asyncio.run(main())
