"""Trial compilations of grammars, in child processes whose time and memory are limited.

A compilation that runs in a thread cannot be ended, and one that takes all memory takes the engine with it. A
child process is killed when its time is up, also if nobody waits for it any more, and aborts when it asks for
more memory than it may have.
"""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CPU_TIME = 5  # seconds for one schema
TIMEOUT = 30.0  # seconds that it may take on a busy machine
MEMORY = 128 << 20  # bytes for one schema
START_TIMEOUT = 60.0  # seconds until a child has read the tokenizer
MAX_LEXER_STATES = 50_000  # of 1 to 2 KiB each, which an output may add while it is generated
TOO_COMPLEX = (
    f"it is too complex: compiling it takes more than {CPU_TIME} s or {MEMORY >> 20} MiB. Large bounds "
    "(multipleOf, maxLength), patterns and combinations by allOf are the usual reasons; simplify them"
)


def make_tokenizer(file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Any:
    """llguidance's table of tokens. Takes some 300 ms with the GIL held. ValueError if it cannot be made."""
    import llguidance

    return llguidance.LLTokenizer(str(file), n_vocab=vocab_size, eos_token=list(eos_token_ids))


def make_matcher(tokenizer: Any, schema: str) -> Any:
    """A matcher with its first mask computed, which is part of the compilation: it may take 100 ms.

    ValueError if the schema is not JSON; other errors are in the matcher.
    """
    import llguidance

    matcher = llguidance.LLMatcher(
        tokenizer,
        llguidance.LLMatcher.grammar_from_json_schema(schema),
        log_level=0,
        limits=llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False),
    )
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


class _Child:
    """One process that compiles one schema after another."""

    def __init__(self, arguments: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a file in the current folder must not shadow an installed package.
            command = [sys.executable, "-P", "-m", "blockyard.engine.grammar_trial", str(theirs.fileno())]
            self._process = subprocess.Popen(
                [*command, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # it aborts with a message when its memory is used up
            )
        self._pipe = Connection(ours.detach())
        self._ready = False

    def run(self, schema: str) -> str:
        """What is wrong with a schema, "" if nothing is. EOFError or OSError if the child has died of it."""
        if not self._ready:
            try:
                self._answer(START_TIMEOUT)
            except (EOFError, OSError):
                raise RuntimeError("the process that compiles grammars for trial cannot start") from None
            self._ready = True
        self._pipe.send_bytes(schema.encode())
        return self._answer(TIMEOUT)

    def _answer(self, timeout: float) -> str:
        if not self._pipe.poll(timeout):
            raise EOFError
        return self._pipe.recv_bytes().decode()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


class Trials:
    """Runs trials, each in a child that runs no other meanwhile: a slow schema delays no other one.

    One idle child is kept; more are started when more are needed. Thread-safe.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = [str(tokenizer_file), str(vocab_size), *map(str, eos_token_ids)]
        self._lock = threading.Lock()
        self._closed = False
        self._idle: _Child | None = _Child(self._arguments)
        self._busy: set[_Child] = set()

    def run(self, schema: str) -> str:
        """What is wrong with a schema, "" if nothing is."""
        with self._lock:
            child, self._idle = self._idle or _Child(self._arguments), None
            self._busy.add(child)
        alive = False
        try:
            fault = child.run(schema)
            alive = True
        except (EOFError, OSError):
            fault = TOO_COMPLEX
        finally:
            with self._lock:
                self._busy.remove(child)
                keep = alive and self._idle is None and not self._closed
                if keep:
                    self._idle = child
            if not keep:
                child.close()
        return fault

    def close(self) -> None:
        """End all children. A trial that still runs then counts as failed."""
        with self._lock:
            child, self._idle, self._closed = self._idle, None, True
            for busy in self._busy:
                busy.kill()  # its pipe is closed by the thread that waits for it
        if child is not None:
            child.close()


def main(fd: int, tokenizer_file: str, vocab_size: int, eos_token_ids: list[int]) -> None:
    """A child: say "" when ready, then compile each schema that arrives, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when to stop
    pipe = Connection(fd)
    tokenizer = make_tokenizer(Path(tokenizer_file), vocab_size, eos_token_ids)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
    pipe.send_bytes(b"")
    while True:
        try:
            schema = pipe.recv_bytes().decode()
        except EOFError:
            return
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + CPU_TIME)
        try:
            error = make_matcher(tokenizer, schema).get_error()
        except ValueError as failure:
            error = str(failure)
        pipe.send_bytes(error.encode())


def _limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    resource.setrlimit(what, (value if most == resource.RLIM_INFINITY else min(value, most), most))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [int(token) for token in sys.argv[4:]])
