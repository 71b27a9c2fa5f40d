"""What a training step needs beside the operators, in plain PyTorch: sums of gradients, updates."""

from __future__ import annotations

import torch


def accumulate(
    total: torch.Tensor, gradient: torch.Tensor, is_first: torch.Tensor | None = None
) -> None:
    """Adds `gradient` to `total`, of the same shape, in place. If the int32 [] `is_first` is not
    0, `total` counts as zero."""
    if is_first is not None:
        total.masked_fill_(is_first.bool(), 0)
    total.add_(gradient)


def adam_step(
    parameter: torch.Tensor,
    copy: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    factor: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    corrections: tuple[float, float],
) -> None:
    """Takes a step of AdamW (algorithm 2 of arXiv 1711.05101) in place. Waits for the factor.

    Args:
        parameter, mean, square: float32 or float64 [N], the weights and the two moments.
        copy: [N], the weights in the model's dtype, which are overwritten.
        gradient: [N].
        factor: a scalar tensor, by which the gradient is multiplied. If it is 0, nothing changes.
        corrections: 1 - beta ** step for each of the betas, or (1, 1).
    """
    if factor == 0:
        return
    gradient = gradient.to(parameter.dtype) * factor
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (square / corrections[1]).sqrt_().add_(eps)
    parameter.mul_(1 - lr * weight_decay)
    parameter.addcdiv_(mean, denominator, value=-lr / corrections[0])
    copy.copy_(parameter)
