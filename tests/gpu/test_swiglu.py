"""The Triton backend of `swiglu` against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import swiglu, swiglu_linear
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


@pytest.mark.parametrize("width", [2816, 5632])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_with_a_linear_layer_behind_it_has_the_same_bits(width):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (8, 512, 2 * width), (1024, width), (8, 512, 1024)
    x, weight, d_out = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes
    )
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    wanted = torch.nn.functional.linear(swiglu(x, backend="triton"), weight)
    found = swiglu_linear(*leaves, backend="triton")
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(y, leaves, d_out) for y in (found, wanted)]
    assert all(map(torch.equal, *gradients))
