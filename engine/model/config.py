"""ModelConfig: the numbers of one decoder, read from Hugging Face's config.json, with no tensors in it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .unread import unread

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "divided")
# What transformers takes where config.json does not have the key.
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
HEAD_DIM = {"qwen3": 128}
MISTRAL_WINDOW = 4096
QWEN_WINDOW_LAYERS = 28


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: the base ``theta``, and how ``kind`` scales its frequencies for longer contexts.

    ``scale`` multiplies cos and sin (YaRN's attention factor). ``divisors``: one for each frequency, of kind
    "divided", as GGUF files have them.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0
    divisors: tuple[float, ...] = ()


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
        """Read config.json (of transformers 4 or 5). ConfigError if it is damaged or not supported."""
        path = directory / "config.json"
        if not path.is_file():
            raise ConfigError(f"{directory} has no config.json; model must be a Hugging Face model directory")
        try:
            raw = json.loads(path.read_text())
            if not isinstance(raw, dict):
                raise TypeError("it is not an object")
            return cls._from_raw(raw, directory)
        except KeyError as error:
            raise ConfigError(f"{path} lacks {error}; fetch the model again") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be understood: {error}") from None

    @classmethod
    def _from_raw(cls, raw: dict[str, Any], directory: Path) -> ModelConfig:
        name = (raw.get("architectures") or ["none"])[0]
        if name not in ARCHITECTURES:
            raise ConfigError(f"model {directory} is a {name}; supported are {', '.join(ARCHITECTURES)}")
        if raw.get("quantization_config"):
            raise ConfigError(
                f"model {directory} has quantised weights; give a float16, bfloat16 or float32 one"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"model {directory} uses {raw['hidden_act']}; supported is silu (SwiGLU)")
        family = ARCHITECTURES[name]
        max_positions = int(raw["max_position_embeddings"])
        if (window := _window(raw, family, directory)) is not None:
            # Up to the window full attention gives the same result; beyond it the engine would be wrong.
            max_positions = min(max_positions, window)
        heads = int(raw["num_attention_heads"])
        kv_heads = int(raw.get("num_key_value_heads", KV_HEADS.get(family)) or heads)
        head_dim = int(raw.get("head_dim", HEAD_DIM.get(family)) or int(raw["hidden_size"]) // heads)
        if ignored := unread(raw, head_dim):
            raise ConfigError(
                f"config.json of model {directory} has settings that change the results and that this engine "
                f"does not read: {', '.join(ignored)}. Choose another model, or take them out of config.json "
                "if the model does not need them"
            )
        if heads % kv_heads:
            raise ConfigError(
                f"model {directory} has {heads} heads and {kv_heads} KV heads; KV heads must divide heads"
            )
        return cls(
            architecture=family,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
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


def _window(raw: dict[str, Any], family: str, directory: Path) -> int | None:
    """The sliding window, if any layer has one."""
    kinds = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"model {directory} has layer_types {', '.join(sorted(kinds))}; supported is full_attention"
        )
    window = raw.get("sliding_window", MISTRAL_WINDOW if family == "mistral" else None)
    if raw.get("layer_types"):
        slides = "sliding_attention" in raw["layer_types"]
    elif family in ("qwen2", "qwen3"):
        first = int(raw.get("max_window_layers", QWEN_WINDOW_LAYERS))  # that slides
        slides = bool(raw.get("use_sliding_window")) and first < int(raw["num_hidden_layers"])
    else:
        slides = True
    return int(window) if slides and window else None


def _rope(raw: dict[str, Any], directory: Path) -> RopeConfig:
    """RoPE's settings: transformers 5 has them in rope_parameters, 4 in rope_theta and rope_scaling."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"model {directory} stretches RoPE by {kind!r}; supported are {', '.join(ROPE_KINDS)}"
        )
    partial = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigError(f"model {directory} rotates {partial} of each head; supported is all of it (1.0)")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "divided":
        return RopeConfig(theta, kind, divisors=tuple(map(float, given["divisors"])))
    factor = float(given["factor"])
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    original = int(given.get("original_max_position_embeddings") or raw["max_position_embeddings"])
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return RopeConfig(theta, kind, factor, low, high, original)
    return RopeConfig(
        theta,
        kind,
        factor,
        original_max_positions=original,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        scale=_yarn_scale(given, factor),
    )


def _yarn_scale(given: dict[str, Any], factor: float) -> float:
    """YaRN's factor for cos and sin: the configured one, else the paper's (arXiv 2309.00071, section 3.4)."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return temperature(float(given["mscale"])) / temperature(float(given["mscale_all_dim"]))
    return temperature(1.0)


def read_eos_token_ids(raw: dict[str, Any], directory: Path) -> tuple[int, ...]:
    """End-of-text ids. generation_config.json takes precedence, since config.json often lists only one."""
    path = directory / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    eos = generation.get("eos_token_id")
    eos = raw.get("eos_token_id") if eos is None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
