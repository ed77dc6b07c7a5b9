"""The engine on CUDA: the ids of transformers and of the CPU, graphs, sizes, swap, and too little memory.

Without a CUDA device all of it is skipped. ``BLOCKYARD_TEST_DEVICE=cpu`` runs what is not CUDA's alone on the
CPU, which is for trying these tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import ConfigError
from blockyard.engine.runner import Graphs, Runner
from blockyard.engine.sampling_params import SamplingParams
from blockyard.engine.step import StepInput

pytest.importorskip("transformers", reason="transformers is what outputs are compared with")
from .model.test_decoder import random_prompts, run
from .models import FAMILIES, load_reference, make_model

DEVICE = os.environ.get("BLOCKYARD_TEST_DEVICE", "cuda")
NO_CUDA = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and NO_CUDA, reason="no CUDA device is usable here")
cuda_alone = pytest.mark.skipif(NO_CUDA, reason="no CUDA device is usable here")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def load(path: Path, **settings: Any) -> Engine:
    """A small engine on the device under test."""
    defaults = {"device": DEVICE, "dtype": "float32", "kv_blocks": 100, "max_num_seqs": 12}
    return Engine(EngineConfig(model=str(path), **{**defaults, "max_batch_tokens": 50, **settings}))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each step that a graph carried out."""
    counts: list[int] = []
    replay = Graphs.replay

    def counted(self: Graphs, step: StepInput) -> Tensor | None:
        counts.append(len(step.rows))
        return replay(self, step)

    monkeypatch.setattr(Graphs, "replay", counted)
    return counts


def generate(reference: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy ids by transformers on the reference's device, each by a whole pass: no cache, no tricks."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            ids.append(int(reference(torch.tensor([ids], device=reference.device)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_transformers_and_the_cpu_with_graphs_and_without(
    family: str, tmp_path: Path, replayed: list[int]
) -> None:
    path = make_model(family, tmp_path)
    reference: Any = load_reference(path)
    reference.to(DEVICE)
    # Decode steps have 9 sequences, a size without a graph of its own, and fewer as sequences end.
    prompts = random_prompts(9, 160)
    expected = [generate(reference, prompt, 24) for prompt in prompts]
    for graphs in (True, False):
        replayed.clear()
        engine = load(path, cuda_graphs=graphs)
        assert run(engine, prompts, GREEDY) == expected
        assert run(engine, prompts[:1], GREEDY) == expected[:1]  # from the prefix cache
        assert engine.stats().prefix_hits > 0
        assert bool(replayed) == (graphs and DEVICE == "cuda")
        engine.runner.close()
    assert run(load(path, device="cpu"), prompts, GREEDY) == expected


