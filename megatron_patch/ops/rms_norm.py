"""The public RMS norm, joined with the residual addition before it."""

from __future__ import annotations

import torch

from megatron_patch.ops.backends import implementation
from megatron_patch.ops.checks import FLOAT_DTYPES, check_tensor, is_traced


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + residual and its RMS norm, without weights.

    Args:
        x: [..., D] float16, bfloat16, float32 or float64. Not modified.
        residual: like x; without it x alone is normed.
        eps: is added to the mean of the squares.
        backend: "triton" (CUDA; one pass in each direction, no second derivatives), "torch", or
            "auto": the first of these that can run, but "torch" under `torch.compile`, which fuses
            it, and under `torch.func`.

    Returns:
        The sum (without a residual x itself or a view of it), and sum / sqrt(mean(sum^2) + eps)
        over the last dimension, both in x's dtype. Sums and means of 16-bit tensors are float32.
        The sum is rounded before it is normed. Go on with the returned sum, not with x: its
        gradient is then added to that of the norm in the same pass.

    Raises:
        ValueError: the dtype is not a float, `residual` is not like x, or the backend asked for by
            name cannot run here.
    """
    shape, dtype = list(x.shape), x.dtype
    if not shape or dtype not in FLOAT_DTYPES:
        raise ValueError(f"x: found {dtype} {shape}, wanted floats [..., D]")
    if residual is not None:
        check_tensor("residual", residual, "x's", shape, (dtype,), x.device)
    if backend == "auto" and is_traced(x, residual):
        backend = "torch"
    return implementation("add_rms_norm", backend, dtype, x.device)(x, residual, eps)
