"""Weights: every form of a checkpoint gives the same tensors; whatever is wrong with one is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import ConfigError
from blockyard.engine.model.weights import Weights, read_entries

from ..models import make_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("weights"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(path: Path) -> str:
    engine = Engine(EngineConfig(model=str(path), device="cpu", kv_blocks=8))
    engine.close()
    return engine.info.layout_digest


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def shard(path: Path) -> None:
    """Cut model.safetensors into two files and an index, as large checkpoints come."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for i in range(2):
        part = names[i::2]
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        index.update(dict.fromkeys(part, file))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_sharded_checkpoint_is_the_same_checkpoint(original: Path, model: Path) -> None:
    shard(model)
    expected = load_file(original / "model.safetensors")
    with Weights(model, torch.float32, torch.device("cpu")) as weights:
        assert set(weights.unread) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(weights.get(name, tuple(tensor.shape)), tensor)
        assert weights.unread == []


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted(model: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    expected = load_file(model / "model.safetensors")["model.norm.weight"].to(stored)
    rewrite(model, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    with Weights(model, wanted, torch.device("cpu")) as weights:
        assert torch.equal(weights.get("model.norm.weight", (48,)), expected.to(wanted))


@pytest.mark.parametrize(
    ("axis", "begin", "end"), [(0, 0, 5), (0, 40, 60), (1, 3, 40), (1, 90, None), (0, 96, 99)]
)
def test_a_rank_reads_its_slice_alone(original: Path, axis: int, begin: int, end: int | None) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    whole = load_file(original / "model.safetensors")[name]
    assert whole.shape == (48, 96)
    with Weights(original, torch.float32, torch.device("cpu")) as weights:
        part = weights.get(name, (48, 96), axis=axis, begin=begin, end=end)
    assert torch.equal(part, whole[begin:end] if axis == 0 else whole[:, begin:end])
    assert part.is_contiguous()


def test_engines_of_equal_shapes_and_other_weights_share_no_blocks(original: Path, model: Path) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.o_proj.weight"][20, 30] += 1

    assert load(model) == load(original)
    rewrite(model, nudge)
    assert load(model) != load(original)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(model: Path, name: str) -> None:
    rewrite(model, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(ConfigError, match=f"no tensor '{name}'"):
        load(model)


def test_a_tensor_of_another_shape_is_named(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: torch.zeros(95, 48)}))
    with pytest.raises(ConfigError, match=rf"'{name}' .* is \[95, 48\]; config.json promises \[96, 48\]"):
        load(model)


def test_a_tensor_of_integers_is_named(model: Path) -> None:
    name = "model.norm.weight"
    rewrite(model, lambda tensors: tensors.update({name: torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match=f"'{name}' .* is of dtype I8; supported are F64, F32"):
        load(model)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"]
)
def test_a_tensor_without_a_place_is_named(model: Path, name: str) -> None:
    """The tensor is part of the model; without it the answers would be subtly wrong."""
    rewrite(model, lambda tensors: tensors.update({name: torch.zeros(48)}))
    with pytest.raises(ConfigError, match=f"no place for: {name}"):
        load(model)


@pytest.mark.parametrize("bytes_left", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named(model: Path, bytes_left: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        load(model)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-9, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}',
        b"\xff\xfe\xfd",
    ],
)
def test_a_damaged_header_is_named(model: Path, header: bytes) -> None:
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_entries(model)


def test_a_header_as_large_as_the_machine_is_not_read(model: Path) -> None:
    (model / "model.safetensors").write_bytes((2**60).to_bytes(8, "little"))
    with pytest.raises(ConfigError, match="a header of 1152921504606846976 bytes"):
        read_entries(model)


def test_missing_shards_and_a_damaged_index_are_named(model: Path) -> None:
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-00002\.safetensors"):
        load(model)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ConfigError, match="not an index of weights"):
            load(model)
