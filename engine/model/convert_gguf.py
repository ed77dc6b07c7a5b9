"""Converts a GGUF file to a model folder: ``python -m blockyard.engine.model.convert_gguf FILE FOLDER``.

This is the only module that needs transformers (for its dequantisation). It always runs in a process of its
own, so that no other process has to import transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import quantization_config


def convert(gguf: Path, target: Path) -> None:
    """Write config, float32 safetensors and tokenizer files to the new folder ``target``.

    The tensors are written without transformers, because transformers 5 refuses to save dequantised models.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    if hasattr(quantization_config, "GgufConfig"):
        source["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.to(torch.float32).contiguous().clone()
        for name, tensor in tqdm(model.state_dict().items(), desc="converting", unit="tensor")
        if not (tied and name == "lm_head.weight")
    }
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # an image may run as another user
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
