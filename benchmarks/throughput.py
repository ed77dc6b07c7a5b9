"""Our engine against sequential ``transformers.generate``: ``python benchmarks/throughput.py``.

Both sides get the same requests, decode greedily in float32 with the same threads in the same process, and
run in turns: before each part of the sequential side the engine serves all requests once. Each turn gives a
ratio of output tokens a second; the report has their median and extremes, how many outputs are equal id by
id, and which share of the machine's matrix-product limit the engine reached.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import report
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.model.config import ModelConfig
from blockyard.engine.model.files import prepare
from blockyard.engine.sampling_params import SamplingParams

MODEL = "SmolLM2-135M-Instruct"
TARGETS = {"mixed": 8.0, "shared prefix": 10.0, "conversations": 5.0}


@dataclass(slots=True)
class Job:
    """A conversation of one turn or several: what the user adds in each, and how much is answered."""

    turns: list[tuple[list[int], int]]  # new prompt tokens, output tokens

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.turns)


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(100, 49000) for _ in range(rng.randint(low, high))]


def workloads() -> dict[str, list[Job]]:
    rng = random.Random(0)
    prefix = tokens(rng, 512, 512)
    return {
        "mixed": [Job([(tokens(rng, 16, 512), rng.randint(32, 256))]) for _ in range(64)],
        "shared prefix": [Job([(prefix + tokens(rng, 16, 64), rng.randint(32, 128))]) for _ in range(64)],
        "conversations": [
            Job([(tokens(rng, 32, 96), rng.randint(32, 96)) for _ in range(6)]) for _ in range(8)
        ],
    }


class Ours:
    """The engine; conversations go on side by side, each turn when the one before it is answered."""

    def __init__(self, path: Path) -> None:
        config = EngineConfig(model=str(path), device="cpu", dtype="float32", kv_bytes=2 << 30)
        self.engine = Engine(config)

    def serve(self, jobs: list[Job]) -> list[list[int]]:
        """All outputs of each job, concatenated."""
        self.engine.scheduler.pool.clear_cache()
        outputs: list[list[int]] = [[] for _ in jobs]
        history: list[list[int]] = [[] for _ in jobs]
        turn = [0] * len(jobs)

        def ask(number: int) -> None:
            added, count = jobs[number].turns[turn[number]]
            history[number] += added
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            self.engine.add_request(str(number), list(history[number]), params)

        for number in range(len(jobs)):
            ask(number)
        while self.engine.has_work:
            for output in self.engine.step():
                number = int(output.request_id)
                outputs[number] += output.token_ids
                history[number] += output.token_ids
                if output.finish_reason is not None:
                    turn[number] += 1
                    if turn[number] < len(jobs[number].turns):
                        ask(number)
        return outputs

    def computed(self) -> int:
        """Tokens that went through the model so far."""
        stats = self.engine.stats()
        return stats.prompt_tokens - stats.prefix_hits + stats.generated_tokens


def sequential(model: PreTrainedModel, job: Job) -> list[int]:
    """One conversation by ``generate``, turn after turn, each with its whole history as the prompt."""
    history: list[int] = []
    outputs: list[int] = []
    for added, count in job.turns:
        history += added
        ids = torch.tensor([history])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        new = whole[0, len(history) :].tolist()
        history += new
        outputs += new
    return outputs


def flops(config: ModelConfig, computed: int, sampled: int) -> float:
    """Of the linear layers alone; attention comes on top, so the share of the limit is on the low side."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    layer = hidden * (width + 2 * kv_width) + width * hidden + 3 * hidden * config.intermediate_size
    return 2.0 * (config.num_layers * layer * computed + config.vocab_size * hidden * sampled)


def turns(
    name: str, jobs: list[Job], ours: Ours, model: PreTrainedModel, rounds: int, every: int
) -> Iterator[dict[str, Any]]:
    """Each round: the engine serves everything, then ``generate`` its share of the jobs."""
    for number in range(rounds):
        before = ours.computed()
        begin = time.perf_counter()
        outputs = ours.serve(jobs)
        our_seconds = time.perf_counter() - begin
        computed = ours.computed() - before
        part = range(number * every, len(jobs), rounds * every)
        begin = time.perf_counter()
        expected = {i: sequential(model, jobs[i]) for i in part}
        their_seconds = time.perf_counter() - begin
        our_rate = sum(map(len, outputs)) / our_seconds
        their_rate = sum(jobs[i].output_tokens for i in part) / their_seconds
        print(
            f"{name}, round {number + 1}: {our_rate:.0f} against {their_rate:.1f} output tokens/s", flush=True
        )
        yield {
            "ours_tokens_per_s": our_rate,
            "ours_seconds": our_seconds,
            "ours_computed_tokens": computed,
            "sequential_tokens_per_s": their_rate,
            "ratio": our_rate / their_rate,
            "equal_outputs": sum(outputs[i] == ids for i, ids in expected.items()),
            "compared_outputs": len(expected),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="turns of each workload (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=1, help="the sequential side gets each so-manieth request (default: all)"
    )
    parser.add_argument("--only", choices=list(TARGETS), nargs="+", default=list(TARGETS))
    arguments = parser.parse_args()
    path = prepare(MODEL)
    config = ModelConfig.from_directory(path)
    ours = Ours(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    warm = [Job([(list(range(100, 140)), 4)])]
    ours.serve(warm)
    sequential(model, warm[0])
    limit = report.matmul_gflops()
    rows = []
    for name, jobs in workloads().items():
        if name not in arguments.only:
            continue
        runs = list(turns(name, jobs, ours, model, arguments.rounds, arguments.every))
        sampled = sum(job.output_tokens for job in jobs)
        gflops = [flops(config, r["ours_computed_tokens"], sampled) / r["ours_seconds"] / 1e9 for r in runs]
        rows.append(
            {
                "workload": name,
                "target_ratio": TARGETS[name],
                "ratio": report.spread([r["ratio"] for r in runs]),
                "ours_tokens_per_s": report.spread([r["ours_tokens_per_s"] for r in runs]),
                "sequential_tokens_per_s": report.spread([r["sequential_tokens_per_s"] for r in runs]),
                "linear_gflops": report.spread(gflops),
                "share_of_matmul_limit": report.spread([g / limit for g in gflops]),
                "equal_outputs": sum(r["equal_outputs"] for r in runs),
                "compared_outputs": sum(r["compared_outputs"] for r in runs),
                "rounds": runs,
            }
        )
    print(f"\n{MODEL} float32; the machine's matrix products reach {limit:.0f} GFLOP/s\n")
    print("| workload | engine tok/s | generate tok/s | ratio (min to max) | target | of limit | equal ids |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = row["ratio"]
        print(
            f"| {row['workload']} | {row['ours_tokens_per_s']['median']:.0f} "
            f"| {row['sequential_tokens_per_s']['median']:.1f} "
            f"| {ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f}) | {row['target_ratio']:.0f} "
            f"| {row['share_of_matmul_limit']['median']:.0%} "
            f"| {row['equal_outputs']}/{row['compared_outputs']} |"
        )
    part = "" if arguments.only == list(TARGETS) else "-" + "-".join(arguments.only).replace(" ", "-")
    report.save(f"throughput-cpu{part}", {"model": MODEL, "matmul_gflops": limit, "workloads": rows})


if __name__ == "__main__":
    main()
