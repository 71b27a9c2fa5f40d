"""The kernels for one token against float64 PyTorch: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.ops import meta_linear_attention, short_convolution
from megatron_patch.ops.triton import fused_recurrent
from tests.ops import cases
from tests.ops.cases import NAMES, WITHOUT
from tests.ops.cases import assert_step_right as assert_right

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make(B=2, H=2, K=16, V=32, **how):
    return cases.make(B, 1, H, K, V, **how)


def make_convolution(B=2, D=10, W=4, **how):
    return cases.make_convolution(B, 1, D, W, **how)


@pytest.mark.parametrize(
    ("K", "V"),
    [
        (1, 16), (7, 24), (16, 64), (48, 96), (64, 128), (130, 40), (128, 256),
        (16, 16), (32, 32), (64, 64), (128, 128), (64, 32), (128, 64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("absent", [(), ("initial_state",)])
def test_every_width_and_dtype(K, V, dtype, absent):
    tensors = make(1, 1, K, V, dtype=dtype, absent=absent)
    assert_right(meta_linear_attention, tensors, "reference", TOLERANCE[dtype])


@pytest.mark.parametrize("absent", WITHOUT, ids="+".join)
def test_without_options(absent):
    tensors = make(absent=absent)
    numbers = {"tau": 2.5, "scale": -0.3, "norm_eps": 1e-3}
    assert_right(meta_linear_attention, tensors, "reference", 1e-5, **numbers)


@pytest.mark.parametrize("gates", [30.0, 1e4, 1e30])
def test_gates_of_any_size(gates):
    assert_right(meta_linear_attention, make(gates=gates), "reference", 1e-5)


@pytest.mark.parametrize("gate", [-1e4, 1e4])
def test_gates_at_the_bounds(gate):
    tensors = make()
    tensors["gate_logits"].fill_(gate)
    assert_right(meta_linear_attention, tensors, "reference", 1e-5)


def test_slices_of_one_projection_and_a_strided_state():
    B, H, K, V = 3, 2, 16, 32
    dense = make(B, H, K, V)
    names = ("q", "gate_logits", "v", "out_gate")
    fused = torch.cat([dense[name] for name in names], -1)
    fused = fused.transpose(0, 1).contiguous().transpose(0, 1)
    strided = dense | dict(zip(names, fused.split([K, K, V, V], -1), strict=True))
    strided["initial_state"] = dense["initial_state"].mT.contiguous().mT
    assert_right(meta_linear_attention, strided, "reference", 1e-5)


@pytest.mark.parametrize("name", ["q", "gate_logits", "v", "initial_state"])
def test_nan_is_not_hidden(name):
    tensors = make()
    tensors[name][0].fill_(math.nan)
    out, _ = meta_linear_attention(**tensors, backend="triton")
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("W", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution(W, dtype, activation):
    tensors = make_convolution(W=W, dtype=dtype)
    assert_right(short_convolution, tensors, "torch", TOLERANCE[dtype], activation=activation)
    del tensors["initial_state"]
    assert_right(short_convolution, tensors, "torch", TOLERANCE[dtype], activation=activation)


def test_convolution_with_strided_tensors():
    tensors = make_convolution(B=3)
    tensors["x"] = tensors["x"].transpose(0, 2).contiguous().transpose(0, 2)
    tensors["initial_state"] = tensors["initial_state"].mT.contiguous().mT
    assert_right(short_convolution, tensors, "torch", 1e-5)


@settings(max_examples=15, deadline=None)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    K=st.integers(1, 40),
    V=st.integers(8, 70),
    D=st.integers(1, 600),
    W=st.integers(1, 6),
)
def test_any_shape(B, H, K, V, D, W):
    assert_right(meta_linear_attention, make(B, H, K, V), "reference", 1e-5)
    assert_right(short_convolution, make_convolution(B, D, W), "torch", 1e-5)


def test_operator_check():
    for absent in ((), ("aug", "out_gate_bias")):
        x = make(1, 1, absent=absent)
        arguments = (*(x.get(name) for name in NAMES), 16.0, 0.25, 1e-5)
        torch.library.opcheck(fused_recurrent.attention, arguments)
        torch.library.opcheck(fused_recurrent.attention_, arguments)
    arguments = (*make_convolution(1).values(), True)
    torch.library.opcheck(fused_recurrent.convolution, arguments)
    torch.library.opcheck(fused_recurrent.convolution_, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_breaks(inplace):
    for operator, tensors in (
        (meta_linear_attention, make()),
        (short_convolution, make_convolution()),
    ):
        wanted = operator(**tensors, output_final_state=True, backend="triton")
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
        how = {"inplace_final_state": inplace, "output_final_state": True, "backend": "triton"}
        found = compiled(**tensors, **how)
        assert all(map(torch.equal, found, wanted))
        if inplace:
            assert torch.equal(tensors["initial_state"], wanted[1])


def test_gradients_take_the_differentiable_path():
    for operator, tensors in (
        (meta_linear_attention, make()),
        (short_convolution, make_convolution()),
    ):
        for x in tensors.values():
            x.requires_grad_()
        out, state = operator(**tensors, output_final_state=True, backend="triton")
        gradients = torch.autograd.grad(out.sum() + state.sum(), list(tensors.values()))
        assert all(x.isfinite().all() for x in gradients)
