"""What every benchmark reports besides its numbers: machine, versions and command; and the results file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def matmul_gflops(seconds: float = 1.0) -> float:
    """The machine's limit: the best float32 product that torch does here, in GFLOP/s."""
    best = 0.0
    for size in (1024, 1536, 2048):
        a, b = torch.randn(size, size), torch.randn(size, size)
        torch.mm(a, b)
        end = time.perf_counter() + seconds / 3
        while time.perf_counter() < end:
            begin = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin) / 1e9)
    return best


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed (0 for none)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def save(name: str, result: dict[str, Any]) -> None:
    """Write results/``name``.json with the machine and the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=1) + "\n")
    print(f"\nwritten to {os.path.relpath(path)}")
