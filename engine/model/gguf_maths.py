"""What a GGUF file says of the maths beyond what transformers reads of it; the rest is refused by its name.

transformers' conversion takes the sizes, the RoPE base and the tensors that it knows, and drops everything
else without a word: scaled RoPE, windows, capped logits, experts. So every key and tensor of the file is
looked at here, before: it is read, it is known to change nothing, it is at a value that says that the feature
is not used, or the file is refused. llama.cpp's reading of a key is the one that counts. docs/models.md has
the table for users.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf

from ..errors import ConfigError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
REMEDY = "Give the model as a Hugging Face folder instead, or another model"

# Keys without the architecture's name in front. What is in none of these is refused.
READ = {
    *("context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window", "rope.dimension_count"),
    *("rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"),
}
HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"), (0, 1)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "leading_dense_block_count"), (0,)),
    "attention.scale": (0,),  # and what it is by default
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
_BLOCK = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
_TENSORS = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
_OF_BLOCK = {  # attn_rot_embd: RoPE's plain frequencies, which old files have
    "llama": {"attn_rot_embd.weight", *(f"{name}.weight" for name in _BLOCK.split())},
    "qwen2": {"attn_q.bias", "attn_k.bias", "attn_v.bias", *(f"{name}.weight" for name in _BLOCK.split())},
    "qwen3": {"attn_q_norm.weight", "attn_k_norm.weight", *(f"{name}.weight" for name in _BLOCK.split())},
}


def read_maths(path: Path) -> dict[str, Any]:
    """Settings for config.json: head_dim, sliding_window, rope_parameters. ConfigError on what is refused.

    Frequency divisors (the tensor ``rope_freqs.weight``, as Llama 3.1's files have it) become RoPE of our
    kind "divided".
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ConfigError(
            f"{path.name} is damaged or no GGUF file ({error}); fetch the model again"
        ) from None
    fields = {name: field.contents() for name, field in reader.fields.items() if _matters(name)}
    arch = str(fields.pop("general.architecture", "none"))
    if arch not in ARCHITECTURES:
        raise ConfigError(
            f"{path.name} is a {arch}; supported in GGUF files are {', '.join(ARCHITECTURES)}. {REMEDY}"
        )
    if int(fields.pop("split.count", 0) or 0) > 1:
        raise ConfigError(f"{path.name} is one of several files; merge them with llama-gguf-split --merge")
    if fields.pop("general.type", "model") != "model":
        raise ConfigError(f"{path.name} is no whole model (general.type); merge it with its base model")
    settings = {name.removeprefix(f"{arch}."): value for name, value in fields.items()}
    head_dim = _head_dim(path, settings)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    refused = [
        f"{arch}.{name} ({settings[name]!r})" for name in settings if not _known(name, settings, head_dim)
    ]
    refused += [f"tensor {name}" for name in tensors if not _known_tensor(name, arch, settings)]
    if refused:
        raise ConfigError(
            f"{path.name} has settings that change the results and that this engine does not read: "
            f"{', '.join(refused[:8])}. {REMEDY}"
        )
    divisors = tensors.get("rope_freqs.weight")
    found: dict[str, Any] = {
        "head_dim": head_dim,
        "rope_parameters": _rope(path, settings, None if divisors is None else divisors.data.tolist()),
    }
    window = int(settings.get("attention.sliding_window", 0))
    found["sliding_window"] = window or None
    if arch != "llama":
        found |= {"use_sliding_window": bool(window), "max_window_layers": 0}
    return found


def _matters(name: str) -> bool:
    """Not the file's own fields, its description and its tokenizer."""
    kept = ("general.architecture", "general.type", "split.count")
    return name in kept or not name.startswith(("GGUF.", "general.", "tokenizer.", "split.", "quantize."))


def _head_dim(path: Path, settings: dict[str, Any]) -> int:
    """The width of a head. K and V must have the same, and RoPE must rotate all of it."""
    width = int(settings["embedding_length"]) // int(settings["attention.head_count"])
    head_dim = int(settings.get("attention.key_length", width))
    for name in ("attention.value_length", "rope.dimension_count"):
        if int(settings.get(name, head_dim)) != head_dim:
            raise ConfigError(
                f"{path.name} has {name} {settings[name]} and heads of {head_dim}; these must be equal. "
                f"{REMEDY}"
            )
    return head_dim


def _known(name: str, settings: dict[str, Any], head_dim: int) -> bool:
    value = settings[name]
    if name in READ:
        return not isinstance(value, list) or name == "vocab_size"  # one value for all layers
    if name == "attention.scale" and math.isclose(value, head_dim**-0.5, rel_tol=1e-5):
        return True
    return name in HARMLESS or value in NEUTRAL.get(name, ())


def _known_tensor(name: str, arch: str, settings: dict[str, Any]) -> bool:
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if block is None:
        return name in _TENSORS
    return int(block[1]) < int(settings["block_count"]) and block[2] in _OF_BLOCK[arch]


def _rope(path: Path, settings: dict[str, Any], divisors: list[float] | None) -> dict[str, Any]:
    """RoPE as config.json has it."""
    scaling = {
        name.removeprefix("rope.scaling."): v for name, v in settings.items() if "rope.scaling." in name
    }
    rope: dict[str, Any] = {"rope_theta": float(settings.get("rope.freq_base", 10000.0))}
    factor = float(scaling.get("factor", 0) or settings.get("rope.scale_linear", 0) or 1)
    kind = str(scaling.get("type", "linear")) if factor != 1 else "none"
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{path.name} has rope.scaling.type {kind}; supported are linear and yarn. {REMEDY}"
        )
    attention = math.prod(float(scaling.get(name, 0) or 1) for name in ("attn_factor", "yarn_attn_factor"))
    if kind == "yarn":
        original = scaling.get("original_context_length") or settings["context_length"]
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
        rope |= {name: float(scaling.get(f"yarn_{name}", default)) for name, default in _BETAS.items()}
        if attention != 1:
            rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    elif attention != 1:
        raise ConfigError(f"{path.name} has rope.scaling.attn_factor {attention} without yarn. {REMEDY}")
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    if divisors is None:
        return {"rope_type": "default", **rope}
    if kind != "none":
        raise ConfigError(f"{path.name} has rope_freqs.weight and rope.scaling.type {kind}. {REMEDY}")
    return {**rope, "rope_type": "divided", "divisors": divisors}


_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
