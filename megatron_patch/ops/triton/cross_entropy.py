"""Cross entropy over a vocabulary that can be split over tensor-parallel ranks.

The forward pass reads the logits once (online softmax). The backward pass reads them and overwrites
them with their gradient. No float32 copy of them exists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from megatron_patch.ops.triton.launch import cdiv, launch

BLOCK, WARPS = 4096, 8  # columns of a row that a program reads at a time


@triton.jit(do_not_specialize=["start"])
def cross_entropy_fwd(logits, target, lse, picked, start, V, stride, BLOCK: tl.constexpr):
    """Writes log(sum(exp(logits))) of a row of V logits, and the logit of its target, or 0 if the
    target is not among the columns [start, start + V). One program serves a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        # Both are -inf until a column is in range, and their difference would be NaN.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = higher
    top = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - top), 0)
    tl.store(lse + row, top + tl.log(total))
    own = tl.load(target + row) - start
    inside = (own >= 0) & (own < V)
    value = tl.load(logits + tl.where(inside, own, 0)).to(tl.float32)
    tl.store(picked + row, tl.where(inside, value, 0.0))


@triton.jit(do_not_specialize=["start"])
def cross_entropy_bwd(logits, target, lse, d_loss, start, V, stride, BLOCK: tl.constexpr):
    """Overwrites logits by d_loss * (softmax(logits) - onehot(target)). Grid: (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * stride + column
    x = tl.load(at, mask=column < V, other=0.0).to(tl.float32)
    own = tl.load(target + row) - start
    gradient = tl.exp(x - tl.load(lse + row)) - tl.where(column == own, 1.0, 0.0)
    gradient *= tl.load(d_loss + row)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=column < V)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any) -> Tensor:
        rows, columns = logits.shape
        lse, picked = logits.new_empty(2, rows, dtype=torch.float32)
        ranks = 1 if group is None else distributed.get_world_size(group)
        start = 0 if ranks == 1 else distributed.get_rank(group) * columns
        with torch.cuda.device_of(logits):
            launch(
                cross_entropy_fwd, (rows,), (logits, target, lse, picked),
                (start, columns, logits.stride(0)), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        if ranks > 1:
            top = lse.clone()
            distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([(lse - top).exp(), picked])
            distributed.all_reduce(sums, group=group)
            lse, picked = top + sums[0].log(), sums[1]
        ctx.save_for_backward(logits, target, lse)
        ctx.start, ctx.is_spent = start, False
        return lse - picked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None]:
        if ctx.is_spent:
            raise RuntimeError("cross_entropy: the first backward pass has overwritten the logits")
        ctx.is_spent = True
        logits, target, lse = ctx.saved_tensors
        rows, columns = logits.shape
        with torch.cuda.device_of(logits):
            launch(
                cross_entropy_bwd, (rows, cdiv(columns, BLOCK)),
                (logits, target, lse, d_loss.contiguous()),
                (ctx.start, columns, logits.stride(0)), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        return logits, None, None


def cross_entropy(logits: Tensor, target: Tensor, group: Any = None) -> Tensor:
    """-log(softmax(logits)[target]) of each row, in float32.

    Args:
        logits: [N, V] float16, bfloat16 or float32, last stride 1: this rank's columns. The
            backward pass overwrites them with their gradient, so it can run once.
        target: [N] int64, indices into the whole vocabulary.
        group: the tensor-parallel process group, whose rank r holds the columns from r V on;
            `None` where the vocabulary is whole.

    Returns:
        [N] float32. Two all-reduces of [N] and [2, N] float32 where the vocabulary is split.
    """
    return _CrossEntropy.apply(logits, target, group)
