"""Preparing a model's files in a process of its own.

Fetching and converting can take minutes. A signal must be able to stop the agent in the middle of it, and a
thread cannot be stopped. The child process removes its own half-made files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from ..engine.errors import ConfigError
from ..engine.model.files import prepare

EXIT_TIMEOUT = 5.0  # seconds to clean up after a cancellation
_REFUSED = 2  # exit code for a ConfigError, whose message is then the output


async def prepare_in_child(model: str) -> Path:
    """The model's folder, as ``engine.model.files.prepare`` finds or makes it. ConfigError if it cannot.

    Cancelling ends the work and everything that it started.
    """
    if Path(model).is_dir():  # noqa: ASYNC240 - one look at the disk, before anything is served
        return prepare(model)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "blockyard.agent.prepare_model",
        model,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # so that its own children can be ended with it
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        await _end(process)
        raise
    if process.returncode == _REFUSED:
        raise ConfigError(output.decode())
    if process.returncode:
        raise ConfigError(
            f"model {model!r} could not be prepared (exit code {process.returncode}, see above)"
        )
    return Path(os.fsdecode(output))


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), EXIT_TIMEOUT)
            return


def _main(model: str) -> int:
    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # unlike the signal's default action, this runs finally blocks

    signal.signal(signal.SIGTERM, leave)
    # What is prepared may print; only the result goes to the pipe.
    result = os.dup(1)
    os.dup2(2, 1)
    try:
        os.write(result, os.fsencode(prepare(model)))
        return 0
    except ConfigError as error:
        os.write(result, str(error).encode())
        return _REFUSED


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
