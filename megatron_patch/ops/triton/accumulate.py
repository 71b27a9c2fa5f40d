"""Adds a gradient to its float32 sum. PyTorch's kernel for two dtypes loads single elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.launch import cdiv, launch

BLOCK = 4096


@triton.jit
def accumulate_kernel(total, gradient, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(total + at, mask=at < count)
    value += tl.load(gradient + at, mask=at < count).to(tl.float32)
    tl.store(total + at, value, mask=at < count)


def accumulate(total: Tensor, gradient: Tensor) -> None:
    """Adds `gradient` to `total` in place. Both are contiguous and have as many elements."""
    count = total.numel()
    with torch.cuda.device_of(total):
        launch(
            accumulate_kernel, (cdiv(count, BLOCK),), (total, gradient), (count,),
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
