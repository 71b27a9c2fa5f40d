"""The Triton kernels for one token against float64, with real models' widths."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import meta_linear_attention, short_convolution
from tests.ops.cases import assert_step_right, make, make_convolution

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Heads, K, V.
WIDTHS = [(8, 64, 128), (8, 128, 256), (16, 64, 128), (4, 256, 512), (8, 40, 80), (8, 48, 96)]
WIDTHS += [
    (8, 16, 16),
    (1, 16, 32),
    (16, 32, 32),
    (8, 64, 64),
    (8, 128, 128),
    (4, 256, 256),
    (8, 128, 64),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("heads", "k", "v"), WIDTHS)
@pytest.mark.parametrize(("batch", "gates"), [(1, 1.0), (5, 1.0), (5, 1e4)])
def test_operator_equals_float64(dtype, heads, k, v, batch, gates):
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = make(batch, 1, heads, k, v, dtype=dtype, gates=gates, generator=generator)
    assert_step_right(meta_linear_attention, tensors, "reference", LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 2, 4, 5])
def test_convolution_equals_float64(dtype, kernel_size):
    generator = torch.Generator("cuda").manual_seed(0)
    absent = ("initial_state",) if kernel_size == 1 else ()
    tensors = make_convolution(
        5, 1, 1000, kernel_size, dtype=dtype, absent=absent, generator=generator
    )
    assert_step_right(short_convolution, tensors, "torch", LIMITS[dtype])
