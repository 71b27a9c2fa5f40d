"""Gradients for custom operators, and a shorter way to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_patch.ops.checks import is_traced


def differentiable(
    operator: torch.library.CustomOpDef,
    run: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[[Any, tuple, tuple], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """`operator` with gradients. Where nobody looks at operators a plain `autograd.Function` takes
    its place: PyTorch's way through a custom operator takes longer than the kernels do on short
    sequences.

    Args:
        operator: whose first argument is a tensor.
        run: the function that it was made of.
        setup_context: of (ctx, inputs, output), as for `register_autograd`.
        gradients: of (ctx, whether the way is the plain one, gradients of the results).
    """

    def traced_gradients(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(ctx, False, *found)

    operator.register_autograd(traced_gradients, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
            return gradients(ctx, True, *found)

    def call(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return (operator if is_traced(x) else Eager.apply)(x, *others)

    return call
