"""The short convolution's kernels against float64 PyTorch: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_patch.ops import short_convolution
from megatron_patch.ops.triton import convolution
from tests.ops import cases
from tests.ops.cases import DEVICE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def make(B=1, T=9, D=6, W=4, *, state=True, **how):
    return cases.make_convolution(B, T, D, W, absent=() if state else ("initial_state",), **how)


def evaluate(tensors, backend, dtype=None, **arguments):
    """Returns results and gradients in order."""
    found = cases.evaluate(short_convolution, tensors, dtype, backend=backend, **arguments)
    return list(found.values())


def assert_right(tensors, **arguments):
    arguments.setdefault("output_final_state", True)
    tolerance = TOLERANCE[tensors["x"].dtype]
    found = evaluate(tensors, "triton", **arguments)
    wanted = evaluate(tensors, "torch", torch.float64, **arguments)
    for x, want in zip(found, wanted, strict=True):
        assert x.shape == want.shape
        assert (x.double() - want).norm() <= tolerance * want.norm()


@pytest.fixture
def short_runs(monkeypatch):
    """Makes programs so short that short sequences have several."""
    monkeypatch.setattr(convolution, "FORWARD_RUN", 8)
    monkeypatch.setattr(convolution, "BACKWARD_RUN", 8)


@pytest.mark.parametrize("T", range(1, 18))
def test_every_length(short_runs, T):
    assert_right(make(T=T))


@pytest.mark.parametrize("T", [31, 32, 33, 63, 64, 65, 66])
def test_edges_of_runs(T):
    assert_right(make(T=T, D=2, state=False))


@pytest.mark.parametrize("W", [1, 2, 3, 5])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_every_width(short_runs, W, T):
    assert_right(make(2, T, W=W))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("D", [8, 300])
def test_half_precision(dtype, activation, D):
    assert_right(make(2, 10, D, dtype=dtype), activation=activation)


@pytest.mark.parametrize("output_final_state", [False, True])
def test_without_a_state(output_final_state):
    assert_right(make(2, state=False), output_final_state=output_final_state)


BOUNDS = [[0, 20], [0, 5, 5, 17, 20], [0, 0, 1, 2, 19, 20, 20], [0, 8, 9, 10, 16, 20]]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_sequences(short_runs, bounds, state, integer):
    cu_seqlens = torch.tensor(bounds, dtype=integer, device=DEVICE)
    tensors = make(T=20, N=len(bounds) - 1, state=state)
    assert_right(tensors, cu_seqlens=cu_seqlens, output_final_state=state)


def test_boundaries_with_gaps_in_memory():
    table = torch.tensor([[0, 3], [4, 9], [20, 0]], dtype=torch.int32, device=DEVICE)
    assert_right(make(T=20, N=2), cu_seqlens=table[:, 0])


def test_rows_behind_the_last_sequence(short_runs):
    """Rows past the last sequence may hold NaN, which reaches neither results nor gradients."""
    tensors = make(T=20, N=2)
    cut = {"x": tensors["x"][:, :13]} | {n: x for n, x in tensors.items() if n != "x"}
    bounds = torch.tensor([0, 4, 13])
    how = {"output_final_state": True}
    wanted = evaluate(cut, "torch", torch.float64, cu_seqlens=bounds.to(DEVICE), **how)
    tensors["x"][:, 13:] = math.nan
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    # The public function rejects such cu_seqlens on the CPU, so call the kernels directly.
    y, state = convolution._with_gradients(*_ordered(leaves), bounds.to(DEVICE), True, True)
    assert (y[:, 13:] == 0).all()
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(x.shape, generator=generator).bfloat16().to(y) for x in (wanted[0], wanted[1])
    ]
    d_y = torch.full_like(y, math.nan)
    d_y[:, :13] = weights[0]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), [d_y, weights[1]])
    assert (gradients[0][:, 13:] == 0).all()
    found = [y[:, :13], state, gradients[0][:, :13], *gradients[1:]]
    for x, want in zip(found, wanted, strict=True):
        assert (x.double() - want).norm() <= 1e-5 * want.norm()


def _ordered(tensors):
    return tensors["x"], tensors["weight"], tensors.get("initial_state")


@pytest.mark.parametrize("last", ["B", "T", "D"])
def test_reads_any_strides(last):
    dense = make(2, 11)
    dim = "BTD".index(last)
    x = dense["x"].transpose(dim, 2).contiguous().transpose(dim, 2)
    assert_right(dense | {"x": x})
    time_major = dense["x"].transpose(0, 1).contiguous().transpose(0, 1)
    y, _ = short_convolution(time_major, dense["weight"], backend="triton")
    assert y.is_contiguous()
    x = time_major.requires_grad_()
    y, _ = short_convolution(x, dense["weight"], backend="triton")
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert d_x.stride() == x.stride()
    wide = torch.cat([dense["x"], dense["x"]], -1)[..., 3:9]  # neither dense nor aligned
    assert_right(dense | {"x": wide})


def test_strided_gradient_of_the_output():
    tensors = make(2, 11)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in tensors.items()}
        y, _ = short_convolution(**leaves, backend=backend)
        results.append(torch.autograd.grad(y.sum(), list(leaves.values())))  # strides of zero
    for x, want in zip(*results, strict=True):
        assert (x.double() - want).norm() <= 1e-5 * want.norm()


def test_parameter_in_another_dtype():
    tensors = make(2, dtype=torch.bfloat16)
    tensors["weight"] = tensors["weight"].float()
    found = evaluate(tensors, "triton")
    assert found[2].dtype == torch.float32
    assert_right(tensors)


def test_two_runs_have_equal_bits_and_inputs_stay(short_runs):
    tensors = make(2, 20)
    kept = {name: x.clone() for name, x in tensors.items()}
    first = evaluate(tensors, "triton", output_final_state=True)
    second = evaluate(tensors, "triton", output_final_state=True)
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(kept[name], x) for name, x in tensors.items())


def test_final_state_over_the_initial_one():
    tensors = make(2, 6)
    wanted = short_convolution(**tensors, output_final_state=True, backend="triton")
    found = short_convolution(**tensors, inplace_final_state=True, backend="triton")
    assert found[1] is tensors["initial_state"]
    assert all(map(torch.equal, found, wanted))


def test_nan_is_not_hidden():
    tensors = make(1, 12, state=False)
    tensors["x"][0, 5] = math.nan
    y, _ = short_convolution(**tensors, backend="triton")
    assert y[0, 5:9].isnan().all() and y[0, :5].isfinite().all() and y[0, 9:].isfinite().all()


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    D=st.integers(1, 9),
    W=st.integers(1, 5),
    state=st.booleans(),
)
def test_any_packing(lengths, D, W, state):
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    tensors = make(1, bounds[-1], D, W, N=len(lengths), state=state)
    assert_right(tensors, cu_seqlens=torch.tensor(bounds, device=DEVICE))


@pytest.mark.parametrize("packed", [False, True])
def test_operator_check(packed):
    bounds = torch.tensor([0, 2, 5], device=DEVICE) if packed else None
    tensors = make(T=5, N=2 if packed else 1)
    arguments = [x.requires_grad_() for x in _ordered(tensors)]
    torch.library.opcheck(convolution._forward, (*arguments, bounds, True, True))
    torch.library.opcheck(convolution._forward, (*arguments[:2], None, bounds, True, False))


def test_compiles_without_graph_breaks():
    tensors = {name: x.requires_grad_() for name, x in make(2).items()}
    compiled = torch.compile(short_convolution, fullgraph=True, backend="aot_eager")
    found = compiled(**tensors, output_final_state=True, backend="triton")
    wanted = short_convolution(**tensors, output_final_state=True, backend="triton")
    assert all(map(torch.equal, found, wanted))
    inputs = list(tensors.values())
    first, second = (torch.autograd.grad(y.square().sum(), inputs[:2]) for y, _ in (found, wanted))
    assert all(map(torch.equal, first, second))


def test_vmap_and_make_fx_see_the_operator():
    x, weight = torch.randn(3, 2, 9, 6, device=DEVICE), torch.randn(6, 1, 4, device=DEVICE)

    def convolve(x):
        return short_convolution(x, weight, backend="triton")[0]

    assert torch.equal(torch.vmap(convolve)(x), torch.stack([convolve(part) for part in x]))
    assert "metala.short_convolution" in make_fx(convolve)(x[0]).code
