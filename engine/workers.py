"""Tensor parallelism: runs every rank other than 0 as a worker process, under the one central scheduler.

Rank 0 is in the engine's process and is an ordinary Runner. Each step is sent once to every worker, as one
message over a pipe; inside the forward pass ranks only sum activations (gloo on CPUs, NCCL on GPUs). What
else ranks agree on while they load goes over the pipes too: the end of a pipe shows a death at once, in
either direction, while a collective would wait for a peer that does not exist any more. Workers are plain
child processes that exit when their pipe is closed, so no worker survives a killed engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import faulthandler
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined] # public, but not in its __all__

from .config import EngineConfig
from .errors import ConfigError, EngineError, WorkerDied
from .model.config import ModelConfig
from .model.decoder import Shard
from .runner import Runner
from .step import StepInput, StepRunner

log = logging.getLogger("blockyard.engine")

COLLECTIVE_TIMEOUT = dt.timedelta(seconds=60)
LOAD_TIMEOUT = 600.0  # seconds that ranks wait for each other while they load
EXIT_TIMEOUT = 5.0  # seconds after a worker's death until a process that still waits for it is ended
_STUCK = 70  # exit code then
_LOOPBACK = "127.0.0.1"

OnDeath = Callable[[WorkerDied], None]


def load_runner(config: EngineConfig, on_death: OnDeath | None = None) -> StepRunner:
    """The runner for a config: in this process alone, or with tensor-parallel workers.

    ``on_death`` is called, from another thread, if a worker dies after all ranks have loaded.
    """
    if config.tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel is {config.tensor_parallel}; it must be at least 1")
    return Runner(config) if config.tensor_parallel == 1 else ParallelRunner(config, on_death)


class _Group:
    """The collectives of one rank of several."""

    def __init__(self, rank: int, size: int, *, cuda: bool) -> None:
        self.rank, self.size = rank, size
        self._backend = "nccl" if cuda else "gloo"

    def _join(self, store: TCPStore) -> None:
        # All ranks are on this machine; their traffic must not leave it.
        os.environ.setdefault(f"{self._backend.upper()}_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            self._backend, store=store, rank=self.rank, world_size=self.size, timeout=COLLECTIVE_TIMEOUT
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0)
        return None if parts is None else torch.cat(parts, dim=-1)


class Leader(_Group):
    """Rank 0's communicator. ``together`` is True while rank 0 may be waiting in a collective."""

    def __init__(self, pipes: list[Connection], *, cuda: bool) -> None:
        super().__init__(0, len(pipes) + 1, cuda=cuda)
        self._pipes = pipes
        self.together = False

    def collect(self) -> list[Any]:
        """The next message of each worker. Raises a failed worker's error, or WorkerDied if one is gone."""
        answers = []
        for rank, pipe in enumerate(self._pipes, 1):
            if not pipe.poll(LOAD_TIMEOUT):
                raise WorkerDied(f"tensor-parallel rank {rank} was silent for {LOAD_TIMEOUT:.0f} s")
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                raise WorkerDied(
                    f"tensor-parallel rank {rank} died while it loaded; its output says why"
                ) from None
            if isinstance(answer, EngineError):
                raise answer
            answers.append(answer)
        return answers

    def _tell(self, answer: int) -> None:
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                pipe.send_bytes(b"%d" % answer)
            except OSError:
                raise WorkerDied(f"tensor-parallel rank {rank} died while it loaded") from None

    def meet(self) -> None:
        self.collect()
        listener = socket.create_server((_LOOPBACK, 0))
        port = int(listener.getsockname()[1])
        store = TCPStore(
            _LOOPBACK,
            port,
            self.size,
            is_master=True,
            timeout=COLLECTIVE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._tell(port)
        self.together = True
        self._join(store)

    def smallest(self, value: int) -> int:
        result: int = min(value, *self.collect())
        self._tell(result)
        return result


class Follower(_Group):
    """A worker's communicator; rank 0's answers arrive in ``inbox``, one for each message sent to it."""

    def __init__(
        self, rank: int, size: int, pipe: Connection, inbox: queue.SimpleQueue[bytes], *, cuda: bool
    ) -> None:
        super().__init__(rank, size, cuda=cuda)
        self._pipe = pipe
        self._inbox = inbox

    def _exchange(self, value: int | None) -> int:
        self._pipe.send(value)
        return int(self._inbox.get())  # this process is ended when rank 0 is gone

    def meet(self) -> None:
        port = self._exchange(None)
        self._join(TCPStore(_LOOPBACK, port, self.size, is_master=False, timeout=COLLECTIVE_TIMEOUT))

    def smallest(self, value: int) -> int:
        return self._exchange(value)


@dataclasses.dataclass(slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection


class ParallelRunner:
    """The runner of a tensor-parallel engine: a Runner for rank 0 and a worker process for each other rank.

    ConfigError or WorkerDied if one of the ranks cannot load.
    """

    def __init__(self, config: EngineConfig, on_death: OnDeath | None = None) -> None:
        size = config.tensor_parallel
        cuda = config.device != "cpu" and torch.cuda.is_available()
        Shard.of(ModelConfig.from_directory(Path(config.model)), 0, size)
        if cuda and size > torch.cuda.device_count():
            raise ConfigError(
                f"tensor_parallel is {size}, but {torch.cuda.device_count()} CUDA devices are usable here; "
                "lower tensor_parallel or set device to 'cpu'"
            )
        if dist.is_initialized():
            raise ConfigError("tensor_parallel: this process runs another tensor-parallel engine; close it")
        if config.threads is None and not cuda:
            config = dataclasses.replace(config, threads=max(1, torch.get_num_threads() // size))
        self._on_death = on_death
        self._loaded = self._closed = False
        self._dead = threading.Event()
        self._ended = threading.Event()  # set by close(): deaths of workers are expected from then on
        self._workers: list[_Worker] = []
        try:
            for rank in range(1, size):
                self._workers.append(_start(config, rank, cuda=cuda))
            self._group = Leader([worker.pipe for worker in self._workers], cuda=cuda)
            for worker in self._workers:
                threading.Thread(target=self._watch, args=(worker,), daemon=True).start()
            self._runner = runner = Runner(config, self._group)
            self._group.collect()  # each worker reports once more that it is ready
            self._group.together = False
            self._loaded = True
            if self._dead.is_set():  # _watch saw this death before _loaded was set, and did not call on_death
                raise WorkerDied("a tensor-parallel worker died as soon as it had loaded")
        except BaseException as error:
            cause = self._blame(error)
            self.close()
            if cause is error:
                raise
            raise cause from error
        self.layout_digest = runner.layout_digest
        self.dtype = runner.dtype
        self.device = runner.device
        self.vocab_size = runner.vocab_size
        self.eos_token_ids = runner.eos_token_ids
        self.max_model_len = runner.max_model_len
        self.max_num_seqs = runner.max_num_seqs
        self.max_batch_tokens = runner.max_batch_tokens
        self.num_blocks = runner.num_blocks
        self.block_bytes = runner.block_bytes
        self.host_blocks = runner.host_blocks

    def _watch(self, worker: _Worker) -> None:
        """Wait for a worker to die; then end this process if it stays stuck in a collective with it."""
        code = worker.process.wait()
        if self._closed:
            return
        self._dead.set()
        message = f"tensor-parallel rank {worker.rank} died (exit code {code})"
        log.error(message)
        if self._loaded and self._on_death is not None:
            self._on_death(WorkerDied(message))
        if not self._ended.wait(EXIT_TIMEOUT) and self._group.together:
            faulthandler.dump_traceback()
            os._exit(_STUCK)  # the thread is in a collective with a dead peer and cannot be interrupted

    def _blame(self, error: BaseException) -> BaseException:
        """The cause of an error on rank 0: a worker's own error, a worker's death, or the error itself."""
        if isinstance(error, EngineError) or not isinstance(error, (RuntimeError, OSError)):
            return error
        # A collective fails when a peer is gone: wait until the watching thread has noticed the death.
        if not self._dead.wait(EXIT_TIMEOUT):
            return error
        for worker in self._workers:
            with contextlib.suppress(EOFError, OSError):
                while worker.pipe.poll(0):
                    message = worker.pipe.recv()
                    if isinstance(message, EngineError):
                        return message
        codes = {worker.rank: worker.process.poll() for worker in self._workers}
        dead = [f"{rank} (exit code {code})" for rank, code in codes.items() if code is not None]
        return WorkerDied(f"tensor-parallel ranks died: {', '.join(dead)}")

    def execute(self, step: StepInput) -> Tensor | None:
        """As Runner.execute, on all ranks. WorkerDied if a worker has died: the engine cannot continue."""
        try:
            if self._closed or self._dead.is_set():
                raise WorkerDied("a tensor-parallel worker has died; start the engine anew")
            message = step.pack()
            for worker in self._workers:
                worker.pipe.send_bytes(message)
            self._group.together = True
            logits = self._runner.execute(step)
            self._group.together = False
        except Exception as error:
            cause = self._blame(error)
            self.close()
            if cause is error:
                raise
            raise cause from error
        return logits

    def close(self) -> None:
        """End all workers, by SIGKILL: they have nothing to save."""
        self._closed = True
        self._ended.set()
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.pipe.close()
        self._workers = []
        if hasattr(self, "_runner"):
            self._runner.close()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _start(config: EngineConfig, rank: int, *, cuda: bool) -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        # -P: a file in the current folder must not shadow an installed package.
        command = [sys.executable, "-P", "-m", "blockyard.engine.workers", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    pipe = Connection(ours.detach())
    # If the worker is dead already, that is noticed when its answer is awaited.
    with contextlib.suppress(OSError):
        pipe.send((config, rank, cuda))
    return _Worker(rank, process, pipe)


def main(fd: int) -> None:
    """A worker process: load the shard, then compute each step that arrives, until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides when to stop
    pipe = Connection(fd)
    config, rank, cuda = pipe.recv()
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        """In a thread, because the main thread may be in a collective with rank 0 when rank 0 dies."""
        try:
            while True:
                inbox.put(pipe.recv_bytes())
        finally:
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    try:
        runner = Runner(config, Follower(rank, config.tensor_parallel, pipe, inbox, cuda=cuda))
        pipe.send(None)
        while True:
            runner.execute(StepInput.unpack(inbox.get()))
    except BaseException as error:  # noqa: BLE001 - it is passed on to rank 0
        if not isinstance(error, EngineError):
            traceback.print_exc()
            error = WorkerDied(f"tensor-parallel rank {rank} failed: {error}")
        with contextlib.suppress(OSError):
            pipe.send(error)
        sys.stderr.flush()
        os._exit(1)  # at once: an orderly exit would wait for collectives that never complete


if __name__ == "__main__":
    main(int(sys.argv[1]))
