"""One call of the experiments' LayerNorm, beside PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def results(
    layer_norm: Callable[..., Tensor], rows: tuple[int, ...], width: int, device: str
) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs of what `layer_norm` gives, as float64, and what it should: the norm of x
    [*rows, width], and the gradients of x, weight and bias."""
    torch.manual_seed(0)
    x = (3 * torch.randn(*rows, width, device=device) + 5).requires_grad_()
    weight, bias = (torch.randn(width, device=device).requires_grad_() for _ in range(2))
    d_y = torch.randn(*rows, width, device=device)
    inputs = (x, weight, bias)
    y = layer_norm(*inputs, 1e-5)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    wanted = F.layer_norm(wide[0], (width,), *wide[1:], 1e-5)
    found = (y, *torch.autograd.grad(y, inputs, d_y))
    true = (wanted, *torch.autograd.grad(wanted, wide, d_y.double()))
    return [(a.detach().double(), b.detach()) for a, b in zip(found, true, strict=True)]
