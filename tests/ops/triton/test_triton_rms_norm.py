"""The kernels of the norm of a sum and of the sum of gradients, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import add_rms_norm
from megatron_patch.ops.backends import function_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bfloat16 instead of rounding.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2,
}


def evaluate(tensors, gradients, backend, dtype):
    """Returns (sum, norm, gradients of the tensors); the sum only if a gradient is given for it."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
    results = add_rms_norm(*inputs, eps=1e-3, backend=backend)
    used = [(y, d) for y, d in zip(results, gradients, strict=True) if d is not None]
    outputs, d_outputs = zip(*used, strict=True)
    d_outputs = [d.to(dtype) for d in d_outputs]
    return *results, *torch.autograd.grad(outputs, inputs, d_outputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 1024), (2, 1000), (4, 3)], ids=str)
def test_equals_float64(dtype, used, count, shape):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, *shape, generator=generator).to(DEVICE, dtype)
    tensors = draws[:count]
    gradients = [d if is_used else None for d, is_used in zip(draws[2:], used, strict=True)]
    found = evaluate(tensors, gradients, "triton", dtype)
    wanted = evaluate(tensors, gradients, "torch", torch.float64)
    for value, want in zip(found, wanted, strict=True):
        assert value.shape == want.shape and value.dtype == dtype
        assert (value.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_strided_tensors_and_the_norm_alone():
    x, residual = torch.randn(2, 4, 6, 40, device=DEVICE).transpose(1, 2)
    total, normed = add_rms_norm(x, residual, backend="triton")
    torch.testing.assert_close(normed, add_rms_norm(x, residual, backend="torch")[1])
    # The norm is computed again in a backward pass, from the sum.
    assert torch.equal(add_rms_norm(total, backend="triton")[1], normed)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing(shape):
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    total, normed = add_rms_norm(x, x, backend="triton")
    assert normed.shape == torch.autograd.grad(normed.sum() + total.sum(), x)[0].shape == shape


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("count", [1, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_in_float32(count, dtype, backend):
    """To the sum, or to zeros, whatever the sum held. -0 + 0 is 0 in both."""
    add = function_of("accumulate", backend)
    # The interpreter truncates to bfloat16 instead of rounding.
    rtol = 2**-7 if (DEVICE, dtype, backend) == ("cpu", torch.bfloat16, "triton") else 0
    gradient = torch.randn(count, device=DEVICE, dtype=torch.bfloat16)
    gradient[0] = -0.0
    flags = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    for is_first in (None, *flags):
        total = torch.randn(count, device=DEVICE, dtype=dtype)
        wanted = total.float() + gradient.float()
        if is_first:
            total.fill_(float("nan"))
            wanted = torch.zeros_like(wanted) + gradient.float()
        add(total, gradient, is_first)
        torch.testing.assert_close(total, wanted.to(dtype), rtol=rtol, atol=0)
        assert torch.equal(total.signbit(), wanted.signbit())
