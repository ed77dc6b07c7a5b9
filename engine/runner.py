"""The runner: carries steps out on one device.

What outlives a step stays on the device: weights, the pool, and one row of the block table for each running
sequence. A step brings small diffs (new block ids, the tokens to compute) in one transfer and returns logits;
the slots of the tokens are computed from them on the device in a few vector operations.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from .config import EngineConfig
from .errors import ConfigError
from .kv.host_memory import available_bytes
from .model.config import ModelConfig
from .model.decoder import Alone, Communicator, Model, layout_digest, pool_shape
from .model.identity import WeightsIdentity
from .step import Ints, StepInput

GIB = 1 << 30
CPU_POOL_CAP = 4 * GIB  # on a CPU a server should not take all memory of the machine
CPU_RESERVE = GIB // 2  # for activations, logits and the process itself
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, *range(48, 129, 16), *range(160, 513, 32))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALIGNMENT = 4  # int32 elements; Triton compiles another variant for pointers that are not 16-byte aligned


class Runner:
    """One rank's model, pool and block tables. If loading fails, ConfigError names the setting to change."""

    def __init__(self, config: EngineConfig, comm: Communicator | None = None) -> None:
        _check_settings(config)
        directory = Path(config.model)
        self._comm = comm or Alone()
        self._config = config
        self.model_config = ModelConfig.from_directory(directory)
        self.max_model_len = _max_model_len(config, self.model_config)
        self.device = _device(config, self._comm.rank)
        self.dtype = _dtype(config, self.model_config, self.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.vocab_size = self.model_config.vocab_size
        self.eos_token_ids = self.model_config.eos_token_ids
        on_gpu = self.device.type == "cuda"
        self.max_num_seqs = config.max_num_seqs or (256 if on_gpu else 64)
        self.max_batch_tokens = config.max_batch_tokens or (2048 if on_gpu else 256)
        self.host_blocks = config.host_blocks
        self.layout_digest = ""  # on rank 0 alone
        self._block_tokens = config.block_tokens
        try:
            with torch.inference_mode():
                self._load_and_identify(directory)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            sizes = {
                name: getattr(config, name)
                for name in ("kv_blocks", "kv_bytes", "memory_fraction", "host_blocks")
            }
            given = ", ".join(f"{name}={value}" for name, value in sizes.items() if value)
            raise ConfigError(
                f"out of memory while loading {directory} as {self.dtype} on {self.device} with {given}: "
                f"{error}. Lower kv_blocks, kv_bytes, memory_fraction, host_blocks or max_batch_tokens, or "
                "choose a smaller dtype"
            ) from None

    def _load_and_identify(self, directory: Path) -> None:
        if self._comm.rank != 0:
            self._load(directory)
            return
        with WeightsIdentity(directory) as identity:
            self._load(directory)
            self.layout_digest = layout_digest(
                identity.result(),
                self.model_config,
                dtype=self.dtype,
                block_tokens=self._block_tokens,
                tensor_parallel=self._comm.size,
            )

    def _load(self, directory: Path) -> None:
        config, on_gpu = self._config, self.device.type == "cuda"
        self.model = Model(
            directory,
            self.model_config,
            dtype=self.dtype,
            device=self.device,
            max_positions=self.max_model_len,
            comm=self._comm,
        )
        self._block_shape = pool_shape(
            self.model_config, 1, self.model.shard.num_kv_heads, config.block_tokens
        )[1:]
        self.block_bytes = math.prod(self._block_shape) * self.dtype.itemsize
        # One row for each running sequence, and a spare one of zeros (block 0) for padding and rehearsals.
        width = -(-self.max_model_len // config.block_tokens)
        self._tables = torch.zeros((self.max_num_seqs + 1, width), dtype=torch.int32, device=self.device)
        self._comm.meet()
        self.num_blocks = self._comm.smallest(self._decide_blocks())
        # On a CPU the system commits pages when they are first written.
        self.kv = torch.zeros((self.num_blocks, *self._block_shape), dtype=self.dtype, device=self.device)
        self.host_kv = torch.empty(
            (self.host_blocks, *self._block_shape), dtype=self.dtype, pin_memory=on_gpu
        )
        # Everything that is built or compiled at first use is used here, before the first request.
        self._rehearse(self.max_batch_tokens if on_gpu else min(self.max_batch_tokens, 16))
        self._graphs = Graphs(self) if on_gpu and config.cuda_graphs else None

    # ── Sizing the pool ───────────────────────────────────────────────────────────────────────────

    def _decide_blocks(self) -> int:
        """kv_blocks, else kv_bytes, else a share of the memory that is free after the weights are loaded."""
        config = self._config
        host_bytes = self.host_blocks * self.block_bytes
        free_host = available_bytes() // self._comm.size
        if host_bytes > free_host:
            raise ConfigError(
                f"host_blocks is {self.host_blocks}, which take {host_bytes / GIB:.2f} GiB of this rank's "
                f"{free_host / GIB:.2f} GiB of free host memory; lower host_blocks"
            )
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else free_host - host_bytes
        if config.kv_blocks is not None:
            blocks, source = config.kv_blocks, "kv_blocks"
        elif config.kv_bytes is not None:
            blocks, source = config.kv_bytes // self.block_bytes, "kv_bytes"
        else:
            room = self._gpu_room() if on_gpu else self._cpu_room(free)
            # Never more than the largest possible batch could use.
            useful = (self.max_num_seqs + 1) * self._tables.shape[1]
            blocks, source = min(useful, room // self.block_bytes), "memory_fraction"
        if blocks < 1:
            raise ConfigError(
                f"{source} leaves no room for a single KV block of {self.block_bytes} bytes, with "
                f"{free / GIB:.2f} GiB free on {self.device}. Raise {source}, or lower max_batch_tokens or "
                "choose a smaller dtype"
            )
        if blocks * self.block_bytes > free:
            raise ConfigError(
                f"{blocks} KV blocks take {blocks * self.block_bytes / GIB:.2f} GiB but {free / GIB:.2f} GiB "
                f"are free on {self.device}; lower {source}"
            )
        return blocks

    def _cpu_room(self, free: int) -> int:
        return min(CPU_POOL_CAP // self._comm.size, int(free * self._config.memory_fraction) - CPU_RESERVE)

    def _gpu_room(self) -> int:
        """Bytes that ``memory_fraction`` of the device leaves besides the largest step, which is run to
        measure it.
        """
        self.kv = torch.zeros((1, *self._block_shape), dtype=self.dtype, device=self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._rehearse(self.max_batch_tokens)
        torch.cuda.synchronize(self.device)
        step = torch.cuda.max_memory_allocated(self.device) - before
        sampling = 4 * self.max_num_seqs * self.vocab_size * 4  # a few float32 copies of the largest logits
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free - total * (1 - self._config.memory_fraction)) - step - sampling

    def _rehearse(self, tokens: int) -> None:
        """Run a step of ``tokens`` tokens, and one of as many decodes as possible. They write to block 0
        alone.
        """
        empty = np.empty(0, dtype=np.int32)
        pairs = empty.reshape(0, 2)
        chunks = [min(self.max_model_len, tokens)] * max(1, tokens // self.max_model_len)
        decodes = [1] * min(self.max_num_seqs, tokens)
        for lengths, count in ((chunks, 0), (decodes, len(decodes))):
            counts = np.array(lengths, dtype=np.int32)
            self._forward(
                StepInput(
                    swap_out=pairs,
                    swap_in=pairs,
                    block_copies=pairs,
                    table_updates=empty.reshape(0, 3),
                    rows=np.full(len(counts), self.max_num_seqs, dtype=np.int32),
                    starts=np.zeros_like(counts),
                    counts=counts,
                    token_ids=np.zeros(counts.sum(), dtype=np.int32),
                    sampled=np.arange(min(len(counts), self.max_num_seqs), dtype=np.int32),
                    num_decodes=count,
                )
            )

    # ── Steps ─────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def execute(self, step: StepInput) -> Tensor | None:
        """Carry out one step -> logits [L, V] of ``step.sampled`` (None if there are none).

        They are valid until the next step. On ranks other than 0 the result is None.
        """
        for source, destination, pairs in (
            (self.kv, self.host_kv, step.swap_out),
            (self.host_kv, self.kv, step.swap_in),
            (self.kv, self.kv, step.block_copies),
        ):
            if len(pairs):
                kernels.copy_blocks(source, destination, torch.from_numpy(pairs.astype(np.int64)))
        if self._graphs is not None and self._graphs.fit(step):
            return self._graphs.replay(step)
        return self._forward(step)

    def update_tables(self, rows: Tensor, columns: Tensor, ids: Tensor) -> None:
        """Write block ids int32 [N] to the tables."""
        if len(ids):
            self._tables[rows.long(), columns.long()] = ids

    def _forward(self, step: StepInput) -> Tensor | None:
        counts = step.counts
        ends = np.cumsum(counts, dtype=np.int32)
        # Token i of a chunk stands at its sequence's start + i.
        shift = np.repeat(step.starts - (ends - counts), counts)
        context_lens = step.starts + counts
        rows, columns, ids, token_ids, positions, token_rows, sequences, query_starts, lens, last = (
            self.stage(
                *step.table_updates.T,
                step.token_ids,
                np.arange(len(shift), dtype=np.int32) + shift,
                np.repeat(step.rows, counts),
                step.rows,
                np.concatenate((ends[:1] * 0, ends)),
                context_lens,
                ends[step.sampled] - 1,
            )
        )
        self.update_tables(rows, columns, ids)
        if not len(counts):
            return None
        batch = kernels.PagedBatch(
            block_tables=self._tables,
            rows=sequences,
            query_starts=query_starts,
            context_lens=lens,
            num_decodes=step.num_decodes,
            max_query_len=int(counts.max()),
            max_context_len=int(context_lens.max()),
        )
        places = positions.long()
        slots = self.slots(token_rows, places)
        return self.model.forward(token_ids.long(), places, slots, self.kv, batch, last.long())

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Slots (block * block_tokens + offset) of ``positions`` int64 [T] in ``rows`` [T] -> int64 [T]."""
        blocks = self._tables[rows.long(), positions // self._block_tokens].long()
        return blocks * self._block_tokens + positions % self._block_tokens

    def stage(self, *arrays: Ints) -> list[Tensor]:
        """Flat int32 arrays -> tensors on the device, by one asynchronous transfer."""
        places, total = [], 0
        for array in arrays:
            places.append((total, total + len(array)))
            total += -(-len(array) // ALIGNMENT) * ALIGNMENT
        # No wait is needed: torch's allocator reuses pinned memory only after the copy from it is done.
        host = torch.empty(total, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        buffer = host.numpy()
        for array, (begin, end) in zip(arrays, places, strict=True):
            buffer[begin:end] = array
        packed = host.to(self.device, non_blocking=True)
        return [packed[begin:end] for begin, end in places]

    def close(self) -> None:
        """Free the large tensors; the runner cannot be used afterwards."""
        self._graphs = None
        self.kv = self.host_kv = self._tables = torch.empty(0)
        self.__dict__.pop("model", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Graphs:
    """CUDA graphs of pure decode steps, one for each padded batch size.

    Replaying a graph costs one launch, instead of about ten kernel launches per layer. Padding sequences have
    a context of 0 and write to slot -1; they use the spare row of the tables. All graphs are captured at
    start, the largest first. They share one memory pool, because only one of them runs at a time.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sizes = sorted({min(size, runner.max_num_seqs) for size in GRAPH_SIZES})
        most = -(-self._sizes[-1] // ALIGNMENT) * ALIGNMENT
        # Row, position (-1 for padding) and token of each sequence, at fixed addresses, as graphs require.
        self._inputs = torch.zeros((3, most), dtype=torch.int32, device=runner.device)
        self._inputs[0] = runner.max_num_seqs
        self._inputs[1] = -1
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        memory = None
        for size in reversed(self._sizes):
            stream = torch.cuda.Stream(runner.device)  # type: ignore[no-untyped-call] # torch's gap
            stream.wait_stream(torch.cuda.current_stream(runner.device))
            with torch.cuda.stream(stream):
                self._decode(size)  # compiles kernels and sizes workspaces outside of the capture
            torch.cuda.current_stream(runner.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                logits = self._decode(size)
            memory = graph.pool()
            self._graphs[size] = graph, logits

    def fit(self, step: StepInput) -> bool:
        """Whether a graph can run the step: all sequences are sampled decodes, no more than were captured."""
        count = len(step.rows)
        return 0 < count == step.num_decodes == len(step.sampled) and count <= self._sizes[-1]

    def replay(self, step: StepInput) -> Tensor | None:
        count, most = len(step.rows), self._inputs.shape[1]
        size = next(s for s in self._sizes if s >= count)
        inputs = np.empty((3, most), dtype=np.int32)
        inputs[:, count:] = [[self._runner.max_num_seqs], [-1], [0]]
        inputs[:, :count] = step.rows, step.starts, step.token_ids
        packed, rows, columns, ids = self._runner.stage(inputs.ravel(), *step.table_updates.T)
        self._runner.update_tables(rows, columns, ids)
        self._inputs.copy_(packed.view_as(self._inputs))
        graph, logits = self._graphs[size]
        graph.replay()
        return None if logits is None else logits[:count]

    def _decode(self, size: int) -> Tensor | None:
        runner = self._runner
        rows, starts, token_ids = (line[:size] for line in self._inputs)
        positions = starts.clamp_min(0).long()
        batch = kernels.PagedBatch(
            block_tables=runner._tables,
            rows=rows,
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=runner.device),
            context_lens=starts + 1,
            num_decodes=size,
            max_query_len=1,
            max_context_len=runner.max_model_len,
        )
        slots = torch.where(starts >= 0, runner.slots(rows, positions), -1)
        every = torch.arange(size, device=runner.device)
        return runner.model.forward(token_ids.long(), positions, slots, runner.kv, batch, every)


def _check_settings(config: EngineConfig) -> None:
    limits: dict[str, tuple[float, float]] = {
        "block_tokens": (8, 64),
        "host_blocks": (0, math.inf),
        "max_num_seqs": (1, 65536),
        "max_batch_tokens": (1, math.inf),
        "threads": (1, 4096),
    }
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            above = "" if most == math.inf else f" and at most {most:.0f}"
            raise ConfigError(f"{name} is {value}; it must be at least {least:.0f}{above}")
    if not 0 < config.memory_fraction <= 1:
        raise ConfigError(f"memory_fraction is {config.memory_fraction}; it must be above 0 and at most 1")
    if config.dtype != "auto" and config.dtype not in DTYPES:
        raise ConfigError(f"dtype is {config.dtype!r}; it must be auto, {', '.join(DTYPES)}")


def _device(config: EngineConfig, rank: int) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but no CUDA device is usable here; set device to 'cpu' or 'auto'")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return DTYPES[model.dtype] if model.dtype in ("float16", "bfloat16") else torch.bfloat16


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_model_len
    if wanted is not None and not 1 <= wanted <= model.max_positions:
        raise ConfigError(f"max_model_len is {wanted}; this model has 1 to {model.max_positions} positions")
    return wanted or model.max_positions


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own exception only on GPUs; on a CPU only the message tells."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
