"""SwiGLU against its formula, and the arguments that it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import swiglu


def test_is_its_formula():
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(swiglu, x)


def test_takes_two_tensors():
    gate, up = torch.randn(2, 2, 3, 5, dtype=torch.float64).requires_grad_()
    joined = swiglu(torch.cat([gate, up], dim=-1))
    torch.testing.assert_close(swiglu(gate, up), joined, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    for other in (up[..., :4], up.float(), up[0], up.tolist()):
        with pytest.raises(ValueError, match="^up"):
            swiglu(gate, other)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 5), r"gate_and_up: found torch.float32 \[2, 5\], wanted floats \[\.\.\., 2"),
        (torch.ones(()), "gate_and_up: found"),
        (torch.ones(2, 4, dtype=torch.int64), "gate_and_up: found torch.int64"),
    ],
)
def test_refuses_other_tensors(x, message):
    with pytest.raises(ValueError, match=message):
        swiglu(x)


def test_refuses_unknown_and_impossible_backends():
    x = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend: found 'cuda', the known ones are 'auto'"):
        swiglu(x, backend="cuda")
    with pytest.raises(ValueError, match="backend 'triton': "):
        swiglu(x, backend="triton")
