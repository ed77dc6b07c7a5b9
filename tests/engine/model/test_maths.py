"""Whatever changes the maths is read, and equals transformers, or is refused by its name with a remedy."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import ConfigError
from blockyard.engine.model import convert_gguf, gguf_maths, unread
from blockyard.engine.model.config import ARCHITECTURES, ModelConfig
from blockyard.engine.model.decoder import rope_tables
from blockyard.engine.model.files import prepare
from blockyard.engine.sampling_params import SamplingParams

from ..gguf_files import write_gguf
from ..models import FAMILIES, LLAMA3, YARN, greedy, load_reference, make_model

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"
PROMPT = [5 + i * i % 150 for i in range(180)]  # longer than the context before RoPE was stretched
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def divisors() -> list[float]:
    """Llama 3.1's, for heads of 8: what llama.cpp's converter writes to ``rope_freqs.weight``."""
    found = []
    for i in range(0, 8, 2):
        wavelength = 2 * math.pi * 10000.0 ** (i / 8)
        low, high = 32 / LLAMA3["low_freq_factor"], 32 / LLAMA3["high_freq_factor"]
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(8.0)
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / 8.0 + smooth))
    return found


def decode(folder: Path) -> list[int]:
    engine = Engine(EngineConfig(model=str(folder), device="cpu", kv_blocks=20))
    engine.add_request("r", PROMPT, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens


@pytest.mark.parametrize(
    ("family", "arch", "rope", "settings", "tensors"),
    [
        ("llama", "llama", LLAMA3, {}, {"rope_freqs.weight": np.array(divisors(), dtype=np.float32)}),
        (
            "llama",
            "llama",
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 64,
            },
            {},
        ),
        (
            "qwen2",
            "qwen2",
            {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5 * (0.1 * math.log(8) + 1)},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.attn_factor": 1.5,
            },
            {},
        ),
        ("qwen3", "qwen3", LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
        ("llama", "llama", LINEAR, {"rope.scale_linear": 4.0}, {}),
        ("llama-tied", "llama", None, {}, {}),
        (
            "llama",
            "llama",
            None,
            {
                "expert_count": 0,
                "attention.scale": 8**-0.5,
                "logit_scale": 1.0,
                "final_logit_softcapping": 0.0,
                "rope.scaling.type": "none",
                "attention.causal": True,
            },
            {},
        ),
    ],
)
def test_what_a_gguf_file_says_of_the_maths_is_computed(
    tmp_path: Path,
    family: str,
    arch: str,
    rope: dict[str, Any] | None,
    settings: dict[str, Any],
    tensors: dict[str, Any],
) -> None:
    changes = {"rope_parameters": rope} if rope else {}
    source = make_model(family, tmp_path, **changes)
    write_gguf(source, tmp_path / "small.gguf", settings, tensors, arch=arch)
    convert_gguf.convert(tmp_path / "small.gguf", tmp_path / "converted")
    expected = greedy(load_reference(source), PROMPT, 16)
    assert decode(tmp_path / "converted") == expected
    config = ModelConfig.from_directory(tmp_path / "converted")
    reference = ModelConfig.from_directory(source)
    tables = [rope_tables(c.rope, c.head_dim, 300, torch.device("cpu")) for c in (config, reference)]
    for ours, theirs in zip(*tables, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if rope:  # else the test would have no power
        plain = rope_tables(
            ModelConfig.from_directory(make_model(family, tmp_path / "plain")).rope,
            8,
            300,
            torch.device("cpu"),
        )
        assert not torch.allclose(plain[0], tables[0][0][:, :4], atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "tensors", "named"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, {}, "rope.scaling.type longrope"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, {}, "llama.rope.scaling.yarn_log_multiplier"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, {}, "llama.rope.scaling.yarn_ext_factor"),
        ({"rope.scaling.attn_factor": 1.5}, {}, "rope.scaling.attn_factor"),
        ({"rope.dimension_count_swa": 4}, {}, "llama.rope.dimension_count_swa"),
        ({"rope.dimension_sections": [1, 2, 3, 4]}, {}, "llama.rope.dimension_sections"),
        ({"attention.key_length": 16}, {}, "rope.dimension_count"),
        ({"attention.value_length": 16}, {}, "attention.value_length"),
        ({"attention.scale": 0.5}, {}, "llama.attention.scale"),
        ({"attention.clamp_kqv": 8.0}, {}, "llama.attention.clamp_kqv"),
        ({"attention.max_alibi_bias": 8.0}, {}, "llama.attention.max_alibi_bias"),
        ({"attention.causal": False}, {}, "llama.attention.causal"),
        ({"attention.sliding_window_pattern": [True, False]}, {}, "llama.attention.sliding_window_pattern"),
        ({"attn_logit_softcapping": 50.0}, {}, "llama.attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, {}, "llama.final_logit_softcapping"),
        ({"expert_count": 8}, {}, "llama.expert_count"),
        ({"embedding_scale": 12.0}, {}, "llama.embedding_scale"),
        ({"residual_scale": 0.2}, {}, "llama.residual_scale"),
        ({"logit_scale": 0.06}, {}, "llama.logit_scale"),
        ({"something.new": 1}, {}, "llama.something.new"),
        ({}, {"rope_factors_long.weight": np.ones(4, np.float32)}, "tensor rope_factors_long.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(48, np.float32)}, "tensor blk.0.attn_q.bias"),
        ({}, {"blk.0.ffn_gate_inp.weight": np.ones((4, 48), np.float32)}, "tensor blk.0.ffn_gate_inp.weight"),
        ({}, {"blk.0.post_attention_norm.weight": np.ones(48, np.float32)}, "post_attention_norm"),
        ({}, {"blk.7.attn_norm.weight": np.ones(48, np.float32)}, "tensor blk.7.attn_norm.weight"),
        ({}, {"token_types.weight": np.ones((2, 48), np.float32)}, "tensor token_types.weight"),
        ({"split.count": 2}, {}, "llama-gguf-split"),
        ({"general.type": "adapter"}, {}, "general.type"),
    ],
)
def test_what_a_gguf_file_says_and_nobody_computes_is_refused_by_name(
    llama: Path, tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], named: str
) -> None:
    write_gguf(llama, tmp_path / "small.gguf", settings, tensors)
    with pytest.raises(ConfigError) as refusal:
        gguf_maths.read_maths(tmp_path / "small.gguf")
    assert named in str(refusal.value)
    assert re.search("Hugging Face folder|merge", str(refusal.value))


def test_frequency_divisors_and_a_stretched_rope_are_refused_together(llama: Path, tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(llama, tmp_path / "small.gguf", {"rope.scale_linear": 4.0}, tensors)
    with pytest.raises(ConfigError, match="rope_freqs"):
        gguf_maths.read_maths(tmp_path / "small.gguf")


@pytest.mark.parametrize("arch", ["gemma2", "qwen2moe"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, arch: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "small.gguf", arch)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=f"is a {arch}"):
        gguf_maths.read_maths(tmp_path / "small.gguf")


def test_a_refusal_reaches_the_one_who_asked_for_the_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "cache"))
    write_gguf(llama, tmp_path / "small.gguf", {"expert_count": 8})
    with pytest.raises(ConfigError, match="expert_count"):
        prepare(str(tmp_path / "small.gguf"))


def test_a_window_of_a_gguf_file_bounds_the_length(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "small.gguf", {"attention.sliding_window": 100})
    convert_gguf.convert(tmp_path / "small.gguf", tmp_path / "converted")
    assert ModelConfig.from_directory(tmp_path / "converted").max_positions == 100


# ── config.json ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("maths"))


def changed(source: Path, folder: Path, **changes: Any) -> Path:
    raw = json.loads((source / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("attn_logit_softcapping", 50.0, None),
        ("final_logit_softcapping", 30.0, None),
        ("query_pre_attn_scalar", 256, 8),
        ("attention_multiplier", 0.0078, 8**-0.5),
        ("embedding_multiplier", 12.0, 1.0),
        ("residual_multiplier", 0.22, 1.0),
        ("logits_scaling", 8.0, 1.0),
        ("logit_scale", 0.0625, 1.0),
        ("scale_emb", 12, 1),
        ("num_experts", 8, 0),
        ("num_local_experts", 8, 0),
        ("clip_qkv", 8.0, None),
        ("rope_interleaved", True, False),
        ("no_rope_layers", [1, 0, 1], []),
        ("use_qk_norm", True, False),
        ("rms_norm_add_unit_offset", True, False),
        ("alibi", True, False),
        ("attention_sinks", 4, 0),
        ("attention_chunk_size", 8192, None),
        ("position_embedding_type", "alibi", None),
        ("moe_intermediate_size", 512, 0),
        ("rotary_dim", 4, None),
    ],
)
def test_settings_that_change_the_maths_are_refused_unless_they_are_neutral(
    llama: Path, tmp_path: Path, key: str, value: Any, neutral: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{key} .*take them out of config.json"):
        ModelConfig.from_directory(changed(llama, tmp_path / "a", **{key: value}))
    assert ModelConfig.from_directory(changed(llama, tmp_path / "b", **{key: neutral}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": None}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "0.5 of each head"),
        ({"rope_parameters": {**YARN, "mrope_section": [1, 2]}}, "rope_parameters.mrope_section"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_kinds_that_are_not_computed_are_refused(
    llama: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        ModelConfig.from_directory(changed(llama, tmp_path / "a", **changes))


def test_notes_of_people_and_tools_are_no_settings(llama: Path, tmp_path: Path) -> None:
    notes = {"unsloth_version": "2026.1", "_name_or_path": "x", "auto_map": {}, "use_cache": False}
    assert ModelConfig.from_directory(changed(llama, tmp_path / "a", **notes))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_key_that_is_not_there_means_what_it_means_to_transformers(tmp_path: Path, name: str) -> None:
    small = {
        "architectures": [name],
        "vocab_size": 160,
        "hidden_size": 4096,
        "intermediate_size": 96,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(small))
    ours = ModelConfig.from_directory(tmp_path)
    config_class = getattr(transformers, name.replace("ForCausalLM", "Config"))
    theirs = config_class(**{key: value for key, value in small.items() if key != "architectures"})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 64)
    assert ours.rms_norm_eps == theirs.rms_norm_eps and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    window = (
        theirs.sliding_window if "sliding_attention" in (getattr(theirs, "layer_types", None) or ()) else None
    )
    window = theirs.sliding_window if name.startswith("Mistral") else window
    assert ours.max_positions == min(8192, window or 8192)


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, 512),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, 512),
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, 512),
    ],
)
def test_a_model_with_windows_is_served_up_to_the_window(
    tmp_path: Path, family: str, changes: dict[str, Any], length: int
) -> None:
    assert ModelConfig.from_directory(make_model(family, tmp_path, **changes)).max_positions == length


def test_no_end_of_text_in_the_generation_settings_leaves_the_models(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "a", eos_token_id=9)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert ModelConfig.from_directory(folder).eos_token_ids == (9,)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_that_transformers_writes_is_known(tmp_path: Path, family: str) -> None:
    assert ModelConfig.from_directory(make_model(family, tmp_path))


def test_the_table_names_every_key() -> None:
    table = DOCUMENT.read_text()
    keys = {*unread.READ, *unread.HARMLESS, *gguf_maths.READ, *gguf_maths.HARMLESS, *gguf_maths.NEUTRAL}
    missing = [key for key in sorted(keys) if f"`{key}`" not in table]
    assert not missing, f"docs/models.md says nothing of {missing}"
