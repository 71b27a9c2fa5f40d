"""RMS norm without weights, joined with the residual addition before it, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.launch import launch


@triton.jit
def add_rms_norm_fwd_kernel(
    x, residual, total, normed, rstd, eps, D: tl.constexpr, BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """total = x + residual; normed = total * rstd; rstd = 1 / sqrt(mean(total^2) + eps).

    One program serves a row of D. Without a residual x is normed and `total` is not written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, mask = row * D + column, column < D
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(rstd + row, scale)
    tl.store(normed + at, (value * scale).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm_bwd_kernel(
    total, rstd, d_total, d_normed, d_x, D: tl.constexpr, BLOCK: tl.constexpr,
    HAS_D_TOTAL: tl.constexpr,
):  # fmt: skip
    """d_x = d_total + rstd (d_normed - x_hat mean(d_normed x_hat)), x_hat = total * rstd. It is the
    gradient of x and that of the residual. Same grid."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, mask = row * D + column, column < D
    scale = tl.load(rstd + row)
    x_hat = tl.load(total + at, mask=mask, other=0.0).to(tl.float32) * scale
    gradient = tl.load(d_normed + at, mask=mask, other=0.0).to(tl.float32)
    gradient = scale * (gradient - x_hat * (tl.sum(gradient * x_hat, 0) / D))
    if HAS_D_TOTAL:
        gradient += tl.load(d_total + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=mask)


def _launch(kernel: Any, like: Tensor, tensors: tuple, numbers: tuple = (), **flags: bool) -> None:
    width = like.shape[-1]
    if like.numel() == 0:
        return
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(like):
        launch(
            kernel, (like.numel() // width,), tensors, numbers,
            D=width, BLOCK=block, num_warps=min(max(block // 256, 1), 16), **flags,
        )  # fmt: skip


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        kept, residual = x.contiguous(), residual.contiguous() if ctx.has_residual else None
        total = torch.empty_like(kept) if ctx.has_residual else kept
        normed, rstd = torch.empty_like(kept), kept.new_empty(kept.shape[:-1], dtype=torch.float32)
        _launch(
            add_rms_norm_fwd_kernel, kept, (kept, residual, total, normed, rstd), (float(eps),),
            HAS_RESIDUAL=ctx.has_residual,
        )  # fmt: skip
        ctx.save_for_backward(total, rstd)
        return total if ctx.has_residual else x.view_as(x), normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple:
        if d_normed is None:
            return d_total, d_total if ctx.has_residual else None, None
        total, rstd = ctx.saved_tensors
        d_total = None if d_total is None else d_total.contiguous()
        d_x = torch.empty_like(total)
        _launch(
            add_rms_norm_bwd_kernel, total, (total, rstd, d_total, d_normed.contiguous(), d_x),
            HAS_D_TOTAL=d_total is not None,
        )  # fmt: skip
        return d_x, d_x if ctx.has_residual else None, None


def add_rms_norm(x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Computes `megatron_patch.ops.add_rms_norm` on arguments that it has checked."""
    return _AddRMSNorm.apply(x, residual, eps)
