"""Plain sockets: clients that break the protocol, or shut down one side of a connection."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

LIMIT = 60.0  # seconds

# What anybody can send, and no server should call an error of its own.
GET, POST = b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST /tokenize HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
MALFORMED = {
    "too many headers": GET + b"".join(b"X-%d: y\r\n" % number for number in range(2000)) + b"\r\n",
    "two lengths": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n",
    "another version": b"GET /healthz HTTP/9.x\r\nHost: a\r\n\r\n",
    "a long line": b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bad header": GET + b"Bad Header\x00: x\r\n\r\n",
    "a bad length": POST + b"Content-Length: -4\r\n\r\n",
    "a bad chunk": POST + CHUNKED + b"\r\nzz\r\nhello\r\n\r\n",
    "a line break in the path": b"GET /a\rb HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bad escape": b"GET /%zz%f HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bad expectation": POST + b"Expect: miracles\r\nContent-Length: 2\r\n\r\n{}",
}


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname or "", where.port or 80), timeout=LIMIT)


def exchange(url: str, sent: bytes, *, half_close: bool = False) -> bytes:
    """All that comes back until the server closes the connection."""
    with connect(url) as client:
        client.sendall(sent)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while data := client.recv(1 << 16):
                received += data
                if not half_close and b"\r\n\r\n" in received:
                    break
        except ConnectionResetError:
            pass  # a server that closes while there is something unread resets the connection
        return received


def post(path: str, body: Any, *headers: str, version: str = "HTTP/1.1") -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} {version}", "Host: a", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def final(received: bytes) -> tuple[int, str]:
    """(status, body) of the final response, after interim ones."""
    while received.startswith(b"HTTP/1.1 100 "):
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body.decode()
