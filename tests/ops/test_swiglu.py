"""SwiGLU against its formula, and the arguments that it refuses."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import swiglu, swiglu_linear


def test_is_its_formula():
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(swiglu, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_a_linear_layer_behind_it_has_the_same_bits(dtype):
    """And keeps its arguments alone."""
    x = torch.randn(3, 5, 14, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    d_y = torch.randn(3, 5, 4, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = swiglu_linear(x, weight)
    wanted = torch.nn.functional.linear(swiglu(x), weight)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(y, [x, weight], d_y) for y in (found, wanted)]
    assert all(map(torch.equal, *gradients))
    weight.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(swiglu_linear(x, weight), x, d_y)[0], gradients[0][0])


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
    with pytest.raises(ValueError, match="backend: found 'cuda', the known ones are 'auto'"):
        swiglu_linear(x, x, backend="cuda")
    with pytest.raises(ValueError, match="backend 'triton': "):
        swiglu(x, backend="triton")
