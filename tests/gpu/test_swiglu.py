"""The Triton backend of `swiglu` against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import swiglu
from tests.ops.cases import evaluate, relative_error

LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
# F of the configurations of 0.38B, 1B and 3B, and others.
WIDTHS = (2816, 5632, 8192, 1408, 5, 1)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 1001])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_equals_float64(dtype, width, rows):
    generator = torch.Generator("cuda").manual_seed(0)
    x = 3 * torch.randn(rows, 2 * width, device="cuda", generator=generator)
    d_y = torch.randn(rows, width, device="cuda", generator=generator).to(dtype)
    tensors = {"gate_and_up": x.to(dtype)}
    found, again = (evaluate(swiglu, tensors, None, [d_y], backend="triton") for _ in range(2))
    wanted = evaluate(swiglu, tensors, torch.float64, [d_y], backend="torch")
    for name, want in wanted.items():
        assert relative_error(found[name], want) <= LIMITS[dtype], name
        assert torch.equal(found[name], again[name]), name