@cuda_alone
def test_a_graph_serves_every_batch_size_and_other_sequences_later(
    tmp_path: Path, replayed: list[int]
) -> None:
    """All start in one step and end one by one, so that batches shrink through all graphs; then once more."""
    path = make_model("qwen3", tmp_path)
    settings: dict[str, Any] = {"max_num_seqs": 9, "max_batch_tokens": 1000, "prefix_cache": False}
    engine, plain = load(path, **settings), load(path, **settings, cuda_graphs=False)
    prompts = random_prompts(9, 160)
    lengths = [SamplingParams(temperature=0, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(9)]
    for _ in range(2):
        tokens: list[dict[str, list[int]]] = []
        for one in (engine, plain):
            for i, (prompt, params) in enumerate(zip(prompts, lengths, strict=True)):
                one.add_request(str(i), prompt, params)
            found: dict[str, list[int]] = {}
            while one.has_work:
                for output in one.step():
                    found.setdefault(output.request_id, []).extend(output.token_ids)
                one.check()
            tokens.append(found)
        assert tokens[0] == tokens[1]
        prompts.reverse()
    assert set(replayed) == set(range(1, 10))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_is_as_exact_as_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    """Log-probs of the chosen tokens against float32, where transformers in the same type is off as well."""
    path = make_model(family, tmp_path)
    engine = load(path, dtype=dtype)
    prompts = random_prompts(6, 160)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0)
    ids: list[list[int]] = [[] for _ in prompts]
    ours: list[list[float]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    while engine.has_work:
        for output in engine.step():
            ids[int(output.request_id)] += output.token_ids
            ours[int(output.request_id)] += [entry.logprob for entry in output.logprobs or []]
        engine.check()

    def logprobs(reference: Any) -> Tensor:
        rows = []
        with torch.inference_mode():
            for prompt, chosen in zip(prompts, ids, strict=True):
                logits = reference(torch.tensor([prompt + chosen], device=DEVICE)).logits[
                    0, len(prompt) - 1 : -1
                ]
                rows.append(
                    torch.log_softmax(logits.double(), -1).gather(
                        1, torch.tensor(chosen, device=DEVICE)[:, None]
                    )
                )
        return torch.cat(rows).flatten().cpu()

    reference: Any = load_reference(path)
    reference.to(DEVICE)
    exact = logprobs(reference)
    theirs = logprobs(reference.to(getattr(torch, dtype)))
    mine = [value for values in ours for value in values]
    errors = [(x - exact).square().mean().sqrt().item() for x in (torch.tensor(mine).double(), theirs)]
    assert 0 < errors[0] < 2 * errors[1], errors


def test_swapped_sequences_come_back_unchanged(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    prompts = random_prompts(8, 160)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = run(load(path), prompts, params)
    engine = load(path, kv_blocks=16, host_blocks=64, preemption="swap")
    assert isinstance(engine.runner, Runner)
    assert engine.runner.host_kv.is_pinned() == (DEVICE == "cuda")
    assert run(engine, prompts, params) == expected
    stats = engine.stats()
    assert stats.preemptions_swap > 0
    assert stats.host.active == 0


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="two CUDA devices are needed")
def test_two_ranks_give_the_ids_of_one(tmp_path: Path) -> None:
    path = make_model("qwen2", tmp_path)
    prompts = random_prompts(6, 160)
    expected = run(load(path), prompts, GREEDY)
    engine = load(path, tensor_parallel=2)
    try:
        assert run(engine, prompts, GREEDY) == expected
    finally:
        engine.runner.close()


def large_blocks(folder: Path) -> Path:
    """A model of few weights whose pool could fill any device."""
    shape = {"head_dim": 128, "num_key_value_heads": 6, "max_position_embeddings": 65536}
    return make_model("llama", folder, **shape)


@cuda_alone
def test_the_pool_is_sized_by_memory_fraction(tmp_path: Path) -> None:
    path, total = large_blocks(tmp_path), torch.cuda.mem_get_info()[1]
    taken = []
    for fraction in (0.5, 0.7):
        engine = load(path, kv_blocks=None, memory_fraction=fraction, max_num_seqs=512, cuda_graphs=False)
        taken.append(engine.info.kv_blocks * engine.info.block_bytes / total)
        free = torch.cuda.mem_get_info()[0] / total
        assert free > 1 - fraction - 0.02, "more than memory_fraction of the device is in use"
        assert run(engine, random_prompts(4, 160), GREEDY)
        engine.runner.close()
    assert taken[1] - taken[0] == pytest.approx(0.2, abs=0.02)


@cuda_alone
def test_out_of_memory_names_the_settings(tmp_path: Path) -> None:
    path = large_blocks(tmp_path)
    free, total = torch.cuda.mem_get_info()
    with pytest.raises(ConfigError, match=r"are free on cuda:0; lower kv_blocks"):
        load(path, kv_blocks=2 * total // 2**16)
    with pytest.raises(ConfigError, match=r"(?s)memory_fraction leaves no room.*Raise memory_fraction"):
        load(path, kv_blocks=None, memory_fraction=1e-6)
    torch.cuda.set_per_process_memory_fraction(0.05)  # what others take between the measuring and the taking
    try:
        with pytest.raises(
            ConfigError, match=r"(?s)out of memory while loading .* with kv_bytes=.*Lower kv_blocks"
        ):
            load(path, kv_blocks=None, kv_bytes=free // 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    engine = load(path)  # and nothing of the failed one is left
    assert run(engine, random_prompts(2, 160), GREEDY)
