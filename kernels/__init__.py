"""Floor 1: operations on tensors; ``reference`` defines each, ``dispatch`` chooses the implementation."""

from .batch import PagedBatch
from .cpu_ops import Linear
from .dispatch import (
    add_rms_norm,
    backend,
    copy_blocks,
    linear,
    merge_partials,
    paged_attention,
    paged_attention_partial,
    prepare_linear,
    rms_norm,
    rope,
    rope_and_write_kv,
    swiglu,
    write_kv,
)

__all__ = [
    "Linear",
    "PagedBatch",
    "add_rms_norm",
    "backend",
    "copy_blocks",
    "linear",
    "merge_partials",
    "paged_attention",
    "paged_attention_partial",
    "prepare_linear",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "swiglu",
    "write_kv",
]
