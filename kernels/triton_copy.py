# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,misc"
"""Copies whole blocks between pools on one GPU; a block is one contiguous slab, so each copy is a memcpy.

One launch copies all pairs of a call. A separate copy for each pair would cost one launch per block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

__all__ = ["copy_blocks"]

COPY_BLOCK = 2048  # elements of a program: 16 KiB of int64
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit(do_not_specialize_on_alignment=["pairs"])
def copy_blocks_kernel(
    source,
    destination,
    pairs,  # int64 [N, 2], contiguous
    slab,  # elements of a block
    stride_source,
    stride_destination,
    BLOCK: tl.constexpr,
):
    """A piece of one slab. Grid: (N, slab / BLOCK)."""
    pair = pairs + 2 * tl.program_id(0)
    read = source + tl.load(pair) * stride_source
    write = destination + tl.load(pair + 1) * stride_destination
    places = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < slab
    tl.store(write + places, tl.load(read + places, mask=mask), mask=mask)


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """See reference.copy_blocks. Pools that the kernel cannot copy (see _as_integers) go through torch."""
    if not pairs.numel():
        return
    slabs = _as_integers(source, destination)
    if slabs is None:
        reference.copy_blocks(source, destination, pairs)
        return
    read, write = slabs
    if read.is_cuda:
        pairs = pairs.contiguous().pin_memory().to(read.device, non_blocking=True)
    slab = read.shape[1]
    copy_blocks_kernel[(pairs.shape[0], triton.cdiv(slab, COPY_BLOCK))](
        read,
        write,
        pairs.contiguous(),
        slab,
        read.stride(0),
        write.stride(0),
        BLOCK=COPY_BLOCK,
        num_warps=8,
        enable_fp_fusion=True,
    )


def _as_integers(source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both pools as [num_blocks, slab] of the widest integer type that divides their strides and addresses.

    None if the kernel cannot copy: different devices, dtypes or block shapes, an empty pool, or blocks that
    are not contiguous.
    """
    if source.device != destination.device or source.dtype != destination.dtype:
        return None
    if source.shape[1:] != destination.shape[1:] or not source.numel() or not destination.numel():
        return None
    if not (source[0].is_contiguous() and destination[0].is_contiguous()):
        return None
    item, slab = source.element_size(), math.prod(source.shape[1:])
    sizes = [slab * item]
    for pool in (source, destination):
        sizes += [pool.stride(0) * item, pool.data_ptr()]
    kind = next(kind for kind in _INTEGERS if all(size % kind.itemsize == 0 for size in sizes))
    read, write = (
        pool.as_strided((pool.shape[0], slab), (pool.stride(0), 1)).view(torch.uint8).view(kind)
        for pool in (source, destination)
    )
    return read, write
