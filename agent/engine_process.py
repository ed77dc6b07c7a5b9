"""The engine's process: commands in, steps, events out. The only module of the agent that uses torch.

The main thread computes. A reader thread moves commands from the socket into a queue, so that a slow client
cannot delay a step, and an idle engine waits for the queue instead of polling it. A request with a grammar
goes through other threads first, which compile it and put the request back into the queue: it waits alone.
The process exits when the other end of its socket is closed.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.errors import ConfigError, RequestError, WorkerDied
from ..engine.sampling_params import Structure
from ..engine.structured import Grammar
from .messages import Abort, AddRequest, Command, Event, Failed, Outputs, Ready, Rejected, Shutdown, Stats
from .wire import WireError, commands, frame

log = logging.getLogger("blockyard.agent")

STATS_INTERVAL = 0.1  # seconds between reports while computing
COMPILERS = 4  # requests whose grammars are compiled at once, each in a thread
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request comes back with its grammar, or with the error that it has none."""

    command: AddRequest
    grammar: Future[Grammar]


# None: the socket has ended. WorkerDied: the engine is broken, and must end even if it is idle.
Commands = queue.SimpleQueue[Command | Compiled | WorkerDied | None]


def main(fd: int, config: EngineConfig) -> int:
    """Serve one engine over the socket ``fd``; returns the process's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the HTTP process decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    connection = socket.socket(fileno=fd)
    commands: Commands = queue.SimpleQueue()
    try:
        engine = Engine(config, on_death=commands.put)
    except ConfigError as error:
        _send(connection, Failed(str(error), config=True))
        return 2
    except Exception as error:
        log.exception("the engine cannot be loaded")
        _send(connection, Failed(f"the engine cannot be loaded: {error}"))
        return 1
    # What is loaded now is never freed, so the garbage collector need not scan it.
    gc.collect()
    gc.freeze()
    try:
        _send(connection, Stats(engine.stats()))  # first, so that a ready agent never reports an empty pool
        _send(connection, Ready(**{name: getattr(engine.info, name) for name in Ready.__struct_fields__}))
        _Loop(engine, connection, commands).run()
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the HTTP process is gone, and so is every client
    except Exception as error:
        log.exception("the engine failed")
        _send(connection, Failed(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        engine.close()


def _die_with_parent() -> None:
    """Get SIGKILL when the HTTP process dies, even in the middle of a long step (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _send(connection: socket.socket, event: Event) -> None:
    connection.sendall(frame(event))


class _Loop:
    """Computes steps while there is work and waits for commands while there is none."""

    def __init__(self, engine: Engine, connection: socket.socket, commands: Commands) -> None:
        self._engine = engine
        self._connection = connection
        self._commands = commands
        self._carried_out = 0
        self._stopping = False
        self._reported = 0.0
        self._compilers = ThreadPoolExecutor(COMPILERS, "compiler")
        self._compiling: dict[str, Future[Grammar]] = {}
        threading.Thread(target=self._read, daemon=True, name="commands").start()

    def _read(self) -> None:
        """Move commands from the socket to the queue; the end of the socket ends the process."""
        try:
            for command in commands(self._connection.makefile("rb")):
                self._commands.put(command)
        except (OSError, WireError):
            log.exception("commands can no longer be read")
        finally:
            self._commands.put(None)

    def run(self) -> None:
        """Run until the HTTP process sends Shutdown or closes its end."""
        while not self._stopping:
            if not self._engine.has_work:
                self._report()  # so that the last report before a wait is up to date
            self._take_commands()
            if self._stopping or not self._engine.has_work:
                continue
            outputs = self._engine.step()
            if outputs:
                _send(self._connection, Outputs(outputs))
            if time.monotonic() - self._reported > STATS_INTERVAL:
                self._report()

    def _take_commands(self) -> None:
        """Take all commands that have arrived; wait for one if there is nothing to compute."""
        wait = not self._engine.has_work
        while not self._stopping:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._carry_out(command)
            self._carried_out += not isinstance(command, Compiled)

    def _carry_out(self, command: Command | Compiled | WorkerDied | None) -> None:
        match command:
            case AddRequest() if command.params.structure is not None:
                self._compile(command, command.params.structure)
            case AddRequest():
                self._add(command)
            case Compiled():
                if self._compiling.get(command.command.request_id) is command.grammar:  # else it was aborted
                    del self._compiling[command.command.request_id]
                    self._add(command.command, command.grammar)
            case Abort():
                if command.index is None and (grammar := self._compiling.pop(command.request_id, None)):
                    grammar.cancel()
                self._engine.abort(command.request_id, command.index, command.reason)
            case Shutdown() | None:
                self._stopping = True
            case WorkerDied():
                raise command

    def _compile(self, command: AddRequest, structure: Structure) -> None:
        if command.request_id in self._compiling:
            message = f"a request with id {command.request_id!r} is being served"
            _send(self._connection, Rejected(command.request_id, message, "request_id"))
            return
        grammar = self._compilers.submit(self._engine.compile, structure)
        self._compiling[command.request_id] = grammar
        grammar.add_done_callback(lambda done: self._commands.put(Compiled(command, done)))

    def _add(self, command: AddRequest, grammar: Future[Grammar] | None = None) -> None:
        try:
            self._engine.add_request(
                command.request_id,
                command.prompt_ids,
                command.params,
                tenant=command.tenant,
                priority=command.priority,
                grammar=None if grammar is None else grammar.result(),
            )
        except RequestError as error:
            _send(self._connection, Rejected(command.request_id, str(error), error.field))
        except Exception as error:
            # A defect that shows at one request must not end the others.
            log.exception("request %s cannot be added", command.request_id)
            _send(self._connection, Rejected(command.request_id, f"internal error: {error}", internal=True))

    def _report(self) -> None:
        self._reported = time.monotonic()
        _send(self._connection, Stats(self._engine.stats(), self._carried_out))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=EngineConfig)))
