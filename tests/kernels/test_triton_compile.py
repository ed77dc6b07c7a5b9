"""Every Triton kernel, as real models use it, becomes machine code for A100, H100 and B200."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (100, 80, 90)  # the slowest first: two are compiled at a time
TIMEOUT_S = 800
TARGETS = {80: ".target sm_80", 90: ".target sm_90a", 100: ".target sm_100a"}
KERNELS = {
    "attention_kernel",
    "copy_blocks_kernel",
    "merge_pair_kernel",
    "merge_splits_kernel",
    "rms_norm_kernel",
    "rope_and_write_kv_kernel",
    "rope_kernel",
    "swiglu_kernel",
    "write_kv_kernel",
}


def _compile(capability: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run(
        [sys.executable, program, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> dict[int, Future[list[dict[str, Any]]]]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        return {capability: pool.submit(_compile, capability) for capability in CAPABILITIES}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_and_fits(
    capability: int, compiled: dict[int, Future[list[dict[str, Any]]]]
) -> None:
    reports = compiled[capability].result()
    assert {report["kernel"] for report in reports} == KERNELS
    for report in reports:
        assert report["cubin"] > 0
        assert report["ptx_target"].startswith(TARGETS[capability]), report
        assert report["shared"] <= report["limit"], report
        assert not report["tf32"], f"float32 is multiplied as TF32: {report}"
        if report["kernel"] == "attention_kernel":
            assert report["tensor_cores"] == (report["constants"]["DOT"] != "fp32"), report


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_decision_table_is_compiled_in_all_its_rows(
    capability: int, compiled: dict[int, Future[list[dict[str, Any]]]]
) -> None:
    constants = [r["constants"] for r in compiled[capability].result() if r["kernel"] == "attention_kernel"]
    decodes = {(c["BLOCK_M"], c["BLOCK_D"], c["DOT"] == "fp32") for c in constants if c["DECODE"] == "True"}
    chunks = {(c["BLOCK_M"], c["BLOCK_D"], c["DOT"] == "fp32") for c in constants if c["DECODE"] == "False"}
    assert {("16", "64", False), ("16", "128", False), ("16", "256", False), ("64", "64", False)} <= decodes
    assert {("16", "64", True), ("16", "128", True), ("16", "256", True)} <= decodes
    assert {("16", "128", False), ("64", "128", False), ("128", "128", False), ("64", "256", False)} <= chunks
    assert {("32", "64", True), ("16", "128", True), ("16", "256", True)} <= chunks
