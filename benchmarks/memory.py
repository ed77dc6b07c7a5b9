"""How much of the KV memory in use holds nothing: ``python benchmarks/memory.py``.

The real scheduler and block pool serve a public trace's requests at full load; only the model is left out,
since its numbers do not matter here. Every some steps all slots of blocks in use are counted, as in the
PagedAttention paper (SOSP'23, figure 2): *useful* slots hold a token's KV (shared blocks count once),
*reserved* ones will hold a later token of the request, *internal* ones never will. For the same sequences at
the same moments it is also counted what a server wastes that gives each request one piece of memory as long
as its longest possible answer, or the next power of two.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import report
import torch

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.sampling_params import SamplingParams
from blockyard.engine.step import StepInput

DATA = Path(__file__).parents[2] / "shared" / "data"
TRACE_BLOCK = 512  # tokens of one hash id of the Mooncake trace
VOCAB = 1 << 16
SAMPLE_EVERY = 20  # steps
TARGET = 0.04


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a trace; ``parts`` name its prompt's content, equal ones are equal tokens."""

    prompt: int
    output: int
    parts: tuple[int, ...] = ()


def azure() -> Iterator[Row]:
    with (DATA / "azure-2023-conv.csv").open() as file:
        for line in csv.DictReader(file):
            yield Row(int(line["ContextTokens"]), int(line["GeneratedTokens"]))


def mooncake() -> Iterator[Row]:
    with (DATA / "mooncake-conversation.jsonl").open() as file:
        for line in map(json.loads, file):
            yield Row(line["input_length"], line["output_length"], tuple(line["hash_ids"]))


TRACES = {"azure-2023-conv": azure, "mooncake-conversation": mooncake}


def prompt_ids(number: int, row: Row) -> list[int]:
    """Tokens that are equal exactly where the trace says that content is."""
    parts = row.parts or range(-(number + 1) * 1000, -number * 1000)
    stream = ((part * 7919 + i * (1 + part % 61)) % VOCAB for part in parts for i in range(TRACE_BLOCK))
    return list(islice(stream, row.prompt))


class NoModel:
    """A runner without a model: every next token is token 0."""

    layout_digest = "none"
    dtype = torch.float32
    device = torch.device("cpu")
    vocab_size = VOCAB
    eos_token_ids = ()
    block_bytes = 1
    host_blocks = 0

    def __init__(
        self, *, num_blocks: int, max_num_seqs: int, max_batch_tokens: int, max_model_len: int
    ) -> None:
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self._logits = torch.zeros(max_num_seqs, 1)

    def execute(self, step: StepInput) -> torch.Tensor | None:
        return self._logits[: len(step.sampled)] if len(step.sampled) else None

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Slots:
    """Token slots summed over all samples, by what they are for."""

    useful: int = 0
    reserved: int = 0
    internal: int = 0

    def add(self, useful: int, reserved: int, internal: int) -> None:
        self.useful += useful
        self.reserved += reserved
        self.internal += internal

    def shares(self) -> dict[str, float]:
        total = max(1, self.useful + self.reserved + self.internal)
        return {name: getattr(self, name) / total for name in ("useful", "reserved", "internal")}


@dataclass(slots=True)
class Census:
    paged: Slots = field(default_factory=Slots)
    power_of_two: Slots = field(default_factory=Slots)
    longest: Slots = field(default_factory=Slots)
    samples: int = 0
    running: int = 0
    occupied: float = 0.0

    def take(self, engine: Engine, block_tokens: int) -> None:
        """Count every slot of every block that a running sequence holds."""
        filled: dict[int, tuple[int, int]] = {}  # block -> (tokens in it, slots that will be filled later)
        limit = engine.info.max_model_len
        for request in engine.scheduler.running:
            final = (
                len(request.prompt_ids) + request.params.max_tokens - 1
            )  # the last token's KV is never kept
            for sequence in request.live:
                done = sequence.num_computed
                for index, block in enumerate(sequence.blocks):
                    begin = index * block_tokens
                    here = min(block_tokens, done - begin)
                    later = min(block_tokens, max(final, done) - begin) - here
                    filled[block] = max(filled.get(block, (0, 0)), (here, later))
                for slots, size in (
                    (self.power_of_two, 1 << (final - 1).bit_length()),
                    (self.longest, limit),
                ):
                    slots.add(done, final - done, max(size, final) - final)
        useful = sum(here for here, _ in filled.values())
        reserved = sum(later for _, later in filled.values())
        self.paged.add(useful, reserved, len(filled) * block_tokens - useful - reserved)
        self.samples += 1
        self.running += len(engine.scheduler.running)
        usage = engine.scheduler.pool.usage()
        self.occupied += usage.active / usage.total
        assert usage.active == len(filled), "the pool says that more blocks are in use than sequences hold"


