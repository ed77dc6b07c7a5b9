"""Outputs equal transformers': greedy ids token by token, log-probs within tolerance, for every family."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import ConfigError
from blockyard.engine.model.config import ModelConfig
from blockyard.engine.model.decoder import layout_digest
from blockyard.engine.model.files import prepare
from blockyard.engine.model.identity import WeightsIdentity
from blockyard.engine.outputs import SequenceOutput
from blockyard.engine.sampling_params import SamplingParams

from ..models import FAMILIES, greedy, load_reference, make_model

SENTENCES = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at",
    "The three laws of thermodynamics are",
    "SELECT name FROM users WHERE",
    "In 1969, humans first",
    "My favourite recipe for tomato soup starts with",
    "Dear Sir or Madam,",
    "The difference between a process and a thread is",
    "1, 1, 2, 3, 5, 8,",
    "Shakespeare wrote",
    "To install the package, run",
    "The quick brown fox",
    "Photosynthesis is the process by which",
]


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """All prompts at once; ids in the prompts' order; invariants after every step."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        engine.check()
    return tokens


def random_prompts(count: int, vocab: int) -> list[list[int]]:
    rng = random.Random(1)
    stem = [rng.randrange(3, vocab) for _ in range(40)]
    return [
        stem[: rng.randrange(40)] + [rng.randrange(3, vocab) for _ in range(rng.randrange(1, 60))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_and_logprobs_equal_transformers(family: str, tmp_path: Path) -> None:
    path = make_model(family, tmp_path)
    reference = load_reference(path)
    prompts = random_prompts(6, 160)
    expected = [greedy(reference, prompt, 24) for prompt in prompts]
    engine = Engine(EngineConfig(model=str(path), device="cpu", kv_blocks=100, max_batch_tokens=50))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    assert run(engine, prompts, params) == expected
    engine.add_request(
        "logprobs", prompts[0], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
    )
    outputs: list[SequenceOutput] = []
    while engine.has_work:
        outputs += engine.step()
    ours = [entry for output in outputs for entry in output.logprobs or []]
    with torch.inference_mode():
        logits = reference(torch.tensor([prompts[0] + expected[0][:4]])).logits[0, len(prompts[0]) - 1 : -1]
    values, ids = torch.log_softmax(logits, -1).topk(5)
    for entry, row, row_ids in zip(ours, values, ids, strict=True):
        assert [token for token, _ in entry.top] == row_ids.tolist()
        torch.testing.assert_close(torch.tensor([v for _, v in entry.top]), row, atol=1e-4, rtol=1e-4)
        assert entry.logprob == entry.top[0][1]


@pytest.mark.parametrize(
    ("block_tokens", "max_batch_tokens", "kv_blocks", "preemption", "prefix_cache"),
    [
        (block_tokens, budget, tokens // block_tokens, preemption, prefix)
        for block_tokens, budget, tokens, preemption, prefix in itertools.product(
            (8, 16, 64), (17, 256), (256, 4096), ("recompute", "swap"), (True, False)
        )
    ],
)
def test_same_ids_under_every_combination(
    tmp_path_factory: pytest.TempPathFactory,
    block_tokens: int,
    max_batch_tokens: int,
    kv_blocks: int,
    preemption: str,
    prefix_cache: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "matrix"
    if not path.exists():
        make_model("llama", path)
    engine = Engine(
        EngineConfig(
            model=str(path / "llama"),
            device="cpu",
            threads=1,  # several would wait for each other, with a model so small
            block_tokens=block_tokens,
            kv_blocks=kv_blocks,
            host_blocks=kv_blocks,
            max_batch_tokens=max_batch_tokens,
            preemption=preemption,  # type: ignore[arg-type]
            prefix_cache=prefix_cache,
        )
    )
    prompts = random_prompts(8, 160)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    together = run(engine, prompts, params)
    if kv_blocks * block_tokens == 256:
        stats = engine.stats()
        assert stats.preemptions_recompute + stats.preemptions_swap > 0
    alone = [run(engine, [prompt], params)[0] for prompt in prompts[:3]]
    assert together[:3] == alone
    wanted = tmp_path_factory.getbasetemp() / "matrix.json"
    if not wanted.exists():
        reference = load_reference(path / "llama")
        wanted.write_text(json.dumps([greedy(reference, prompt, 40) for prompt in prompts]))
    assert together == json.loads(wanted.read_text())


def test_smollm2_equals_transformers_on_thirty_prompts() -> None:
    path = prepare("SmolLM2-135M-Instruct")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    questions = [f"<|im_start|>user\n{s} ...?<|im_end|>\n<|im_start|>assistant\n" for s in SENTENCES]
    prompts = [tokenizer.encode(text).ids for text in SENTENCES + questions]
    assert len(prompts) == 30
    engine = Engine(
        EngineConfig(
            model=str(path), dtype="float32", device="cpu", threads=1, kv_blocks=300, max_num_seqs=32
        )
    )
    ours = run(engine, prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    engine.close()
    reference = load_reference(path)
    for prompt, output in zip(prompts, ours, strict=True):
        assert len(output) == 64
        # One pass over prompt and output says what transformers would have chosen after each token of it:
        # if all of that is the output, so is what it generates token by token, for a thirtieth of the time.
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == output
    assert [greedy(reference, prompt, 64) for prompt in prompts[:2]] == ours[:2]


def test_the_layout_digest_depends_on_content_alone(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "a")
    copy = make_model("llama", tmp_path / "b")
    other = make_model("llama", tmp_path / "c", initializer_range=0.1)

    def digest(folder: Path, **changes: object) -> str:
        settings = {"dtype": torch.float32, "block_tokens": 16, "tensor_parallel": 1, **changes}
        config = ModelConfig.from_directory(folder)
        with WeightsIdentity(folder) as identity:
            return layout_digest(identity.result(), config, **settings)  # type: ignore[arg-type]

    assert digest(path) == digest(copy) != digest(other)
    distinct = {
        digest(path),
        digest(path, dtype=torch.float16),
        digest(path, block_tokens=8),
        digest(path, tensor_parallel=2),
    }
    assert len(distinct) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported are"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotates 0.5 of each head"),
        ({"num_key_value_heads": 4}, "6 heads and 4 KV heads"),
        ({"vocab_size": "many"}, "cannot be understood"),
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = make_model("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_directory(path)


def test_settings_that_cannot_work_name_themselves(tmp_path: Path) -> None:
    path = str(make_model("llama", tmp_path))
    for settings, message in (
        ({"kv_blocks": 10**9}, "lower kv_blocks"),
        ({"kv_bytes": 1}, "kv_bytes leaves no room for a single KV block of [0-9]+ bytes"),
        ({"max_model_len": 513}, "max_model_len is 513"),
        ({"max_batch_tokens": -1}, "max_batch_tokens"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"tensor_parallel": 4, "kv_blocks": 8}, "6 heads, 3 KV heads"),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(EngineConfig(model=path, device="cpu", **settings))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device is 'cuda'"):
            Engine(EngineConfig(model=path, device="cuda"))
    (tmp_path / "llama" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks a \.safetensors"):
        Engine(EngineConfig(model=path, device="cpu"))
