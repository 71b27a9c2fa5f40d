"""SwiGLU's kernels against float64 PyTorch: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_patch.ops import swiglu, swiglu_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half a unit in the last place, plus the error of the approximate exponential. The interpreter
# truncates to bfloat16 instead of rounding.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3,
}


def evaluate(x, d_y, backend, dtype=None):
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    y = swiglu(x, backend=backend)
    return y, *torch.autograd.grad(y, x, d_y.to(y))


def draw(*shape, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(*shape, generator=generator)
    d_y = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
    return x.to(dtype).to(DEVICE), d_y.to(dtype).to(DEVICE)


def assert_right(x, d_y):
    """Checks one tensor against float64, and its two halves against the one tensor."""
    found = evaluate(x, d_y, "triton")
    wanted = evaluate(x, d_y, "torch", torch.float64)
    for value, want in zip(found, wanted, strict=True):
        assert value.shape == want.shape and value.dtype == x.dtype
        assert (value.double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()
    gate, up = (half.detach().requires_grad_() for half in x.chunk(2, dim=-1))
    y = swiglu(gate, up, backend="triton")
    assert torch.equal(y, found[0])
    assert torch.equal(torch.cat(torch.autograd.grad(y, (gate, up), d_y), dim=-1), found[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 5, 2816), (7, 2), (1, 2048), (4, 3, 3000)], ids=str)
def test_equals_float64(dtype, shape):
    assert_right(*draw(*shape, dtype=dtype))


def test_strided_tensors():
    x, d_y = draw(4, 6, 40)
    assert_right(x.transpose(0, 1), d_y.transpose(0, 1))
    assert_right(x, d_y[:1].expand_as(d_y))
    assert_right(x[..., 3:23], d_y[..., :10])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 5, 40), (4, 3, 3000)], ids=str)
def test_with_a_linear_layer_behind_it_has_the_same_bits(dtype, shape):
    """Products of one device are the same where their operands are."""
    x, _ = draw(*shape, dtype=dtype)
    weight, _ = draw(16, shape[-1] // 2, dtype=dtype)
    d_out = draw(*shape[:-1], 32, dtype=dtype)[1]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = swiglu_linear(*leaves, backend="triton")
    wanted = torch.nn.functional.linear(swiglu(x, backend="triton"), weight)
    assert torch.equal(found, wanted)
    first, again = (torch.autograd.grad(found, leaves, d_out, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, torch.autograd.grad(wanted, leaves, d_out)))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing(shape):
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    for y in (swiglu(x, backend="triton"), swiglu(*x.chunk(2, dim=-1), backend="triton")):
        assert y.shape == (shape[0], shape[1] // 2)
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_gates_of_any_size():
    gate = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4], device=DEVICE)
    x = torch.cat([gate, torch.ones_like(gate)])[None].requires_grad_()
    y = swiglu(x, backend="triton")
    assert torch.equal(y[0, 3:], gate[3:]) and (y[0, :3].abs() < 1e-11).all()
    (d_x,) = torch.autograd.grad(y.sum(), x)
    wanted = torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=DEVICE)
    torch.testing.assert_close(d_x[0, :7], wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(d_x[0, 7:], y[0].detach(), rtol=1e-6, atol=1e-11)


def test_nan_is_not_hidden():
    x = torch.ones(1, 8, device=DEVICE)
    x[0, 1] = math.nan
    assert swiglu(x, backend="triton").isnan().tolist() == [[False, True, False, False]]


def test_keeps_its_input_alone():
    x, d_y = draw(4, 64)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x, backend="triton")
        swiglu(x, up := torch.ones_like(x), backend="triton")
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (x, x, up)]


def test_compiles_without_graph_breaks():
    x, d_y = draw(4, 64)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), swiglu(x, backend="torch"))
    torch.testing.assert_close(compiled(x, x), swiglu(x, x, backend="torch"))
