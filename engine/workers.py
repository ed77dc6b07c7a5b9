"""Tensor parallelism: the other ranks as processes of their own, under the one central scheduler.

Rank 0 lives in the engine's process and is an ordinary Runner. Each step is sent once to every worker,
as one message over a pipe; inside the pass ranks only sum activations (gloo on CPUs, NCCL on GPUs). A
pipe rather than a collective carries the steps because an idle engine then waits in no collective that
could time out, and because the end of a pipe tells of a death at once, in either direction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import logging
import multiprocessing
import os
import socket
import threading
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import EngineConfig
from .errors import ConfigError, WorkerDied
from .runner import Runner
from .step import StepInput, StepRunner

log = logging.getLogger("blockyard.engine")

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
LOAD_TIMEOUT = 600.0  # seconds a worker may take to load its shard
EXIT_TIMEOUT = 5.0


def load_runner(config: EngineConfig) -> StepRunner:
    """The runner a config asks for: on this process alone, or with tensor-parallel workers."""
    if config.tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel is {config.tensor_parallel}; it must be at least 1")
    return Runner(config) if config.tensor_parallel == 1 else ParallelRunner(config)


class Group:
    """The communicator of one rank of several."""

    def __init__(self, rank: int, size: int, port: int, *, cuda: bool) -> None:
        self.rank, self.size = rank, size
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0)
        return None if parts is None else torch.cat(parts, dim=-1)


class ParallelRunner:
    """A Runner for rank 0 and the processes of all other ranks, behind a Runner's interface."""

    def __init__(self, config: EngineConfig) -> None:
        size = config.tensor_parallel
        cuda = config.device != "cpu" and torch.cuda.is_available()
        if config.threads is None and not cuda:
            config = dataclasses.replace(config, threads=max(1, torch.get_num_threads() // size))
        port = _free_port()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._workers: list[Any] = []
        self._closing = False
        try:
            for rank in range(1, size):
                ours, theirs = context.Pipe()
                worker = context.Process(
                    target=work,
                    args=(config, rank, port, cuda, theirs),
                    name=f"blockyard-rank-{rank}",
                    daemon=True,
                )
                worker.start()
                theirs.close()
                self._pipes.append(ours)
                self._workers.append(worker)
            self._watcher = threading.Thread(target=self._watch, daemon=True, name="worker-watch")
            self._dead = threading.Event()
            self._watcher.start()
            self._load(config, port, cuda)
        except BaseException:
            self.close()
            raise

    def _load(self, config: EngineConfig, port: int, cuda: bool) -> None:
        """Load all ranks; the pool is as large as the smallest rank's memory allows."""
        group = Group(0, config.tensor_parallel, port, cuda=cuda)
        self._runner = runner = Runner(config, group)
        sizes = [runner.num_blocks]
        for pipe in self._pipes:
            if not pipe.poll(LOAD_TIMEOUT):
                raise ConfigError(f"a tensor-parallel worker was not ready after {LOAD_TIMEOUT:.0f} s")
            try:
                answer = pipe.recv()
            except EOFError:
                raise WorkerDied(
                    "a tensor-parallel worker died while it loaded; its output says why"
                ) from None
            if isinstance(answer, Exception):
                raise answer
            sizes.append(answer)
        self.num_blocks = min(sizes)
        self.layout_digest = runner.layout_digest
        self.dtype = runner.dtype
        self.device = runner.device
        self.vocab_size = runner.vocab_size
        self.eos_token_ids = runner.eos_token_ids
        self.max_model_len = runner.max_model_len
        self.max_num_seqs = runner.max_num_seqs
        self.max_batch_tokens = runner.max_batch_tokens
        self.block_bytes = runner.block_bytes
        self.host_blocks = runner.host_blocks

    def _watch(self) -> None:
        """Notice a dead worker at once; if the engine is stuck in a collective with it, end the process."""
        wait([worker.sentinel for worker in self._workers])
        if self._closing:
            return
        self._dead.set()
        names = [f"{w.name} (exit code {w.exitcode})" for w in self._workers if not w.is_alive()]
        log.error("tensor-parallel worker died: %s", ", ".join(names))
        threading.Event().wait(EXIT_TIMEOUT)
        if not self._closing:
            faulthandler.dump_traceback()
            os._exit(70)  # still computing with a dead peer: nobody can raise in that thread

    def execute(self, step: StepInput) -> Tensor | None:
        """As Runner.execute, on all ranks. WorkerDied if one of them is gone; the engine cannot go on."""
        message = step.pack()
        try:
            if self._dead.is_set():
                raise WorkerDied("a tensor-parallel worker died")
            for pipe in self._pipes:
                pipe.send_bytes(message)
            return self._runner.execute(step)
        except (OSError, RuntimeError) as error:
            self.close()
            raise WorkerDied(f"a tensor-parallel worker died during a step: {error}") from error
        except WorkerDied:
            self.close()
            raise

    def close(self) -> None:
        """End all workers: asked by closing their pipes, then killed."""
        self._closing = True
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(EXIT_TIMEOUT)
            if worker.is_alive():
                worker.kill()
                worker.join(EXIT_TIMEOUT)
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def work(config: EngineConfig, rank: int, port: int, cuda: bool, pipe: Connection) -> None:
    """A worker process: load the shard, then compute each step that comes, until the pipe ends."""
    try:
        runner = Runner(config, Group(rank, config.tensor_parallel, port, cuda=cuda))
    except Exception as error:
        pipe.send(error if isinstance(error, ConfigError) else WorkerDied(f"rank {rank}: {error}"))
        return
    pipe.send(runner.num_blocks)
    # The main thread may be deep in a collective when rank 0 goes, so a thread listens to the pipe.
    steps: list[StepInput] = []
    arrived = threading.Semaphore(0)

    def listen() -> None:
        try:
            while True:
                steps.append(StepInput.unpack(pipe.recv_bytes()))
                arrived.release()
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        arrived.acquire()
        runner.execute(steps.pop(0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
