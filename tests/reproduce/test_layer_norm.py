"""LayerNorm's kernels, in Triton's interpreter, beside PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

layer_norm = pytest.importorskip("layer_norm")  # without Triton
INTERPRETED = getattr(pytest.importorskip("triton").knobs.runtime, "interpret", False)
pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="LayerNorm's kernels are tested with TRITON_INTERPRET=1 alone"
)


@pytest.mark.parametrize("rows, width", [((3, 7), 32), ((5,), 24), ((2, 150), 128), ((1,), 4096)])
def test_it_is_layer_norm(rows, width, monkeypatch):
    """With rows that fill no tile, several tiles a program, and a width that is no power of 2."""
    monkeypatch.setattr(layer_norm, "PROGRAMS", 3)
    torch.manual_seed(0)
    x = (3 * torch.randn(*rows, width) + 5).requires_grad_()
    weight, bias = (torch.randn(width).requires_grad_() for _ in range(2))
    d_y = torch.randn(*rows, width)
    inputs = (x, weight, bias)
    y = layer_norm.layer_norm(*inputs, 1e-5)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    wanted = F.layer_norm(wide[0], (width,), *wide[1:], 1e-5)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for found, true in zip(
        torch.autograd.grad(y, inputs, d_y), torch.autograd.grad(wanted, wide, d_y.double()),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=2e-5)
