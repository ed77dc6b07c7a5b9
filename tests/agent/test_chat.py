"""``blockyard chat`` as people use it: through a pipe and at a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from .process import AgentProcess

TIMEOUT = 60.0  # seconds


def chat(url: str, questions: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blockyard.cli", "chat", "--url", url, *flags]
    return subprocess.run(
        command, input=questions, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def test_answers_go_to_the_pipe_with_their_speed_and_cached_tokens(agent: AgentProcess) -> None:
    system = "You are a helpful assistant who answers every question in one short sentence."
    questions = "What is the capital of France?\n\nAnd of Italy?\n"
    done = chat(agent.url, questions, "--temperature", "0", "--max-tokens", "16", "--system", system)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Paris" in done.stdout
    about = (
        r"^\[(\d+) tokens, ([\d.]+) tokens/s, first after [\d.]+ s, "
        r"prompt (\d+) tokens of which (\d+) cached\]$"
    )
    lines = re.findall(about, done.stdout, re.MULTILINE)
    assert len(lines) == 2, done.stdout
    assert all(1 < int(tokens) <= 16 and float(rate) > 0 for tokens, rate, *_ in lines)
    (*_, first_prompt, _), (*_, second_prompt, cached) = lines
    # The conversation goes on: the second prompt holds the first, which is in the cache.
    assert int(second_prompt) > int(first_prompt)
    assert int(cached) >= int(first_prompt) // 16 * 16 > 0


def test_a_server_that_does_not_answer_is_named() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for flags in ([], ["--model", "m"]):
            done = chat(url, "Hello\n", *flags)
            assert done.returncode == 1
            assert f"blockyard chat: {url} does not answer" in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope", "404: nope"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}",
            "OpenAI server",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/html\r\n\r\nhi", "OpenAI server"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not answer"),
    ],
)
def test_a_server_of_another_kind_is_named(reply: bytes, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        done = chat(f"http://127.0.0.1:{server.getsockname()[1]}/v1/", "Hello\n")
        thread.join(TIMEOUT)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_question_says_why(agent: AgentProcess) -> None:
    done = chat(agent.url, "Hello\n", "--model", "gpt-4")
    assert done.returncode == 1
    assert "404: the model 'gpt-4' does not exist here" in done.stderr


# Only a process itself can make its terminal the one whose Ctrl-C it gets; tests that run in the background
# have inherited that it is ignored.
AT_A_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from blockyard.cli import main
sys.exit(main())
"""


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, url: str, *flags: str) -> None:
        self.ours, theirs = pty.openpty()
        self.settings = termios.tcgetattr(self.ours)
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, "chat", "--url", url, *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, text: str) -> None:
        """Until it shows ``text``; what came up to there is forgotten."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} never came: {self.seen!r}"
            self.seen += os.read(self.ours, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]


@contextlib.contextmanager
def terminal(url: str, *flags: str) -> Iterator[Terminal]:
    opened = Terminal(url, *flags)
    try:
        yield opened
    finally:
        if opened.process.poll() is None:
            opened.process.kill()
        opened.process.wait()
        os.close(opened.ours)


def test_ctrl_c_cancels_an_answer_then_leaves_the_terminal_as_it_was(agent: AgentProcess) -> None:
    with terminal(agent.url, "--max-tokens", "1500", "--temperature", "0") as here:
        here.wait_for("> ")
        here.type("Write a very long story about the sea, with many chapters.\n")
        agent.status_when(lambda status: status["running"] == 1)
        here.type("\x03")
        here.wait_for("[cancelled]")
        agent.idle()
        here.wait_for("> ")
        here.type("\x03")
        assert here.process.wait(TIMEOUT) == 130
        assert termios.tcgetattr(here.ours) == here.settings
        assert "Traceback" not in here.seen


def test_ctrl_d_ends_a_chat(agent: AgentProcess) -> None:
    with terminal(agent.url) as here:
        here.wait_for("> ")
        here.type("\x04")
        assert here.process.wait(TIMEOUT) == 0
