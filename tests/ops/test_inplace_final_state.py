"""`inplace_final_state` gives the same numbers in the caller's memory. It is refused where autograd
needs what was there."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_patch.ops import meta_linear_attention, short_convolution

BOUNDS = torch.tensor([0, 4, 4, 9])


def attention_inputs(T, N, B):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (B, T, 2, 3),
        "gate_logits": (B, T, 2, 3),
        "v": (B, T, 2, 5),
        "aug": (2, 3),
        "out_gate": (B, T, 2, 5),
        "initial_state": (N, 2, 3, 5),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def convolution_inputs(T, N, B):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, T, 6), "weight": (6, 1, 4), "initial_state": (N, 6, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


OPERATORS = [
    pytest.param(meta_linear_attention, attention_inputs, id="attention"),
    pytest.param(short_convolution, convolution_inputs, id="convolution"),
]


@pytest.mark.parametrize(
    ("operator", "make", "backend"),
    [
        pytest.param(meta_linear_attention, attention_inputs, "chunked", id="chunked"),
        pytest.param(meta_linear_attention, attention_inputs, "reference", id="reference"),
        pytest.param(short_convolution, convolution_inputs, "torch", id="convolution"),
    ],
)
@pytest.mark.parametrize(("T", "cu_seqlens"), [(1, None), (2, None), (9, None), (9, BOUNDS)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("output_final_state", [False, True])
def test_equals_the_returned_state(
    operator, make, backend, T, cu_seqlens, strided, output_final_state
):
    packed = cu_seqlens is not None
    inputs = make(T, N=3, B=1 if packed else 3)
    how = {"cu_seqlens": cu_seqlens, "backend": backend}
    wanted = operator(**inputs, **how, output_final_state=True)
    state = inputs.pop("initial_state")
    if strided:
        state = state.transpose(0, -1).contiguous().transpose(0, -1)
    kept = {name: x.clone() for name, x in inputs.items()}
    out, final_state = operator(
        **inputs,
        **how,
        initial_state=state,
        inplace_final_state=True,
        output_final_state=output_final_state,
    )
    assert final_state is state
    torch.testing.assert_close((out, state), wanted, rtol=0, atol=0)
    assert all(torch.equal(kept[name], x) for name, x in inputs.items())


@pytest.mark.parametrize(("operator", "make"), OPERATORS)
def test_needs_a_state(operator, make):
    inputs = make(1, N=1, B=1)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match="inplace_final_state: found without initial_state"):
        operator(**inputs, inplace_final_state=True)


@pytest.mark.parametrize(("operator", "make"), OPERATORS)
def test_refused_while_gradients_are_recorded(operator, make):
    for name in make(1, N=1, B=1):
        inputs = make(1, N=1, B=1)
        inputs[name].requires_grad_()
        kept = inputs["initial_state"].detach().clone()
        with pytest.raises(ValueError, match="inplace_final_state: found while gradients are"):
            operator(**inputs, inplace_final_state=True)
        assert torch.equal(inputs["initial_state"], kept), name
        with torch.no_grad():
            assert operator(**inputs, inplace_final_state=True)[1] is inputs["initial_state"]


def test_a_state_without_entries_shares_no_memory():
    """A convolution with kernel_size 1 has an empty state, whose strides may be 0."""
    x, weight = torch.randn(3, 2, 6), torch.randn(6, 1, 1)
    state = torch.empty(3, 1, 0).expand(3, 6, 0)
    y, final = short_convolution(x, weight, initial_state=state, inplace_final_state=True)
    assert final is state
    torch.testing.assert_close(y, torch.nn.functional.silu(x * weight[:, 0, 0]))


@pytest.mark.parametrize(("operator", "make"), OPERATORS)
def test_refused_where_entries_share_memory(operator, make):
    inputs = make(1, N=3, B=3)
    inputs["initial_state"] = inputs["initial_state"][:1].expand_as(inputs["initial_state"])
    message = re.escape(f"initial_state {list(inputs['initial_state'].shape)}: found an expanded")
    with pytest.raises(ValueError, match=message):
        operator(**inputs, inplace_final_state=True)


@pytest.mark.parametrize(("operator", "make"), OPERATORS)
@pytest.mark.parametrize("T", [1, 5])
def test_compiles_without_graph_breaks(operator, make, T):
    inputs = make(T, N=2, B=2)
    wanted = operator(**inputs, output_final_state=True)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    out, _ = compiled(**inputs, inplace_final_state=True)
    torch.testing.assert_close((out, inputs["initial_state"]), wanted)
