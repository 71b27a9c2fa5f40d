"""Clipping, AdamW and the copy of the weights in the model's dtype, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.launch import cdiv

BLOCK = 2048


@triton.jit
def adam_step_kernel(
    parameter, copy, gradient, mean, square, factor, count,
    lr, beta1, beta2, eps, weight_decay, correction1, correction2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of AdamW, algorithm 2 of arXiv 1711.05101. If the factor is 0, nothing changes."""
    scale = tl.load(factor)
    if scale != 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < count
        g = tl.load(gradient + at, mask=mask).to(tl.float32) * scale
        m = beta1 * tl.load(mean + at, mask=mask) + (1 - beta1) * g
        v = beta2 * tl.load(square + at, mask=mask) + (1 - beta2) * g * g
        p = tl.load(parameter + at, mask=mask)
        update = m / correction1 / (tl.sqrt(v / correction2) + eps)
        p -= lr * (update + weight_decay * p)
        tl.store(mean + at, m, mask=mask)
        tl.store(square + at, v, mask=mask)
        tl.store(parameter + at, p, mask=mask)
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=mask)


def adam_step(
    parameter: Tensor,
    copy: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    factor: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    corrections: tuple[float, float],
) -> None:
    """As `torch_training.adam_step`, for contiguous tensors."""
    count = parameter.numel()
    with torch.cuda.device_of(parameter):
        # Not by `launch`, which keeps a compiled kernel for each value of its numbers: some of
        # these change with every step.
        adam_step_kernel[(cdiv(count, BLOCK),)](
            parameter, copy, gradient, mean, square, factor, count,
            lr, *betas, eps, weight_decay, *corrections, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
