"""A process of the local runtime: started with a container's settings, restarted and ended as the kubelet
does.

Its processes do not outlive the runtime, however that ends: on Linux the kernel kills them even after a kill
-9.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping
from pathlib import Path

FIRST_RESTART, LONGEST_RESTART = 1.0, 60.0  # seconds before a process that died is started again; doubling
STABLE = 60.0  # seconds of running after which the restart back-off begins anew
LOG_BYTES = 8 << 20  # a longer log is begun anew
_LISTENS = re.compile(r"(http://\S+?)(?=[\s,]|$)")
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class LocalProcess:
    """One program that should run until ``stop``. ``url``: its address, from its output; "" before that."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.log = log
        self.url = ""
        self.restarts = 0
        self.last_words = ""  # how it ended last: exit code and last line
        self.started_at = 0.0
        self._command = command
        self._environment = environment
        self._on_change = on_change
        self._process: Process | None = None
        self._stopping = False
        self._task = asyncio.create_task(self._keep_running(), name=name)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        return self._process.pid if self._process is not None and self.running else 0

    async def _keep_running(self) -> None:
        pause = FIRST_RESTART
        while not self._stopping:
            self.started_at = time.monotonic()
            code = await self._run_once()
            if self._stopping:
                return
            self.url = ""
            self.restarts += 1
            self.last_words = f"exit code {code}{_last_line(self.log)}"
            self._on_change()
            if time.monotonic() - self.started_at > STABLE:
                pause = FIRST_RESTART
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RESTART)

    async def _run_once(self) -> int:
        mode = "wb" if self.log.exists() and self.log.stat().st_size > LOG_BYTES else "ab"
        with self.log.open(mode) as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=log,
                env=dict(self._environment),
                start_new_session=True,  # Ctrl-C goes to the runtime, which stops its processes in order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
            process = self._process
            if self._stopping:  # stop() was called while the process was being started
                self._signal(signal.SIGTERM)
            self._on_change()
            assert process.stdout is not None
            async for line in process.stdout:
                log.write(line)
                log.flush()
                if not self.url and (match := _LISTENS.search(line.decode(errors="replace"))):
                    self.url = match[1]
                    self._on_change()
        return await process.wait()

    async def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after ``grace`` seconds; returns when it is gone. May be called again."""
        self._stopping = True
        self._signal(signal.SIGTERM)
        if not self.running:
            self._task.cancel()
        done, _ = await asyncio.wait({self._task}, timeout=grace)
        if not done:
            self.kill()
            await asyncio.wait({self._task})

    def kill(self) -> None:
        """SIGKILL to it and to what it started."""
        self._stopping = True
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _last_line(log: Path) -> str:
    """ ": " and the last line of the log, if there is one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((f": {line[:300]}" for line in reversed(lines) if line), "")