def replay(name: str, count: int, block_tokens: int, pool_tokens: int) -> dict[str, Any]:
    rows = list(islice(TRACES[name](), count))
    longest = max(row.prompt + row.output for row in rows)
    runner = NoModel(
        num_blocks=pool_tokens // block_tokens, max_num_seqs=256, max_batch_tokens=8192, max_model_len=longest
    )
    engine = Engine(EngineConfig(model="none", block_tokens=block_tokens), runner)
    census = Census()
    waiting = iter(enumerate(rows))
    finished: Counter[str] = Counter()
    begin = time.perf_counter()
    steps = 0
    while True:
        while len(engine.scheduler.queue) < 32 and (item := next(waiting, None)) is not None:
            number, row = item
            params = SamplingParams(temperature=0, max_tokens=max(1, row.output), ignore_eos=True)
            engine.add_request(str(number), prompt_ids(number, row), params)
        if not engine.has_work:
            break
        for output in engine.step():
            if output.finish_reason:
                finished[output.finish_reason] += 1
        steps += 1
        if steps % SAMPLE_EVERY == 0:
            census.take(engine, block_tokens)
    engine.check()
    assert finished == {"length": len(rows)}, finished
    stats = engine.stats()
    return {
        "trace": name,
        "requests": len(rows),
        "block_tokens": block_tokens,
        "pool_tokens": pool_tokens,
        "steps": steps,
        "samples": census.samples,
        "running": census.running / census.samples,
        "pool_in_use": census.occupied / census.samples,
        "preemptions": stats.preemptions_recompute,
        "hit_rate": stats.prefix_hits / max(1, stats.prefix_queries),
        "paged": census.paged.shares(),
        "power_of_two": census.power_of_two.shares(),
        "longest": census.longest.shares(),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000, help="of each trace (default: %(default)s)")
    parser.add_argument(
        "--pool-tokens", type=int, default=1 << 19, help="about 64 GiB for Llama-3.1-8B in bf16"
    )
    arguments = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"the traces are not at {DATA}; see docs/performance.md for where they come from")
    results = []
    print("| trace | block tokens | running | pool in use | hits | useful | reserved | internal | wasted |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in TRACES:
        for block_tokens in (16, 64):
            found = replay(name, arguments.requests, block_tokens, arguments.pool_tokens)
            results.append(found)
            for policy in ("paged", "power_of_two", "longest"):
                if policy != "paged" and block_tokens != 16:
                    continue
                share = found[policy]
                unit = str(block_tokens) if policy == "paged" else policy.replace("_", " ")
                print(
                    f"| {name} | {unit} | {found['running']:.0f} | {found['pool_in_use']:.0%} "
                    f"| {found['hit_rate']:.0%} "
                    f"| {share['useful']:.2%} | {share['reserved']:.2%} | {share['internal']:.2%} "
                    f"| {1 - share['useful']:.2%} |",
                    flush=True,
                )
    worst = max(1 - found["paged"]["useful"] for found in results if found["block_tokens"] == 16)
    print(f"\nwith 16 tokens a block (the default) {worst:.2%} are wasted; wanted: {TARGET:.0%} at most")
    report.save("memory", {"target": TARGET, "worst_with_default": worst, "traces": results})


if __name__ == "__main__":
    main()
