# mypy: disable-error-code="import-untyped"
"""What a Triton launch must know of the device: its size, its shared memory, how it multiplies.

The one place that asks, once per device: a launch inside a captured CUDA graph must not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_DOT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Device:
    """Streaming multiprocessors, and the bytes of shared memory that one program may take."""

    multiprocessors: int
    shared_memory: int


@functools.lru_cache
def device_of(device: torch.device) -> Device:
    """The facts of a CUDA device; those of a tiny one for CPU tensors, which only the interpreter sees."""
    if device.type != "cuda":
        return Device(multiprocessors=2, shared_memory=99 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def dot_type(a: Tensor, b: Tensor) -> Any:
    """The type in which ``tl.dot`` multiplies a and b; sums are float32 in any case.

    Operands of different types meet in float32, so nothing is lost. The interpreter holds bfloat16 as bit
    patterns, which it cannot multiply.
    """
    if a.dtype != b.dtype or (INTERPRETED and a.dtype == torch.bfloat16):
        return tl.float32
    return _DOT_TYPES[a.dtype]
