"""The runner: carries steps out on one device.

Everything that outlives a step stays where it is: weights, the pool, and one row of the block table for
each running sequence. A step brings small diffs (new block ids, the tokens to compute) and takes logits
away; positions and slots are computed from them in a handful of vector operations.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from .config import EngineConfig
from .errors import ConfigError
from .model import Alone, Communicator, Model, layout_digest
from .model_config import ModelConfig
from .step import StepInput

GIB = 1 << 30
CPU_POOL_CAP = 4 * GIB  # on a CPU nobody expects a server to take all memory there is
GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pool_shape(config: ModelConfig, blocks: int, kv_heads: int, block_tokens: int) -> tuple[int, ...]:
    """The layout of a pool, decided here alone: block-major, so that a block is one contiguous slab."""
    return (blocks, config.num_layers, 2, kv_heads, block_tokens, config.head_dim)


class Runner:
    """One rank's model, pool and table rows. ConfigError says which setting to change when it cannot load."""

    def __init__(self, config: EngineConfig, comm: Communicator | None = None) -> None:
        directory = Path(config.model)
        self.comm = comm = comm or Alone()
        self.device = _device(config, comm.rank)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model_config = ModelConfig.from_directory(directory)
        self.dtype = _dtype(config, self.model_config, self.device)
        self.vocab_size = self.model_config.vocab_size
        self.eos_token_ids = self.model_config.eos_token_ids
        self.max_model_len = _max_model_len(config, self.model_config)
        on_gpu = self.device.type == "cuda"
        self.max_num_seqs = config.max_num_seqs or (256 if on_gpu else 64)
        self.max_batch_tokens = config.max_batch_tokens or (2048 if on_gpu else 256)
        if self.max_batch_tokens < 1 or self.max_num_seqs < 1:
            raise ConfigError("max_batch_tokens and max_num_seqs must be at least 1")
        self.layout_digest = layout_digest(
            directory,
            self.model_config,
            dtype=self.dtype,
            block_tokens=config.block_tokens,
            tensor_parallel=comm.size,
        )
        self._block_tokens = config.block_tokens
        try:
            with torch.inference_mode():
                self._load(directory, config)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ConfigError(
                f"out of memory while loading {directory} as {self.dtype} with {config.kv_blocks or 'automatic'} "
                f"kv_blocks: {error}. Lower kv_blocks, kv_bytes, memory_fraction or max_batch_tokens, or choose a "
                "smaller dtype"
            ) from None

    def _load(self, directory: Path, config: EngineConfig) -> None:
        self.model = Model(
            directory,
            self.model_config,
            dtype=self.dtype,
            device=self.device,
            max_positions=self.max_model_len,
            comm=self.comm,
        )
        shape = pool_shape(self.model_config, 1, self.model.shard.num_kv_heads, config.block_tokens)
        self.block_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.num_blocks = self._decide_blocks(config)
        self.host_blocks = config.host_blocks
        self.kv = torch.zeros((self.num_blocks, *shape[1:]), dtype=self.dtype, device=self.device)
        self.host_kv = torch.empty(
            (self.host_blocks, *shape[1:]), dtype=self.dtype, pin_memory=self.device.type == "cuda"
        )
        width = -(-self.max_model_len // config.block_tokens)
        self._tables = torch.zeros((self.max_num_seqs + 1, width), dtype=torch.int32, device=self.device)
        self._graphs = Graphs(self) if self.device.type == "cuda" and config.cuda_graphs else None

    # ── Sizing the pool ───────────────────────────────────────────────────────────────────────────

    def _decide_blocks(self, config: EngineConfig) -> int:
        """kv_blocks, else kv_bytes, else a share of what is free now that the weights are there."""
        if config.kv_blocks is not None:
            blocks, source = config.kv_blocks, "kv_blocks"
        elif config.kv_bytes is not None:
            blocks, source = config.kv_bytes // self.block_bytes, "kv_bytes"
        else:
            blocks, source = self._measured_bytes(config) // self.block_bytes, "memory_fraction"
        if blocks < 1:
            raise ConfigError(
                f"{source} leaves room for {blocks} KV blocks of {self.block_bytes} bytes; at least 1 is needed, "
                "and as many as the longest request has tokens / block_tokens. Raise it"
            )
        available = self._available_bytes()
        if blocks * self.block_bytes > available:
            raise ConfigError(
                f"{blocks} KV blocks take {blocks * self.block_bytes / GIB:.2f} GiB but {available / GIB:.2f} GiB "
                f"are free on {self.device}; lower {source}"
            )
        return blocks

    def _available_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return _available_host_bytes()

    def _measured_bytes(self, config: EngineConfig) -> int:
        if self.device.type != "cuda":
            # Never more than the longest batch could use, nor more than a polite share of the machine.
            useful = self.max_num_seqs * self.max_model_len // config.block_tokens * self.block_bytes
            share = int(_available_host_bytes() * config.memory_fraction) // self.comm.size - GIB // 2
            return min(useful, CPU_POOL_CAP, share)
        # What a full step needs besides is measured by running one.
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._rehearse()
        step = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free - total * (1 - config.memory_fraction)) - step

    def _rehearse(self) -> None:
        """One full prefill step that writes nothing, for its peak memory."""
        tokens = self.max_batch_tokens
        shape = pool_shape(self.model_config, 1, self.model.shard.num_kv_heads, self._block_tokens)
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        ints = zeros.int()
        batch = kernels.PagedBatch(
            block_tables=ints[:1].view(1, 1),
            rows=ints[:1],
            query_starts=torch.tensor([0, tokens], dtype=torch.int32, device=self.device),
            context_lens=torch.tensor([0], dtype=torch.int32, device=self.device),
            num_decodes=0,
            max_query_len=tokens,
            max_context_len=0,
        )
        kv = torch.zeros(shape, dtype=self.dtype, device=self.device)
        rows = zeros[: min(tokens, self.max_num_seqs)]
        self.model.forward(zeros, zeros, zeros - 1, kv, batch, rows)

    # ── Steps ─────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def execute(self, step: StepInput) -> Tensor | None:
        """Carry out one step -> logits [L, V] of ``step.sampled`` (None if there are none)."""
        kernels.copy_blocks(self.kv, self.host_kv, _pairs(step.swap_out))
        kernels.copy_blocks(self.host_kv, self.kv, _pairs(step.swap_in))
        kernels.copy_blocks(self.kv, self.kv, _pairs(step.block_copies))
        if len(step.table_updates):
            rows, columns, ids = torch.from_numpy(step.table_updates.T.copy()).to(self.device)
            self._tables[rows.long(), columns.long()] = ids
        if not len(step.rows):
            return None
        if self._graphs is not None and self._graphs.fit(step):
            return self._graphs.replay(step)
        return self._forward(step)

    def _forward(self, step: StepInput) -> Tensor | None:
        counts = step.counts
        ends = np.cumsum(counts, dtype=np.int32)
        starts = ends - counts
        # Token i of a chunk stands at its sequence's start + i.
        offset = np.arange(len(step.token_ids), dtype=np.int32) - np.repeat(starts, counts)
        positions = np.repeat(step.starts, counts) + offset
        token_rows = np.repeat(step.rows, counts)
        to = self._to_device
        device_positions = to(positions).long()
        blocks = self._tables[to(token_rows).long(), device_positions // self._block_tokens].long()
        context_lens = step.starts + counts
        batch = kernels.PagedBatch(
            block_tables=self._tables,
            rows=to(step.rows),
            query_starts=to(np.concatenate(([0], ends)).astype(np.int32)),
            context_lens=to(context_lens),
            num_decodes=step.num_decodes,
            max_query_len=int(counts.max()),
            max_context_len=int(context_lens.max()),
        )
        logits = self.model.forward(
            to(step.token_ids).long(),
            device_positions,
            blocks * self._block_tokens + device_positions % self._block_tokens,
            self.kv,
            batch,
            to(ends[step.sampled] - 1).long(),
        )
        return logits if len(step.sampled) else None

    def _to_device(self, values: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Drop what is large; a runner is of no use afterwards."""
        self.kv = self.host_kv = self._tables = torch.empty(0)
        self._graphs = None


class Graphs:
    """CUDA graphs of pure decode steps, one for each padded batch size.

    Replaying a graph costs one launch where a step has some ten kernels a layer. Padding sequences have
    a context of 0 and write to slot -1; they use the spare last row of the tables. Graphs are captured
    when a size is first wanted, and share one memory pool.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sizes = [size for size in GRAPH_SIZES if size <= runner.max_num_seqs]
        most = self._sizes[-1]
        self._host = torch.zeros((3, most), dtype=torch.int32, pin_memory=True)  # rows, starts, token ids
        self._inputs = torch.zeros((3, most), dtype=torch.int32, device=runner.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self._memory: tuple[int, int] | None = None

    def fit(self, step: StepInput) -> bool:
        """Whether a step is a decode of all its sequences, of a size that is captured."""
        count = len(step.rows)
        return count == step.num_decodes == len(step.sampled) and count <= self._sizes[-1]

    def replay(self, step: StepInput) -> Tensor | None:
        count = len(step.rows)
        size = next(s for s in self._sizes if s >= count)
        self._host[0, :size] = self._runner.max_num_seqs  # padding: the spare row ...
        self._host[1, :size] = -1  # ... at no position
        for line, values in zip(self._host, (step.rows, step.starts, step.token_ids), strict=True):
            line[:count] = torch.from_numpy(values)
        self._inputs.copy_(self._host, non_blocking=True)
        if size not in self._graphs:
            self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        # The staging buffer is written again in the next step; the copy out of it must have happened.
        torch.cuda.current_stream().synchronize()
        return None if logits is None else logits[:count]

    def _capture(self, size: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decode(size)  # compiles kernels and sizes workspaces outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._decode(size)
        self._memory = graph.pool()
        self._graphs[size] = graph, logits

    def _decode(self, size: int) -> Tensor | None:
        runner = self._runner
        rows, starts, token_ids = (line[:size] for line in self._inputs)
        real = starts >= 0
        positions = starts.clamp_min(0).long()
        block_tokens = runner._block_tokens
        blocks = runner._tables[rows.long(), positions // block_tokens].long()
        slots = torch.where(real, blocks * block_tokens + positions % block_tokens, -1)
        batch = kernels.PagedBatch(
            block_tables=runner._tables,
            rows=rows,
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=runner.device),
            context_lens=starts + 1,
            num_decodes=size,
            max_query_len=1,
            max_context_len=runner.max_model_len,
        )
        every = torch.arange(size, device=runner.device)
        return runner.model.forward(token_ids.long(), positions, slots, runner.kv, batch, every)


def _pairs(pairs: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
    return torch.from_numpy(pairs.astype(np.int64))


def _device(config: EngineConfig, rank: int) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but no CUDA device is usable here; set device to 'cpu' or 'auto'")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel needs a GPU for each of its ranks; rank {rank} finds {torch.cuda.device_count()}"
        )
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


def _available_host_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or what the container's limit leaves."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available
