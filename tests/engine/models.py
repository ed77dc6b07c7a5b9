"""Small random-weight models of every family, the real SmolLM2, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # the default makes all logits of a tiny model nearly equal
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
# Of make_tokenizer; the last one is a byte-level BPE's blank.
CHARACTERS = ["<pad>", "<s>", "</s>", *map(chr, range(ord("!"), ord("~") + 1)), "\u0120"]
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2-rope-yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "llama-rope-yarn-all-set": (
        "LlamaConfig",
        {
            "rope_parameters": {
                **YARN,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.5,
                "mscale_all_dim": 0.8,
                "truncate": False,
            }
        },
    ),
    "llama-rope-yarn-factor": ("LlamaConfig", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 6}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
}


def make_model(family: str, folder: Path, **changes: object) -> Path:
    """Write a random model of a family to ``folder``, the same one each time."""
    import transformers

    config_class, overrides = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**COMMON, **overrides, **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = folder / family
    model.save_pretrained(path)
    return path


def make_tokenizer(path: Path) -> None:
    """Give a model of 160 tokens a tokenizer for ASCII, one token a character."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(CHARACTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CHARACTERS[:3])
    tokenizer.save(str(path / "tokenizer.json"))


def load_reference(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy ids by transformers, one prompt at a time, going on after any end of text."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()
