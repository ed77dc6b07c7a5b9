"""One attempt: a request at one agent, until its answer has come or it is clear that none will.

What another agent could do better is raised as ``Failure``. What is wrong with the request itself (a bad
field, an unknown model) is the answer, and is passed on unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from multidict import CIMultiDictProxy

from ..bearer import Tokens, authorizations
from .dispatch import Failure, Pick
from .metrics import GatewayMetrics

CONNECT_TIMEOUT = 3.0  # seconds until an agent's machine must have answered
END_TIMEOUT = 1.0  # seconds for an agent to end a response after its last event
MAX_RETRY_AFTER = 300.0  # seconds; a longer Retry-After is cut to this

T = TypeVar("T")


class TookTooLong(Exception):
    """The request_timeout is over."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    status: int
    body: bytes
    content_type: str


class Attempt:
    """Use as a context manager: leaving it ends the request at the agent, if it has not ended yet."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pick: Pick,
        deadline: float,
        metrics: GatewayMetrics,
        tokens: Tokens,
    ) -> None:
        """``deadline`` by the event loop's clock."""
        self._session = session
        self._pick = pick
        self._deadline = deadline
        self._metrics = metrics
        self._tokens = tokens
        self._begin = asyncio.get_running_loop().time()
        self._response: aiohttp.ClientResponse | None = None
        self._scope: asyncio.Timeout | None = None  # the timeout around the current await
        self._abandoned = ""  # why the agent was given up; empty while it is not

    async def __aenter__(self) -> Attempt:
        self._pick.agent.attempts.add(self._abandon)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pick.agent.attempts.discard(self._abandon)
        if self._response is not None:
            # Closes the connection, unless the response was read to its end and has returned it.
            self._response.close()
        outcome = "ok" if kind is None else error.reason if isinstance(error, Failure) else "error"
        outcome = "cancelled" if isinstance(error, asyncio.CancelledError | ConnectionError) else outcome
        self._metrics.upstream.labels(outcome).observe(asyncio.get_running_loop().time() - self._begin)

    def _abandon(self, why: str) -> None:
        self._abandoned = why
        if self._scope is not None:
            self._scope.reschedule(0.0)

    async def _from_agent(self, work: Awaitable[T]) -> T:
        """Await an operation at the agent; a lost connection or agent becomes a Failure."""
        try:
            async with asyncio.timeout_at(0.0 if self._abandoned else self._deadline) as self._scope:
                return await work
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
            raise Failure(
                "unreachable", f"{self._pick.name} cannot be reached: {error}", unreachable=True
            ) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Failure("lost", f"the connection to {self._pick.name} broke: {error!r}") from None
        except TimeoutError:
            if self._abandoned:
                raise Failure("lost", f"{self._pick.name}: {self._abandoned}", unreachable=True) from None
            raise TookTooLong from None
        finally:
            self._scope = None

    async def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> None:
        """Send the request and wait for the response to begin. Failure if the agent refuses for its own
        reasons (busy, draining), not because of the request.
        """
        url = self._pick.agent.endpoint.url + path
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
        for credentials in authorizations(self._tokens):
            if self._response is not None:
                self._response.release()
            self._response = response = await self._from_agent(
                self._session.request(
                    method,
                    url,
                    data=body,
                    headers=headers | credentials,
                    timeout=limits,
                    allow_redirects=False,
                )
            )
            if response.status not in (401, 403):
                break
        else:
            raise Failure("unauthorized", f"{self._pick.name} refuses this gateway's token", retry_after=5.0)
        if response.status in (429, 502, 503, 504):
            text = await self._from_agent(response.read())
            raise Failure(
                "busy" if response.status == 429 else "unavailable",
                _message(text) or f"{self._pick.name} answers {response.status}",
                retry_after=_retry_after(response.headers) if response.status == 429 else None,
            )

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events."""
        assert self._response is not None
        return self._response.status == 200 and self._response.content_type == "text/event-stream"

    async def whole(self) -> Answer:
        """The answer, once it is all there."""
        assert self._response is not None
        body = await self._from_agent(self._response.read())
        return Answer(self._response.status, body, self._response.content_type)

    async def finish(self) -> None:
        """After the last event: read the end of the response too, so that the connection can be reused."""
        assert self._response is not None
        with contextlib.suppress(Failure, TookTooLong):
            self._deadline = min(self._deadline, asyncio.get_running_loop().time() + END_TIMEOUT)
            await self._from_agent(self._response.read())

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """The data of the events, as many at a time as have come, until the agent ends the stream."""
        assert self._response is not None
        buffer = b""
        while data := await self._from_agent(self._response.content.readany()):
            *events, buffer = (buffer + data).split(b"\n\n")
            if events:
                yield [event.removeprefix(b"data: ") for event in events]


def _message(body: bytes) -> str:
    """What an agent's error says, if it is one."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        answer: Any = json.loads(body)
        return str(answer["error"]["message"])
    return ""


def _retry_after(headers: CIMultiDictProxy[str]) -> float | None:
    text = headers.get("Retry-After", "")
    return min(float(text), MAX_RETRY_AFTER) if text.isascii() and text.isdigit() else None
