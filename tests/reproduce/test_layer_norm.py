"""LayerNorm's kernels, in Triton's interpreter, beside PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from tests.reproduce.layer_norm_case import results

layer_norm = pytest.importorskip("layer_norm")  # without Triton
INTERPRETED = getattr(pytest.importorskip("triton").knobs.runtime, "interpret", False)
pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="LayerNorm's kernels are tested with TRITON_INTERPRET=1 alone"
)


@pytest.mark.parametrize("rows, width", [((3, 7), 32), ((5,), 24), ((2, 150), 128), ((1,), 4096)])
def test_it_is_layer_norm(rows, width, monkeypatch):
    """With rows that fill no tile, several tiles a program, and a width that is no power of 2."""
    monkeypatch.setattr(layer_norm, "PROGRAMS", 3)
    norm, *gradients = results(layer_norm.layer_norm, rows, width, "cpu")
    torch.testing.assert_close(*norm, rtol=1e-5, atol=1e-5)
    for found, true in gradients:
        torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-5)
