"""Converts a GGUF file to a model folder: ``python -m blockyard.engine.model.convert_gguf FILE FOLDER``.

If the file is refused, the reason is left in FOLDER (files.REFUSED). This is the only module that needs
transformers (for its dequantisation). It always runs in a process of its own, so that no other process has to
import transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import quantization_config

from ..errors import ConfigError
from .files import REFUSED
from .gguf_maths import read_maths


def convert(gguf: Path, target: Path) -> None:
    """Write config, float32 safetensors and tokenizer files to the new folder ``target``.

    The tensors are written without transformers, because transformers 5 refuses to save dequantised models.
    """
    maths = read_maths(gguf)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    if hasattr(quantization_config, "GgufConfig"):
        source["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config.head_dim = maths["head_dim"]  # which decides shapes
    model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
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
    raw = json.loads((target / "config.json").read_text())
    for name in ("rope_scaling", "rope_theta", "layer_types"):  # said by what replaces them
        raw.pop(name, None)
    (target / "config.json").write_text(json.dumps(raw | maths, indent=2))
    model.generation_config.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)


def main(gguf: Path, target: Path) -> int:
    try:
        convert(gguf, target)
    except ConfigError as error:
        target.mkdir(exist_ok=True)
        (target / REFUSED).write_text(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
