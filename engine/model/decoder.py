"""The decoder: token ids and paged KV in, logits out; one generic model for the whole Llama family.

This is the only file that defines a transformer layer. Every operation is called through ``kernels``, which
chooses the implementation for the device. Under tensor parallelism each rank holds an equal share of the
heads, of the MLP and of the vocabulary (Megatron-LM's split: two sums over the ranks per layer).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ... import kernels
from ..errors import ConfigError
from .config import ModelConfig, RopeConfig
from .weights import Weights

BLOCK_ORDER = "layers, k and v, kv_heads, block_tokens, head_dim"


def pool_shape(config: ModelConfig, blocks: int, kv_heads: int, block_tokens: int) -> tuple[int, ...]:
    """The layout of a pool; no other code decides it. Block-major, so that a block is one contiguous slab."""
    return (blocks, config.num_layers, 2, kv_heads, block_tokens, config.head_dim)


class Communicator(Protocol):
    """How the ranks of one engine exchange values."""

    rank: int
    size: int

    def meet(self) -> None:
        """Wait until every rank has loaded its weights. Collectives may be used only after this."""

    def smallest(self, value: int) -> int:
        """The minimum of ``value`` over all ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place where possible."""

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """[T, N / size] of every rank -> [T, N] on rank 0, None elsewhere."""


class Alone:
    """The communicator of a single rank."""

    rank = 0
    size = 1

    def meet(self) -> None:
        pass

    def smallest(self, value: int) -> int:
        return value

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        return x


@dataclass(slots=True)
class _Layer:
    input_norm: Tensor
    qkv: kernels.Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: kernels.Linear
    post_norm: Tensor
    gate_up: kernels.Linear
    down: kernels.Linear


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of each layer."""

    num_heads: int
    num_kv_heads: int
    kv_part: int  # index of this rank's slice, of kv_parts slices of the KV heads
    kv_parts: int
    vocab: int  # padded to a multiple of the ranks

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> Shard:
        heads, kv_heads = config.num_heads, config.num_kv_heads
        fits = heads % size == 0 and config.intermediate_size % size == 0
        if not fits or (kv_heads % size and size % kv_heads):
            raise ConfigError(
                f"tensor_parallel is {size}, but the model has {heads} heads, {kv_heads} KV heads and an "
                f"intermediate size of {config.intermediate_size}: each must divide evenly (KV heads may be "
                "repeated). Choose another tensor_parallel"
            )
        if kv_heads % size == 0:
            kv_parts, kv_part = size, rank
        else:  # fewer KV heads than ranks: each is kept by several
            kv_parts, kv_part = kv_heads, rank // (size // kv_heads)
        return cls(heads // size, kv_heads // kv_parts, kv_part, kv_parts, -(-config.vocab_size // size))


class Model:
    """The weights of one rank and the forward pass over them. Inference only."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        comm: Communicator | None = None,
    ) -> None:
        self.config = config
        self._comm = comm or Alone()
        self.shard = Shard.of(config, self._comm.rank, self._comm.size)
        self._scale = config.head_dim**-0.5
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_positions, device)
        with Weights(directory, dtype, device) as weights:
            self._embedding = weights.get(
                "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
            )
            self._layers = [self._load_layer(weights, f"model.layers.{i}.") for i in range(config.num_layers)]
            self._norm = weights.get("model.norm.weight", (config.hidden_size,))
            self._head = kernels.prepare_linear(self._load_head(weights), None)
            tied = {"lm_head.weight"} if config.tie_embeddings else set()  # then a copy of the embedding
            unknown = [n for n in weights.unread if n not in tied and not n.endswith(".inv_freq")]
        if unknown:  # an ignored tensor, such as a bias, would make the answers subtly wrong
            raise ConfigError(
                f"model {directory} has {len(unknown)} tensors that a {config.architecture} with its "
                f"config.json has no place for: {', '.join(unknown[:4])}, ..."
            )

    def _load_layer(self, weights: Weights, prefix: str) -> _Layer:
        config, shard, rank, size = self.config, self.shard, self._comm.rank, self._comm.size
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        kv = (kv_heads, shard.kv_part, shard.kv_parts)

        def fused(parts: dict[str, tuple[int, int, int]], bias: bool) -> kernels.Linear:
            """One linear layer from several tensors: name -> (rows, index of this rank's slice, slices)."""

            def stacked(kind: str, columns: tuple[int, ...]) -> Tensor:
                slices = []
                for name, (rows, index, count) in parts.items():
                    step = rows // count
                    where = {"begin": index * step, "end": (index + 1) * step}
                    slices.append(weights.get(f"{prefix}{name}.{kind}", (rows, *columns), **where))
                return torch.cat(slices)

            return kernels.prepare_linear(stacked("weight", (hidden,)), stacked("bias", ()) if bias else None)

        def summed(name: str, columns: int, bias: bool) -> kernels.Linear:
            """A layer split by columns: each rank multiplies its columns, all_reduce sums the products."""
            step = columns // size
            where = {"axis": 1, "begin": rank * step, "end": (rank + 1) * step}
            weight = weights.get(f"{prefix}{name}.weight", (hidden, columns), **where)
            added = weights.get(f"{prefix}{name}.bias", (hidden,)) if bias else None
            return kernels.prepare_linear(weight, added if rank == 0 else None)  # added once

        qkv = {"self_attn.q_proj": (heads, rank, size), "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        gate_up = {"mlp.gate_proj": (inner, rank, size), "mlp.up_proj": (inner, rank, size)}
        head_norm = (config.head_dim,)
        return _Layer(
            input_norm=weights.get(prefix + "input_layernorm.weight", (hidden,)),
            qkv=fused(qkv, config.attention_bias),
            q_norm=weights.get(prefix + "self_attn.q_norm.weight", head_norm) if config.qk_norm else None,
            k_norm=weights.get(prefix + "self_attn.k_norm.weight", head_norm) if config.qk_norm else None,
            output=summed("self_attn.o_proj", heads, config.output_bias),
            post_norm=weights.get(prefix + "post_attention_layernorm.weight", (hidden,)),
            gate_up=fused(gate_up, config.mlp_bias),
            down=summed("mlp.down_proj", inner, config.mlp_bias),
        )

    def _load_head(self, weights: Weights) -> Tensor:
        """This rank's rows of the output matrix, zero-padded so that all ranks have the same number."""
        config, rows = self.config, self.shard.vocab
        begin = self._comm.rank * rows
        if config.tie_embeddings:
            part = self._embedding[begin : begin + rows]
        else:
            shape = (config.vocab_size, config.hidden_size)
            part = weights.get("lm_head.weight", shape, begin=begin, end=begin + rows)
        missing = rows - len(part)
        return torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv: Tensor,
        batch: kernels.PagedBatch,
        logit_rows: Tensor,
    ) -> Tensor | None:
        """One pass over T tokens: their KV is written to ``slots`` and read through ``batch``.

        token_ids, positions int [T]; slots int64 [T]; kv [num_blocks, layers, 2, kv_heads, block_tokens,
        head_dim]; logit_rows int64 [L]: the tokens whose logits are wanted -> [L, V] (None on other ranks
        than 0).
        """
        config, comm = self.config, self._comm
        heads, eps = self.shard.num_heads, config.rms_norm_eps
        residual = self._embedding[token_ids]
        x = kernels.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if index:
                x = kernels.add_rms_norm(x, residual, layer.input_norm, eps)
            layer_kv = kv[:, index]
            q = kernels.rope_and_write_kv(
                kernels.linear(x, layer.qkv),
                layer_kv,
                slots,
                positions,
                self._cos,
                self._sin,
                num_heads=heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=eps,
            )
            attended = kernels.paged_attention(q, layer_kv, batch, scale=self._scale)
            x = comm.all_reduce(kernels.linear(attended.view(len(attended), -1), layer.output))
            x = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
            x = comm.all_reduce(kernels.linear(kernels.swiglu(kernels.linear(x, layer.gate_up)), layer.down))
        x, residual = x[logit_rows], residual[logit_rows]
        logits = comm.gather_columns(
            kernels.linear(kernels.add_rms_norm(x, residual, self._norm, eps), self._head)
        )
        return None if logits is None else logits[:, : config.vocab_size]


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [positions, head_dim / 2], computed as transformers does."""
    frequency = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "divided":
        if len(rope.divisors) != head_dim // 2:
            raise ConfigError(
                f"RoPE has {len(rope.divisors)} divisors, but a head has {head_dim // 2} frequencies, and "
                "all of it must be rotated. Choose another model"
            )
        frequency = frequency / torch.tensor(rope.divisors)
    elif rope.kind == "llama3":
        frequency = _llama3_frequencies(frequency, rope)
    elif rope.kind == "yarn":
        frequency = _yarn_frequencies(frequency, rope, head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.int64).float(), frequency)
    return (angles.cos() * rope.scale).to(device), (angles.sin() * rope.scale).to(device)


def _llama3_frequencies(frequency: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequency
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequency / rope.factor + smooth * frequency
    stretched = torch.where(wavelength > low, frequency / rope.factor, frequency)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, stretched)


def _yarn_frequencies(frequency: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): high frequencies are kept, low frequencies are stretched."""

    def dimension(turns: float) -> float:
        """The (fractional) index of the frequency that makes ``turns`` turns in the original context."""
        return (
            head_dim
            * math.log(rope.original_max_positions / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequency / rope.factor * stretch + frequency * (1 - stretch)


def layout_digest(
    weights: str, config: ModelConfig, *, dtype: torch.dtype, block_tokens: int, tensor_parallel: int
) -> str:
    """Hash of all properties that make two engines' blocks exchangeable, and of none of one instance.

    ``weights`` is the checkpoint's identity.
    """
    facts = {
        "weights": weights,
        "order": BLOCK_ORDER,
        "dtype": str(dtype),
        "block_tokens": block_tokens,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": dataclasses.asdict(config.rope),
        "tensor_parallel": tensor_parallel,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
