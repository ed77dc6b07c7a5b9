"""A real agent in a process of its own, as users run it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "SmolLM2-135M-Instruct"
START_TIMEOUT = 240.0  # seconds; generous, since the model may have to be prepared first


def wait_for_end(pid: int, timeout: float = 60.0) -> None:
    """Until a process that need not be a child of this one is gone."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], timeout)[0], f"process {pid} does not end"
        finally:
            os.close(descriptor)


class AgentProcess:
    """Starts ``blockyard agent`` on a free port and waits until it is ready (unless told not to)."""

    def __init__(self, folder: Path, *flags: str, wait: bool = True, model: str = MODEL) -> None:
        self.log = folder / "agent.log"
        self._output = self.log.open("wb")
        # One thread: on shared cores, threads that wait for each other also wait for other processes.
        command = [sys.executable, "-m", "blockyard.cli", "agent", "--model", model, "--port", "0"]
        command += ["--threads", "1", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._output, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        self.url = ""
        self._lines: list[str] = []
        self._announced = threading.Event()
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if wait:
            assert self._ready.wait(START_TIMEOUT), self.errors()
            assert self.process.poll() is None, self.errors()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode()
            self._lines.append(line)
            if match := re.search(r"(http://\S+) is loading", line):
                self.url = match[1]
                self._announced.set()
            if "ready," in line:
                self._ready.set()
        self._announced.set()
        self._ready.set()

    def wait_for_url(self) -> str:
        assert self._announced.wait(START_TIMEOUT)
        return self.url

    def errors(self) -> str:
        return self.log.read_text(errors="replace") + "".join(self._lines)

    def get(self, path: str, *, timeout: float = 90.0) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return json.load(response)

    def code(self, path: str) -> int:
        """The HTTP status of a GET; 0 if nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (urllib.error.URLError, ConnectionError):
            return 0

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(HTTP status, answer) of a POST of bytes as they are, or of anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def status_when(self, predicate: Any, *, timeout: float = 120.0) -> dict[str, Any]:
        """The first status for which ``predicate`` holds, by long polls."""
        deadline = time.monotonic() + timeout
        status = self.get("/status")
        while not predicate(status):
            assert time.monotonic() < deadline, f"never came: {status}\n{self.errors()}"
            status = self.get(f"/status?since={status['version']}&wait=20")
        return status

    def idle(self) -> dict[str, Any]:
        """Wait until nothing runs and the engine has said so; the pool must be whole again.

        Blocks that are still active then belong to nobody, which is what a leak is.
        """

        def quiet(status: dict[str, Any]) -> bool:
            return not any(status[key] for key in ("in_flight", "commands_pending", "running", "waiting"))

        status = self.status_when(quiet)
        tier = status["device_tier"]
        assert tier["active"] == 0, status
        assert tier["free"] + tier["cached"] == tier["total"] > 0, status
        return status

    def engine_pid(self) -> int:
        children = self._children()
        assert len(children) == 1, children
        return children[0]

    def engine_pid_when_started(self) -> int:
        """The engine's pid while it is still loading. A new child causes no event, so this polls."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            for child in self._children():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    if b"engine_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return child
            assert self.process.poll() is None, self.errors()
        raise AssertionError(self.errors())

    def _children(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in listed.split()]

    @contextlib.contextmanager
    def frozen_engine(self) -> Iterator[None]:
        """Stop the engine process inside a step for the duration of the context."""
        pid = self.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Send a signal and wait for the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._output.close()
