"""The norm of a sum against its formula, and the arguments that it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import add_rms_norm


def test_is_its_formula():
    x, residual = torch.randn(2, 2, 3, 10, dtype=torch.float64).requires_grad_()
    total, normed = add_rms_norm(x, residual, eps=1e-3)
    wanted = (x + residual) / ((x + residual).square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(normed, wanted, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(add_rms_norm, (x, residual))


def test_without_a_residual():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    total, normed = add_rms_norm(x)
    assert torch.equal(total, x)
    assert torch.equal(normed, add_rms_norm(x, torch.zeros_like(x))[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, dtype=torch.int64),), "x: found torch.int64"),
        ((torch.ones(()),), "x: found torch.float32"),
        ((torch.ones(2, 4), torch.ones(2, 3)), "residual"),
        ((torch.ones(2, 4), torch.ones(2, 4).double()), "residual"),
    ],
)
def test_refuses_other_tensors(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_rms_norm(*arguments)
