"""Adds a gradient to its sum. PyTorch's kernel for two dtypes loads single elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.launch import cdiv, launch

BLOCK = 4096


@triton.jit
def accumulate_kernel(total, gradient, is_first, count, BLOCK: tl.constexpr):
    """total += gradient, or total = 0 + gradient if there is a flag `is_first` and it is set.

    What a sum held is then not even loaded. 0 + x has the bits of a sum that began at zero, also
    for x = -0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.zeros([BLOCK], tl.float32)
    if is_first is None:
        value = tl.load(total + at, mask=mask).to(tl.float32)
    elif tl.load(is_first) == 0:
        value = tl.load(total + at, mask=mask).to(tl.float32)
    value += tl.load(gradient + at, mask=mask).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=mask)


def accumulate(total: Tensor, gradient: Tensor, is_first: Tensor | None = None) -> None:
    """Adds `gradient` to `total` in place, in float32. Both are contiguous, have as many elements,
    and any floating-point dtype of at most 32 bits. If the int32 [] `is_first` is not 0, `total`
    counts as zero."""
    count = total.numel()
    with torch.cuda.device_of(total):
        launch(
            accumulate_kernel, (cdiv(count, BLOCK),), (total, gradient, is_first), (count,),
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
