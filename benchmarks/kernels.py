# mypy: disable-error-code="import-untyped,no-untyped-call"
"""What the Triton kernels reach of a GPU's limits: ``python benchmarks/kernels.py`` (part of ``make gpu``).

Memory-bound kernels are measured in GB/s against the copy bandwidth of the same device in the same run,
prefill in TFLOP/s against the fastest backend of torch's scaled_dot_product_attention that takes the shape.
Everything runs inside CUDA graphs, so that no launch is in the numbers, and over layers whose KV together
is several times the L2 cache, as a model's is. Every measured attention is first compared with its
reference. Prints a table and writes ``benchmarks/results/kernels-<device>.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from blockyard.kernels import PagedBatch, reference

RESULTS = Path(__file__).parent / "results"
MIB, GIB = 2**20, 2**30
REPLAYS = 30
BLOCK_TOKENS = 16
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int


SHAPES = (
    Shape("Llama-3.1-8B", 32, 8, 128, 32),
    Shape("Qwen3-0.6B", 16, 8, 128, 28),
    Shape("SmolLM2-135M", 9, 3, 64, 30),
    Shape("Llama-2-7B", 32, 32, 128, 32),
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over replays and the 10th and 90th percentiles."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance of the percentiles, as a share of the median."""
        return (self.high - self.low) / (2 * self.median)


def measure(calls: Sequence[Callable[[], object]]) -> Timing:
    """Capture the calls one after the other in a graph; time its replays; divide by the calls."""
    for call in calls[:1]:
        call()  # compiles, and lets libraries set up, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)
    ]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) / 1e3 / len(calls) for begin, end in events)
    del graph
    return Timing(statistics.median(times), times[REPLAYS // 10], times[-1 - REPLAYS // 10])


def copy_bandwidth() -> tuple[float, Timing]:
    """Bytes read and written a second by torch's own copy of 1 GiB."""
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)] * 4)
    return 2 * GIB / timing.median, timing


