"""The HTTP process's side of the engine: starts it, hands it requests, and knows when it is gone.

Every request that a client holds open is a ``Generation``; whatever ends it (its last token, the client
going away, the engine dying) goes through ``Generation.close``, so nothing stays behind. The process is
started directly by this one and dies with it, whichever way it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from types import TracebackType

import msgspec

from ..engine.config import EngineConfig
from ..engine.errors import ConfigError, EngineError, RequestError
from ..engine.outputs import EngineStats, SequenceOutput
from ..engine.sampling_params import SamplingParams
from .engine_errors import EngineDied, InternalError, ShuttingDown
from .messages import Abort, AddRequest, Command, Event, Failed, Outputs, Ready, Rejected, Shutdown, Stats
from .wire import WireError, events, frame

log = logging.getLogger("blockyard.agent")

EXIT_TIMEOUT = 5.0  # seconds the engine gets to exit by itself
WATCH_STEPS = 8  # waits into which hang_timeout is divided


class Generation:
    """One request in the engine, seen from outside. Use as an async context manager: leaving it aborts."""

    def __init__(self, client: EngineClient, request_id: str, choices: int) -> None:
        self.request_id = request_id
        self._client = client
        self._open = set(range(choices))
        self._events: asyncio.Queue[SequenceOutput | Exception] = asyncio.Queue()

    def put(self, event: SequenceOutput | Exception) -> None:
        self._events.put_nowait(event)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def outputs(self) -> AsyncGenerator[SequenceOutput, None]:
        """New tokens as they come, until every choice has ended.

        RequestError or InternalError if the engine refuses the request, EngineDied if it is gone,
        ShuttingDown if the server is going.
        """
        while self._open:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if event.index in self._open:  # a token may still come after its choice was stopped
                if event.finish_reason is not None:
                    self._open.remove(event.index)
                yield event

    def stop(self, index: int) -> None:
        """End one choice, whose text is complete, without ending the others."""
        if index in self._open:
            self._open.remove(index)
            self._client.send(Abort(self.request_id, index if self._open else None, "stop"))

    def close(self) -> None:
        """Forget the request; if it is still being computed, tell the engine to drop it."""
        if self._client.forget(self.request_id) and self._open:
            self._open.clear()
            self._client.send(Abort(self.request_id))


class EngineClient:
    """Owns the engine process and the requests in it."""

    def __init__(self, on_change: Callable[[], None] = lambda: None, hang_timeout: float = 0.0) -> None:
        """``hang_timeout``: seconds of silence after which an engine with work is ended; 0: never."""
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.failure: EngineError | None = None
        self.gone = asyncio.Event()  # the engine has ended, for whatever reason
        self._on_change = on_change
        self._hang_timeout = hang_timeout
        self._ids = itertools.count()
        self._generations: dict[str, Generation] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._sent = 0  # commands
        self._covered = 0  # of those, commands that the last Stats event includes
        self._heard = 0  # events received
        self._closing = False

    @property
    def in_flight(self) -> int:
        return len(self._generations)

    @property
    def commands_pending(self) -> int:
        return self._sent - self._covered

    @property
    def _owes_an_answer(self) -> bool:
        """Whether the engine has work, so that it must send events. An idle engine has reported that it is
        idle after all commands; any other sends an event with every step.
        """
        return self.commands_pending > 0 or self.stats.running + self.stats.waiting > 0

    async def start(self, config: EngineConfig) -> Ready:
        """Start the process and wait until the model is loaded. ConfigError or EngineDied if it cannot be."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "blockyard.agent.engine_process",
                str(theirs.fileno()),
                msgspec.json.encode(config).decode(),
                pass_fds=[theirs.fileno()],
            )
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(reader, loaded))
        return await loaded

    async def _watch(self) -> None:
        """End an engine that hangs: it has work and sends nothing for as long as ``hang_timeout``.

        The time is divided into short waits, so that a pause of the whole machine (a suspended laptop) does
        not count as a hang.
        """
        assert self._process is not None
        silent = 0
        while silent < WATCH_STEPS:
            before = self._heard
            await asyncio.sleep(self._hang_timeout / WATCH_STEPS)
            silent = silent + 1 if self._owes_an_answer and self._heard == before else 0
        self.failure = EngineDied(
            f"the engine had work and said nothing for {self._hang_timeout:g} s (hang_timeout); it was ended"
        )
        log.error("%s", self.failure)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _read(self, reader: asyncio.StreamReader, loaded: asyncio.Future[Ready]) -> None:
        try:
            async for event in events(reader):
                self._heard += 1
                if isinstance(event, Ready):
                    self.ready = event
                    if self._hang_timeout > 0:
                        self._watching = asyncio.create_task(self._watch())
                    if not loaded.done():  # the agent may have been stopped meanwhile
                        loaded.set_result(event)
                else:
                    self._handle(event)
        except (WireError, ConnectionError) as error:
            log.warning("from the engine process: %s", error)  # the exit code tells the reason
        finally:
            await self._bury(loaded)

    def _handle(self, event: Event) -> None:
        match event:
            case Outputs():
                for output in event.outputs:
                    generation = self._generations.get(output.request_id)
                    if generation is not None:
                        failed = output.error is not None
                        generation.put(
                            RequestError(str(output.error), field="response_format") if failed else output
                        )
            case Rejected():
                generation = self._generations.get(event.request_id)
                if generation is not None:
                    refusal = RequestError(event.message, field=event.field)
                    generation.put(InternalError(event.message) if event.internal else refusal)
            case Stats():
                self.stats, self._covered = event.stats, event.commands
                self._on_change()
            case Failed():
                self.failure = ConfigError(event.message) if event.config else EngineDied(event.message)

    async def _bury(self, loaded: asyncio.Future[Ready]) -> None:
        """The socket has ended: end the process and fail all requests that wait for it."""
        assert self._process is not None
        if self._watching is not None:
            self._watching.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), EXIT_TIMEOUT)
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self.failure is None and not self._closing:
            self.failure = EngineDied(f"the engine process ended with exit code {self._process.returncode}")
        error = self.failure or EngineDied("the engine was shut down")
        for generation in self._generations.values():
            generation.put(EngineDied(str(error)))
        if not loaded.done():
            loaded.set_exception(error)
        self.gone.set()
        self._on_change()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, tenant: str, priority: int
    ) -> Generation:
        """Hand a request to the engine. EngineDied if the engine is not running."""
        if self._writer is None or self.gone.is_set():
            raise EngineDied(str(self.failure or "the engine is not running"))
        generation = Generation(self, f"r{next(self._ids)}", params.n)
        self._generations[generation.request_id] = generation
        self.send(AddRequest(generation.request_id, prompt_ids, params, tenant, priority))
        self._on_change()
        return generation

    def forget(self, request_id: str) -> bool:
        known = self._generations.pop(request_id, None) is not None
        if known:
            self._on_change()
        return known

    def send(self, command: Command) -> None:
        """Queue a command; it is dropped if the engine is not running."""
        if self._writer is not None and not self.gone.is_set():
            self._sent += 1
            self._writer.write(frame(command))

    def cut_off(self, message: str) -> None:
        """End every open request with ShuttingDown."""
        for generation in self._generations.values():
            generation.put(ShuttingDown(message))

    async def close(self) -> None:
        """End the process: by a Shutdown command if it reads commands, else by SIGKILL."""
        self._closing = True
        if self._process is None:
            return
        if self.ready is None and self._process.returncode is None:
            self._process.kill()  # while it loads it reads no commands
        self.send(Shutdown())
        if self._writer is not None:
            self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), EXIT_TIMEOUT)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading
