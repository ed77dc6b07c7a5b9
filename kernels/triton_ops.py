"""The CUDA implementation of every operation: the public names of the Triton files in one module."""

from __future__ import annotations

from .triton_attention import merge_partials, paged_attention, paged_attention_partial
from .triton_copy import copy_blocks
from .triton_elementwise import add_rms_norm, rms_norm, swiglu
from .triton_rope import rope, rope_and_write_kv, write_kv

__all__ = [
    "add_rms_norm",
    "copy_blocks",
    "merge_partials",
    "paged_attention",
    "paged_attention_partial",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "swiglu",
    "write_kv",
]
