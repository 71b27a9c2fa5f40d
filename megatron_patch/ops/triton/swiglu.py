"""SwiGLU on one tensor of both halves or on two: a kernel forward, and one backward, which computes
the activation again and writes the gradients of both halves, into one tensor where they are one."""

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
def forward(
    gate, up, y, count, F: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [count, F] = silu(gate) * up, whose rows lie STRIDE apart. Grid: (blocks of rows, of
    columns)."""
    row, column, mask = place(count, F, ROWS, COLUMNS)
    at = row * STRIDE + column
    gate = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    value = gate * sigmoid(gate) * up
    tl.store(y + row * F + column, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def backward(
    gate, up, d_y, d_gate, d_up, count, F: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_gate and d_up, laid out as gate and up, from d_y [count, F]. Grid: as `forward`."""
    row, column, mask = place(count, F, ROWS, COLUMNS)
    at = row * STRIDE + column
    gate = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(d_y + row * F + column, mask=mask, other=0.0).to(tl.float32)
    open_ = sigmoid(gate)
    of_gate = gradient * up * open_ * (1.0 + gate * (1.0 - open_))
    of_up = gradient * gate * open_
    tl.store(d_gate + at, of_gate.to(d_gate.dtype.element_ty), mask=mask)
    tl.store(d_up + at, of_up.to(d_up.dtype.element_ty), mask=mask)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, dim=-1)


def _launch(kernel: Any, gate: Tensor, up: Tensor, *others: Tensor, stride: int) -> None:
    if gate.numel() == 0:
        return
    width = gate.shape[-1]
    count = gate.numel() // width
    grid = triton.cdiv(count, ROWS), triton.cdiv(width, COLUMNS)
    with torch.cuda.device_of(gate):
        kernel[grid](
            gate, up, *others, count, F=width, STRIDE=stride, ROWS=ROWS, COLUMNS=COLUMNS,
            num_warps=4,
        )  # fmt: skip


class _SwiGLU(torch.autograd.Function):
    """Of both halves in one tensor, and the second `None`; or of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None) -> Tensor:
        kept = [part.contiguous() for part in (x, up) if part is not None]
        gate, up = kept if up is not None else _halves(kept[0])
        y = x.new_empty(gate.shape)
        _launch(forward, gate, up, y, stride=kept[0].shape[-1])
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor | None]:
        kept = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in kept]
        inputs, outputs = ((*x,) if len(x) == 2 else _halves(x[0]) for x in (kept, gradients))
        _launch(backward, *inputs, d_y.contiguous(), *outputs, stride=kept[0].shape[-1])
        return gradients[0], gradients[1] if len(gradients) == 2 else None


swiglu = _SwiGLU.apply
