"""The public SwiGLU followed by a linear layer, which keeps only the input of both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_patch.ops.backends import choose, function_of
from megatron_patch.ops.swiglu import swiglu


def swiglu_linear(gate_and_up: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns (silu(gate) * up) weight^T, the MLP behind its first product.

    The weight's gradient needs the activation. One kernel computes it again beside the gradients of
    gate and up, for which it reads the same tensors.

    Args:
        gate_and_up: [..., 2 F], the gate before `up`; see `swiglu`, also for `backend`.
        weight: [D, F] in the same dtype.

    Returns:
        [..., D] in the same dtype.

    Raises:
        ValueError: as `swiglu` does.
    """
    return _SwiGLULinear.apply(gate_and_up, weight, backend)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, weight: Tensor, backend: str) -> Tensor:
        ctx.backend = choose("swiglu_backward", backend, gate_and_up.dtype, gate_and_up.device)
        ctx.save_for_backward(gate_and_up, weight)
        return F.linear(swiglu(gate_and_up, backend=backend), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate_and_up, weight = ctx.saved_tensors
        d_out = d_out.reshape(-1, d_out.shape[-1])
        d_y = (d_out @ weight).view(*gate_and_up.shape[:-1], -1)
        d_gate_and_up, y = function_of("swiglu_backward", ctx.backend)(gate_and_up, d_y)
        d_weight = d_out.t() @ y.view(-1, y.shape[-1]) if ctx.needs_input_grad[1] else None
        return d_gate_and_up, d_weight, None
