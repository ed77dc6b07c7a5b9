# mypy: disable-error-code="import-untyped"
"""Device properties that a Triton launch needs: multiprocessors, shared memory, the type of products.

They are queried only here and cached, because a launch must not query the device while a CUDA graph is
being captured.
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
    """Properties of a CUDA device; for CPU tensors (Triton's interpreter only) those of a tiny GPU."""
    if device.type != "cuda":
        return Device(multiprocessors=2, shared_memory=99 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def dot_type(a: Tensor, b: Tensor) -> Any:
    """The type in which ``tl.dot`` multiplies a and b; sums are float32 in any case.

    Operands of different types are both converted to float32, so nothing is lost. Triton's interpreter also
    needs float32 for bfloat16, because it stores bfloat16 as bit patterns that it cannot multiply.
    """
    if a.dtype != b.dtype or (INTERPRETED and a.dtype == torch.bfloat16):
        return tl.float32
    return _DOT_TYPES[a.dtype]
