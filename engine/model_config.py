"""ModelConfig: the numbers of one decoder, read from Hugging Face's config.json, with no tensors in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base ``theta`` and, with ``kind`` llama3 or linear, how frequencies are stretched."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    tie_embeddings: bool
    attention_bias: bool  # on q, k and v
    output_bias: bool  # on o
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read config.json (of transformers 4 or 5); ConfigError names what this engine cannot run."""
        path = directory / "config.json"
        if not path.is_file():
            raise ConfigError(f"{directory} has no config.json; model must be a Hugging Face model directory")
        raw: dict[str, Any] = json.loads(path.read_text())
        name = (raw.get("architectures") or ["none"])[0]
        if name not in ARCHITECTURES:
            raise ConfigError(f"model {directory} is a {name}; supported are {', '.join(ARCHITECTURES)}")
        if raw.get("quantization_config"):
            raise ConfigError(f"model {directory} has quantised weights; give a float16, bfloat16 or float32 one")
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"model {directory} uses {raw['hidden_act']}; supported is silu (SwiGLU)")
        family = ARCHITECTURES[name]
        window = raw.get("sliding_window")
        windowed = family == "mistral" or raw.get("use_sliding_window", False)
        max_positions = int(raw["max_position_embeddings"])
        if windowed and window is not None and window < max_positions:
            # Inside the window full attention is the same; beyond it this engine would differ.
            max_positions = int(window)
        heads = int(raw["num_attention_heads"])
        return cls(
            architecture=family,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            max_positions=max_positions,
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
            output_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            rope=_rope(raw, directory),
            eos_token_ids=read_eos_token_ids(raw, directory),
        )


def _rope(raw: dict[str, Any], directory: Path) -> RopeConfig:
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise ConfigError(f"model {directory} stretches RoPE by {kind!r}; supported are default, linear and llama3")


def read_eos_token_ids(raw: dict[str, Any], directory: Path) -> tuple[int, ...]:
    """End-of-text ids: generation_config.json knows more of them than config.json."""
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
