"""The engine's own process: commands in, steps, events out; the only module of the agent that uses torch.

The main thread computes; a reader thread turns the socket into a queue, so that a step is never held up
by a slow client and the queue is waited on, not polled, when there is nothing to compute. The process
lives as long as the other end of its socket.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time

import msgspec

from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.errors import ConfigError, RequestError
from .messages import Abort, AddRequest, Command, Event, Failed, Outputs, Ready, Rejected, Shutdown, Stats
from .wire import LENGTH, decode_command, frame

log = logging.getLogger("blockyard.agent")

STATS_INTERVAL = 0.1  # seconds between reports while computing
_PR_SET_PDEATHSIG = 1


def main(fd: int, config: EngineConfig) -> int:
    """Serve one engine over the socket ``fd``; returns the process's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the HTTP process decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    connection = socket.socket(fileno=fd)
    try:
        engine = Engine(config)
    except ConfigError as error:
        _send(connection, Failed(str(error), config=True))
        return 2
    except Exception as error:
        log.exception("the engine cannot be loaded")
        _send(connection, Failed(f"the engine cannot be loaded: {error}"))
        return 1
    # What is loaded stays; the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    try:
        _send(connection, Ready(**{name: getattr(engine.info, name) for name in Ready.__struct_fields__}))
        _Loop(engine, connection).run()
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
    """Even if the HTTP process is killed while a step takes long (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _send(connection: socket.socket, event: Event) -> None:
    connection.sendall(frame(event))


class _Loop:
    """Steps while there is work, waits for commands while there is none."""

    def __init__(self, engine: Engine, connection: socket.socket) -> None:
        self._engine = engine
        self._connection = connection
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._stopping = False
        self._reported = 0.0
        threading.Thread(target=self._read, daemon=True, name="commands").start()

    def _read(self) -> None:
        stream = self._connection.makefile("rb")
        while True:
            header = stream.read(LENGTH.size)
            body = stream.read(LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else b""
            if not body:
                self._commands.put(None)
                return
            self._commands.put(decode_command(body))

    def run(self) -> None:
        self._report()
        while not self._stopping:
            self._take_commands()
            if not self._engine.has_work:
                self._report()
                continue
            outputs = self._engine.step()
            if outputs:
                _send(self._connection, Outputs(outputs))
            if time.monotonic() - self._reported > STATS_INTERVAL:
                self._report()

    def _take_commands(self) -> None:
        """All commands that are there; with nothing to compute, wait for one."""
        while not self._stopping:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return
            self._carry_out(command)
            if self._commands.empty():
                return

    def _carry_out(self, command: Command | None) -> None:
        engine = self._engine
        match command:
            case AddRequest():
                try:
                    engine.add_request(
                        command.request_id,
                        command.prompt_ids,
                        command.params,
                        tenant=command.tenant,
                        priority=command.priority,
                    )
                except RequestError as error:
                    _send(self._connection, Rejected(command.request_id, str(error), error.field))
            case Abort():
                engine.abort(command.request_id, command.index)
            case Shutdown() | None:
                self._stopping = True

    def _report(self) -> None:
        self._reported = time.monotonic()
        _send(self._connection, Stats(self._engine.stats()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(os.environ["BLOCKYARD_ENGINE_CONFIG"], type=EngineConfig)))
