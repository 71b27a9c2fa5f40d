"""SwiGLU, silu(gate) * up, on one tensor of both halves or on two tensors.

The backward kernel computes the activation again, so that only the inputs are saved, and writes
both gradients at once, into one tensor if the halves came in one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.launch import cdiv, launch
from megatron_patch.ops.triton.tiles import sigmoid

ROWS, COLUMNS = 4, 1024  # per program; a thread then loads 16 bytes per row of 16-bit values


@triton.jit
def tile_indices(count, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns this program's rows [ROWS, 1] and columns [1, COLUMNS], and which are in range."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < count) & (column < F)


@triton.jit(do_not_specialize=["count"])
def swiglu_fwd_kernel(
    gate, up, y, count, F: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [count, F] = silu(gate) * up. Rows of gate and up are STRIDE apart. Grid: (blocks of rows,
    blocks of columns)."""
    row, column, mask = tile_indices(count, F, ROWS, COLUMNS)
    at = row * STRIDE + column
    gate = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    value = gate * sigmoid(gate) * up
    tl.store(y + row * F + column, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def swiglu_bwd_kernel(
    gate, up, d_y, d_gate, d_up, y, count, F: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turns d_y [count, F] into d_gate and d_up, with the strides of gate and up, and writes y
    again unless it is `None`; y may be d_y. Same grid."""
    row, column, mask = tile_indices(count, F, ROWS, COLUMNS)
    at = row * STRIDE + column
    gate = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(d_y + row * F + column, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    gate_gradient = gradient * up * s * (1.0 + gate * (1.0 - s))
    up_gradient = gradient * gate * s
    tl.store(d_gate + at, gate_gradient.to(d_gate.dtype.element_ty), mask=mask)
    tl.store(d_up + at, up_gradient.to(d_up.dtype.element_ty), mask=mask)
    if y is not None:
        value = gate * s * up  # in the order of the forward pass, for the same bits
        tl.store(y + row * F + column, value.to(y.dtype.element_ty), mask=mask)


def _launch(kernel: Any, gate: Tensor, up: Tensor, *others: Tensor | None, stride: int) -> None:
    if gate.numel() == 0:
        return
    width = gate.shape[-1]
    count = gate.numel() // width
    grid = cdiv(count, ROWS), cdiv(width, COLUMNS)
    with torch.cuda.device_of(gate):
        launch(
            kernel, grid, (gate, up, *others), (count,),
            F=width, STRIDE=stride, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip


class _SwiGLU(torch.autograd.Function):
    """Takes (gate, up), or (both halves in one tensor, `None`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None) -> Tensor:
        kept = [part.contiguous() for part in (x, up) if part is not None]
        gate, up = kept if up is not None else kept[0].chunk(2, dim=-1)
        y = x.new_empty(gate.shape)
        _launch(swiglu_fwd_kernel, gate, up, y, stride=kept[0].shape[-1])
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor | None]:
        kept = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in kept]
        inputs, outputs = (
            (*x,) if len(x) == 2 else x[0].chunk(2, dim=-1) for x in (kept, gradients)
        )
        stride = kept[0].shape[-1]
        _launch(swiglu_bwd_kernel, *inputs, d_y.contiguous(), *outputs, None, stride=stride)
        return gradients[0], gradients[1] if len(gradients) == 2 else None


swiglu = _SwiGLU.apply


def swiglu_backward(gate_and_up: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of `gate_and_up` [..., 2 F], given that of y [..., F], and y again,
    which takes the memory of a contiguous d_y."""
    x, y = gate_and_up.contiguous(), d_y.contiguous()
    d_x = torch.empty_like(x)
    (gate, up), (d_gate, d_up) = x.chunk(2, dim=-1), d_x.chunk(2, dim=-1)
    _launch(swiglu_bwd_kernel, gate, up, y, d_gate, d_up, y, stride=x.shape[-1])
    return d_x, y
