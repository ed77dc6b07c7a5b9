"""Model folders as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

WORDS = ["<unk>", "<s>", "</s>", "w", "1", *(f"w{i}" for i in range(155))]


def write_gguf(
    model: Path,
    path: Path,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    *,
    arch: str = "llama",
) -> None:
    """A folder's sizes and weights. ``settings`` are added under the architecture's name, unless they begin
    with ``general.`` or ``split.``; llama's q and k are interleaved.
    """
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads, hidden = (
        config[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    head_dim = config.get("head_dim") or hidden // heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    if head_dim == hidden // heads:
        writer.add_rope_dimension_count(head_dim)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name, value in (settings or {}).items():
        key = name if name.startswith(("general.", "split.")) else f"{arch}.{name}"
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["w 1"])
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[
            arch
        ],
        config["num_hidden_layers"],
    )
    for name, tensor in load_file(model / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if arch == "llama" and part in name:
                rows = len(tensor) // count // 2
                tensor = tensor.view(count, 2, rows, -1).transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(ours, np.ascontiguousarray(tensor.numpy()))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
