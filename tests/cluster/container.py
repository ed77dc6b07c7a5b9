"""One container of a pod: a local process, through all its restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .api import Raw
from .process import MARK, sweep, tied


@dataclass(frozen=True)
class Image:
    """What a container image would bring: how its program is run on this machine."""

    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()  # arguments where the pod gives neither command nor arguments
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, container: Raw) -> list[str]:
        """By Kubernetes' rules: a pod's command replaces the entrypoint and the image's arguments."""
        if container.get("command"):
            return [*container["command"], *container.get("args", [])]
        return [*self.entrypoint, *(container["args"] if container.get("args") else self.cmd)]


class Container:
    """The process of one container, its logs, and the status that a kubelet would write about it."""

    def __init__(self, spec: Raw, *, folder: Path, mark: str) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.folder = folder
        self.mark = mark
        self.restarts = 0
        self.ready = False
        self.started = False  # the startup probe, if there is one, has succeeded
        self.ever_started = False
        self.exit_code: int | None = None  # of the last end
        self.state: Raw = {"waiting": {"reason": "ContainerCreating"}}
        self.last_state: Raw = {}
        self._process: asyncio.subprocess.Process | None = None
        folder.mkdir(parents=True)

    @property
    def pid(self) -> int | None:
        """Of the main process, None while it does not run."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def waits(self, reason: str, message: str) -> None:
        if "terminated" in self.state:
            self.last_state = self.state
        self.state = {"waiting": {"reason": reason, "message": message}}

    async def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Start the process; it and all that it starts carry the container's mark."""
        if self.ever_started:
            self.restarts += 1
        if "terminated" in self.state:
            self.last_state = self.state
        with (self.folder / f"{self.restarts}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tied(command),
                env={**environment, MARK: self.mark},
                cwd=self.folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.ever_started = True
        self.state = {"running": {"startedAt": timestamp()}}

    async def wait(self) -> int:
        """Exit code of the main process, 128 + n for signal n. What it leaves behind ends with it."""
        assert self._process
        code = await self._process.wait()
        self._ended(code if code >= 0 else 128 - code)
        assert self.exit_code is not None
        return self.exit_code

    def signal(self, number: signal.Signals) -> None:
        """To the main process alone, as a container runtime does; nothing if it has ended."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def end(self, grace: float | None) -> None:
        """SIGTERM, and SIGKILL if the main process runs on for ``grace`` seconds; None waits for ever."""
        if self._process and self.pid is not None:
            self.signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), grace)
            except TimeoutError:
                self.kill()

    def kill(self) -> None:
        """SIGKILL to all processes of the container."""
        sweep(self.mark)

    async def execute(self, command: list[str], environment: Mapping[str, str], limit: float) -> bool:
        """Run a command in the container, as an exec probe does; whether it succeeded in time."""
        process = await asyncio.create_subprocess_exec(
            *tied(command),
            env={**environment, MARK: self.mark},
            cwd=self.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            return await asyncio.wait_for(process.wait(), limit) == 0
        finally:
            if process.returncode is None:
                process.kill()

    def logs(self) -> str:
        """Of all lives, oldest first."""
        files = sorted(self.folder.glob("*.log"), key=lambda path: int(path.stem))
        return "".join(path.read_text(errors="replace") for path in files)

    def status(self) -> Raw:
        image = self.spec["image"]
        return {
            "name": self.name,
            "image": image,
            "imageID": image if self.ever_started else "",
            "containerID": f"process://{self.mark}" if self.ever_started else "",
            "state": self.state,
            "lastState": self.last_state,
            "restartCount": self.restarts,
            "ready": self.ready,
            "started": self.started,
        }

    def _ended(self, code: int) -> None:
        sweep(self.mark)
        running = self.state.get("running", {})
        self.exit_code = code
        self.ready = self.started = False
        self.state = {
            "terminated": {
                "exitCode": code,
                "reason": "Completed" if code == 0 else "Error",
                "startedAt": running.get("startedAt"),
                "finishedAt": timestamp(),
            }
        }


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
