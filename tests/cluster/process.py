"""Local processes that end with the tests, however those end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

MARK = (
    "BLOCKYARD_TEST_PROCESS"  # environment variable that children inherit, whatever they do to their session
)


def tied(command: list[str]) -> list[str]:
    """The command, killed by the kernel when the thread that starts it is gone (a killed pytest, for one)."""
    setpriv = shutil.which("setpriv")
    assert setpriv, "setpriv is missing: install util-linux"
    # The kernel does not signal a death that came before prctl; then the parent is another process.
    check = '[ "$PPID" = "$0" ] && exec "$@"'
    return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", check, str(os.getpid()), *command]


def marked(prefix: str) -> list[int]:
    """Processes that were started with a mark that begins so, and their descendants."""
    wanted = f"{MARK}={prefix}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended, or is someone else's
                if any(entry.startswith(wanted) for entry in (folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
    return found


def sweep(prefix: str) -> None:
    """Kill all processes with such a mark: again until none is found, since a dying one may have forked."""
    while found := marked(prefix):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
