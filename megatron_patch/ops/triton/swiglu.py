"""SwiGLU on one tensor of both halves: a kernel forward, and one backward, which computes the
activation again and writes the gradients of both halves into one tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.tiles import sigmoid

ROWS, COLUMNS = 4, 1024  # of a program: eight values of 16 bits a thread and row, words of 16 bytes


@triton.jit
def place(count, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of this program's values as [ROWS, 1] and [1, COLUMNS], and which exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < count) & (column < F)


@triton.jit(do_not_specialize=["count"])
def forward(x, y, count, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [count, F] = silu(x[:, :F]) * x[:, F:]. Grid: (blocks of rows, of columns)."""
    row, column, mask = place(count, F, ROWS, COLUMNS)
    at = x + row * (2 * F) + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    value = gate * sigmoid(gate) * up
    tl.store(y + row * F + column, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def backward(x, d_y, d_x, count, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """d_x [count, 2 F] from d_y [count, F]. Grid: as `forward`."""
    row, column, mask = place(count, F, ROWS, COLUMNS)
    at = row * (2 * F) + column
    gate = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + at + F, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(d_y + row * F + column, mask=mask, other=0.0).to(tl.float32)
    open_ = sigmoid(gate)
    d_gate = gradient * up * open_ * (1.0 + gate * (1.0 - open_))
    d_up = gradient * gate * open_
    tl.store(d_x + at, d_gate.to(d_x.dtype.element_ty), mask=mask)
    tl.store(d_x + at + F, d_up.to(d_x.dtype.element_ty), mask=mask)


def _launch(kernel: Any, x: Tensor, *others: Tensor) -> None:
    if x.numel() == 0:
        return
    count, width = x.numel() // x.shape[-1], x.shape[-1] // 2
    grid = triton.cdiv(count, ROWS), triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(x):
        kernel[grid](x, *others, count, F=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _launch(forward, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _launch(backward, x, d_y.contiguous(), d_x)
        return d_x


swiglu = _SwiGLU.apply