class Paged:
    """Sequences of the given lengths over a shuffled pool of several layers."""

    def __init__(
        self, shape: Shape, queries: list[int], contexts: list[int], *, layers: int, block_major: bool = True
    ) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        counts = [-(-c // BLOCK_TOKENS) for c in contexts]
        blocks = sum(counts)
        inner = (2, shape.kv_heads, BLOCK_TOKENS, shape.head_dim)
        if block_major:
            pool = torch.empty(blocks, layers, *inner, dtype=torch.bfloat16, device="cuda")
            self.kv = [pool[:, layer] for layer in range(layers)]
        else:
            pool = torch.empty(layers, blocks, *inner, dtype=torch.bfloat16, device="cuda")
            self.kv = list(pool)
        for kv in self.kv:
            kv.normal_(generator=generator)
        ids = torch.randperm(blocks, generator=generator, device="cuda").to(torch.int32)
        tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32, device="cuda")
        for row, part in enumerate(ids.split(counts)):
            tables[row, : len(part)] = part
        self.tokens, self.heads, self.scale = sum(queries), shape.heads, shape.head_dim**-0.5
        self.q = torch.empty(
            self.tokens, shape.heads, shape.head_dim, dtype=torch.bfloat16, device="cuda"
        ).normal_(generator=generator)
        self.batch = PagedBatch(
            block_tables=tables,
            rows=torch.arange(len(contexts), dtype=torch.int32, device="cuda"),
            query_starts=torch.tensor([0, *queries], device="cuda").cumsum(0).to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
            num_decodes=sum(q == 1 for q in queries),
            max_query_len=max(queries),
            max_context_len=max(contexts),
        )
        self.kv_bytes = sum(contexts) * 2 * shape.kv_heads * shape.head_dim * 2

    def calls(self) -> list[Callable[[], object]]:
        from blockyard.kernels import triton_ops

        def call(kv: Tensor) -> Callable[[], object]:
            return lambda: triton_ops.paged_attention(self.q, kv, self.batch, scale=self.scale)

        return [call(kv) for kv in self.kv]

    def check(self) -> None:
        from blockyard.kernels import triton_ops

        actual = triton_ops.paged_attention(self.q, self.kv[0], self.batch, scale=self.scale)
        expected = reference.paged_attention(self.q, self.kv[0], self.batch, scale=self.scale)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def fits(kv_bytes: int) -> bool:
    return kv_bytes < 0.6 * torch.cuda.mem_get_info()[0]


def layers_beyond_cache(shape: Shape, layer_bytes: int) -> int:
    """Enough layers that a replay finds none of its KV in the L2 cache, and no more."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(shape.layers, -(-4 * cache // layer_bytes)))


def decode(limit: float) -> list[dict[str, Any]]:
    cases: list[tuple[str, list[int]]] = [
        (f"{batch} x {context}", [context] * batch)
        for batch, context in (
            (1, 1024),
            (1, 16384),
            (1, 131072),
            (8, 4096),
            (64, 512),
            (64, 4096),
            (256, 1024),
        )
    ]
    cases.append(("63 x 256 and 1 x 65536", [256] * 63 + [65536]))
    rows = []
    for shape in SHAPES:
        for name, contexts in cases:
            layer_bytes = sum(contexts) * 4 * shape.kv_heads * shape.head_dim
            layers = layers_beyond_cache(shape, layer_bytes)
            if not fits(layers * layer_bytes):
                print(f"decode {shape.name} {name}: its KV does not fit in this device; left out")
                continue
            paged = Paged(shape, [1] * len(contexts), contexts, layers=layers)
            if layer_bytes <= GIB // 4:
                paged.check()
            timing = measure(paged.calls())
            rate = (paged.kv_bytes + 4 * paged.q.numel()) / timing.median
            rows.append(row("decode", f"{shape.name} {name}", timing, gb_s=rate / 1e9, of_copy=rate / limit))
            del paged
            torch.cuda.empty_cache()
    return rows


def prefill() -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        for tokens, context in ((512, 512), (2048, 2048), (8192, 8192), (2048, 16384), (16, 16384)):
            visible = tokens * (context - tokens) + tokens * (tokens + 1) // 2
            work = 4 * shape.heads * shape.head_dim * visible
            paged = Paged(shape, [tokens], [context], layers=1)
            if tokens * context <= 2048 * 2048:
                paged.check()
            calls = max(1, min(20, int(1e12 // work)))
            timing = measure(paged.calls() * calls)
            backend, best = best_sdpa(shape, tokens, context, calls)
            rows.append(
                row(
                    "prefill",
                    f"{shape.name} {tokens} of {context}",
                    timing,
                    tflop_s=work / timing.median / 1e12,
                    sdpa_tflop_s=work / best.median / 1e12,
                    sdpa_backend=backend,
                    of_sdpa=best.median / timing.median,
                )
            )
            del paged
            torch.cuda.empty_cache()
    return rows


def best_sdpa(shape: Shape, tokens: int, context: int, calls: int) -> tuple[str, Timing]:
    """The fastest backend on contiguous tensors, with grouped heads where it takes them and without."""
    q, k, v = (
        torch.randn(1, heads, length, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        for heads, length in ((shape.heads, tokens), (shape.kv_heads, context), (shape.kv_heads, context))
    )
    group = shape.heads // shape.kv_heads
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    whole = tokens == context
    mask = None if whole else causal_lower_right(tokens, context)
    found: list[tuple[str, Timing]] = []
    for backend in BACKENDS:
        for grouped in (True, False):
            keys, values = (k, v) if grouped else (wide_k, wide_v)

            def call(keys: Tensor = keys, values: Tensor = values, grouped: bool = grouped) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=grouped and group > 1
                )

            try:
                with sdpa_kernel(backend):
                    found.append((backend.name.split("_")[0].lower(), measure([call] * calls)))
            except (RuntimeError, ValueError):  # this backend does not support the shape
                torch.cuda.synchronize()
    if not found:
        raise RuntimeError(f"no SDPA backend takes {shape.name} with {tokens} of {context} tokens")
    return min(found, key=lambda pair: pair[1].median)


def orders() -> list[dict[str, Any]]:
    """Block-major against one region a layer: the same decode, the same tables, other strides."""
    rows = []
    for shape in SHAPES[:3]:
        contexts = [4096] * 8
        layer_bytes = sum(contexts) * 4 * shape.kv_heads * shape.head_dim
        if not fits(2 * shape.layers * layer_bytes):
            print(f"orders {shape.name}: two pools do not fit in this device; left out")
            continue
        first, second = (
            Paged(shape, [1] * 8, contexts, layers=shape.layers, block_major=major) for major in (True, False)
        )
        # Twice each, in turn, so that a drift of the clocks shows as a difference of the same with itself.
        times = [measure(paged.calls()) for paged in (first, second, first, second)]
        block_major, per_layer = (
            dataclasses.replace(
                a, median=(a.median + b.median) / 2, low=min(a.low, b.low), high=max(a.high, b.high)
            )
            for a, b in ((times[0], times[2]), (times[1], times[3]))
        )
        rows.append(
            row(
                "orders",
                f"{shape.name} 8 x 4096, {shape.layers} layers",
                block_major,
                gb_s=first.kv_bytes / block_major.median / 1e9,
                per_layer_gb_s=second.kv_bytes / per_layer.median / 1e9,
                per_layer_spread=per_layer.spread,
                of_per_layer=per_layer.median / block_major.median,
            )
        )
        del first, second
        torch.cuda.empty_cache()
    return rows


def streams(limit: float) -> list[dict[str, Any]]:
    """The kernels that only move numbers; their bytes are those that must be read and written."""
    from blockyard.kernels import triton_ops

    rows = []

    def add(name: str, moved: int, calls: list[Callable[[], object]]) -> None:
        timing = measure(calls)
        rate = moved / timing.median
        rows.append(row("streams", name, timing, gb_s=rate / 1e9, of_copy=rate / limit))

    tokens, width, inner = 8192, 4096, 14336
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x, residual, weight = (
        torch.randn(tokens, width, **kind),
        torch.randn(tokens, width, **kind),
        torch.ones(width, **kind),
    )
    gate_up = torch.randn(tokens, 2 * inner, **kind)
    size = tokens * width * 2
    add(f"rms_norm {tokens} x {width}", 2 * size, [lambda: triton_ops.rms_norm(x, weight, 1e-5)] * 5)
    add(
        f"add_rms_norm {tokens} x {width}",
        4 * size,
        [lambda: triton_ops.add_rms_norm(x, residual, weight, 1e-5)] * 5,
    )
    add(f"swiglu {tokens} x {inner}", 6 * tokens * inner, [lambda: triton_ops.swiglu(gate_up)] * 5)

    heads, kv_heads, head_dim = 32, 8, 128
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, **kind)
    pool = torch.zeros(tokens // BLOCK_TOKENS, 8, 2, kv_heads, BLOCK_TOKENS, head_dim, **kind)
    slots = torch.randperm(tokens, device="cuda")
    table = torch.rand(tokens, head_dim // 2, device="cuda")

    def write(layer: int) -> Callable[[], object]:
        return lambda: triton_ops.rope_and_write_kv(
            qkv, pool[:, layer], slots, slots, table, table, num_heads=heads
        )

    add(f"rope_and_write_kv {tokens} tokens", 4 * qkv.numel(), [write(layer) for layer in range(8)])

    # Outside a graph: the pairs come from the host. Large enough that the launch is nothing.
    blocks = 2048
    big = torch.zeros(2 * blocks, MIB, dtype=torch.uint8, device="cuda")
    pairs = torch.stack((torch.randperm(blocks), blocks + torch.randperm(blocks)), dim=1)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        triton_ops.copy_blocks(big, big, pairs)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    times.sort()
    timing = Timing(statistics.median(times), times[REPLAYS // 10], times[-1 - REPLAYS // 10])
    rate = 2 * blocks * MIB / timing.median
    rows.append(
        row("streams", f"copy_blocks {blocks} x 1 MiB", timing, gb_s=rate / 1e9, of_copy=rate / limit)
    )
    return rows


def row(group: str, name: str, timing: Timing, **numbers: float | str) -> dict[str, Any]:
    """One line of the results; printed at once."""
    found = {"group": group, "name": name, "us": timing.median * 1e6, "spread": timing.spread, **numbers}
    told = "  ".join(
        f"{key} {value:.0%}" if key.startswith("of_") or key.endswith("spread")
        else f"{key} {value:.4g}" if isinstance(value, float)
        else f"{key} {value}"
        for key, value in found.items()
        if key not in ("group", "name")
    )  # fmt: skip
    print(f"{group:8} {name:44} {told}", flush=True)
    return found


def main() -> int:
    groups = ("decode", "prefill", "orders", "streams")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=groups, nargs="+", default=groups, help="measure these groups alone"
    )
    wanted = parser.parse_args().only
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py measures CUDA kernels; there is no CUDA device here: nothing was measured"
        )
        return 0
    import triton

    name = torch.cuda.get_device_name(0)
    limit, timing = copy_bandwidth()
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}")
    print(f"copy bandwidth {limit / 1e9:.0f} GB/s, spread {timing.spread:.1%}\n")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        if "decode" in wanted:
            rows += decode(limit)
        if "prefill" in wanted:
            rows += prefill()
        if "orders" in wanted:
            rows += orders()
        if "streams" in wanted:
            rows += streams(limit)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    report = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "python " + " ".join(sys.argv),
        "copy_gb_s": limit / 1e9,
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
