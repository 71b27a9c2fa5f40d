"""The short convolution against `torch.nn.functional.conv1d`, and its states."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.ops import short_convolution


def make(B=2, T=9, D=8, W=4, *, N=None, dtype=torch.float64):
    """Draws x, weight and initial state, which require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, D), (D, 1, W), (B if N is None else N, D, W - 1)
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    )


def by_conv1d(x, weight, initial_state, activation="silu"):
    inputs = torch.cat([initial_state, x.transpose(1, 2)], -1)
    y = F.conv1d(inputs, weight, groups=weight.shape[0]).transpose(1, 2)
    final_state = inputs[..., inputs.shape[-1] - weight.shape[-1] + 1 :]
    return F.silu(y) if activation == "silu" else y, final_state


def gradients(results, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in results)
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("W", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("activation", ["silu", None])
def test_equals_conv1d(T, W, activation):
    inputs = x, weight, state = make(T=T, W=W)
    wanted = by_conv1d(x, weight, state, activation)
    found = short_convolution(
        x, weight, activation=activation, initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(found, inputs), gradients(wanted, inputs), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("T", [1, 2, 9])
def test_no_state_is_a_state_of_zeros(T):
    x, weight, state = make(T=T)
    wanted = short_convolution(
        x, weight, initial_state=torch.zeros_like(state), output_final_state=True
    )
    found = short_convolution(x, weight, output_final_state=True)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert short_convolution(x, weight)[1] is None


def test_gradcheck():
    inputs = make(B=1, T=5, D=2)

    def convolution(x, weight, state):
        return short_convolution(x, weight, initial_state=state, output_final_state=True)

    assert torch.autograd.gradcheck(convolution, inputs)


@pytest.mark.parametrize("split", [1, 2, 5, 8])
def test_two_runs_with_carried_state_equal_one(split):
    x, weight, state = make()
    whole = short_convolution(x, weight, initial_state=state, output_final_state=True)
    first, state = short_convolution(
        x[:, :split], weight, initial_state=state, output_final_state=True
    )
    second, state = short_convolution(
        x[:, split:], weight, initial_state=state, output_final_state=True
    )
    torch.testing.assert_close((torch.cat([first, second], 1), state), whole)


def test_decoding_token_by_token_equals_the_whole_run():
    x, weight, state = make()
    whole = short_convolution(x, weight, initial_state=state, output_final_state=True)
    outs = []
    for token in x.split(1, dim=1):
        out, state = short_convolution(token, weight, initial_state=state, output_final_state=True)
        outs.append(out)
    torch.testing.assert_close((torch.cat(outs, 1), state), whole)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    W=st.integers(1, 5),
    with_state=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_packed_equals_separate_runs(lengths, W, with_state, dtype):
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    x, weight, states = inputs = make(1, bounds[-1], 3, W, N=len(lengths))
    found = short_convolution(
        x,
        weight,
        initial_state=states if with_state else None,
        output_final_state=True,
        cu_seqlens=torch.tensor(bounds, dtype=dtype),
    )
    if not with_state:
        states = states * 0
    separate = [
        by_conv1d(x[:, a:b], weight, states[n : n + 1]) if a < b else (x[:, a:b], states[n : n + 1])
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    wanted = tuple(
        torch.cat(parts, dim)
        for parts, dim in zip(zip(*separate, strict=True), (1, 0), strict=True)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if with_state:
        torch.testing.assert_close(
            gradients(found, inputs), gradients(wanted, inputs), rtol=1e-12, atol=1e-12
        )


def test_packed_sequences_do_not_see_each_other():
    x, weight, _ = make(1, 10)
    cu_seqlens = torch.tensor([0, 6, 10])
    before, _ = short_convolution(x, weight, cu_seqlens=cu_seqlens)
    poisoned = torch.cat([torch.full_like(x[:, :6], torch.nan), x[:, 6:]], 1)
    after, _ = short_convolution(poisoned, weight, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, 6:], after[:, 6:])


def test_reads_time_major_tensors_and_modifies_nothing():
    x, weight, state = make()
    time_major = x.detach().transpose(0, 1).contiguous()
    kept = time_major.clone()
    found = short_convolution(
        time_major.transpose(0, 1), weight, initial_state=state, output_final_state=True
    )
    wanted = short_convolution(x, weight, initial_state=state, output_final_state=True)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(time_major, kept)


@pytest.mark.parametrize("W", [2, 4])
def test_final_state_keeps_no_long_sequence_in_memory(W):
    x, weight, _ = make(1, T=1000, W=W)
    _, state = short_convolution(x, weight, output_final_state=True)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
)
def test_half_precision_is_one_rounding_from_float64(dtype, rounding):
    inputs = make(T=30, dtype=dtype)
    exact = [x.detach().double() for x in inputs]
    y, final_state = short_convolution(
        inputs[0], inputs[1], initial_state=inputs[2], output_final_state=True
    )
    assert y.dtype == final_state.dtype == dtype
    wanted = by_conv1d(*exact)
    torch.testing.assert_close(y.double(), wanted[0], rtol=rounding, atol=1e-6)
    assert torch.equal(final_state.double(), wanted[1])


def test_float32_weight_on_half_precision_inputs():
    """Under autocast, parameters stay float32."""
    x, weight, _ = make(dtype=torch.bfloat16)
    y, _ = short_convolution(x, weight.float())
    assert torch.equal(y, short_convolution(x, weight)[0])


def test_computes_in_float32_under_autocast():
    x, weight, _ = make(dtype=torch.float32)
    wanted = short_convolution(x, weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(short_convolution(x, weight)[0], wanted)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 9])])
def test_compiles_without_graph_breaks(cu_seqlens):
    x, weight, _ = make(1)

    def convolution(x, weight):
        return short_convolution(x, weight, output_final_state=True, cu_seqlens=cu_seqlens)

    compiled = torch.compile(convolution, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), convolution(x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, "x: found shape [2, 9], wanted [B, T, D] = [≥ 1, ≥ 1, ≥ 1]"),
        (
            {"x": torch.zeros(2, 0, 8)},
            "x: found shape [2, 0, 8], wanted [B, T, D] = [≥ 1, ≥ 1, ≥ 1]",
        ),
        (
            {"x": torch.zeros(2, 9, 8, dtype=torch.int32)},
            "x [2, 9, 8]: found dtype int32, wanted float16 or bfloat16 or float32 or float64",
        ),
        (
            {"weight": torch.zeros(8, 4)},
            "weight: found shape [8, 4], wanted [D, 1, W] = [8, 1, ≥ 1]",
        ),
        (
            {"weight": torch.zeros(7, 1, 4)},
            "weight: found shape [7, 1, 4], wanted [D, 1, W] = [8, 1, ≥ 1]",
        ),
        (
            {"weight": torch.zeros(8, 1, 4, device="meta")},
            "weight [8, 1, 4]: found on device meta, wanted cpu",
        ),
        (
            {"initial_state": torch.zeros(2, 8, 4)},
            "initial_state: found shape [2, 8, 4], wanted [N, D, W - 1] = [2, 8, 3]",
        ),
        (
            {"initial_state": torch.zeros(2, 8, 3)},
            "initial_state [2, 8, 3]: found dtype float32, wanted float64",
        ),
        ({"activation": "relu"}, "activation: found 'relu', the known ones are 'silu', None"),
        (
            {"cu_seqlens": torch.tensor([0, 9])},
            "cu_seqlens [2]: found a batch of B = 2, wanted the sequences packed along time",
        ),
        (
            {"x": torch.zeros(1, 9, 8), "cu_seqlens": torch.tensor([0, 8])},
            "cu_seqlens [2]: found values from 0 to 8, wanted from 0 to T = 9",
        ),
        (
            {"backend": "cudnn"},
            "backend: found 'cudnn', the known ones are 'auto', 'triton', 'causal_conv1d', 'torch'",
        ),
    ],
)
def test_error_messages(change, message):
    x, weight, _ = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        short_convolution(**{"x": x, "weight": weight, **change})


def with_package(monkeypatch, causal_conv1d_fn):
    """Returns the backend with this function in place of the package's."""
    package = SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    spec = find_spec("megatron_patch.ops.causal_conv1d")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("last_dim_in_memory", ["B", "T", "D"])
@pytest.mark.parametrize("with_state", [False, True])
def test_causal_conv1d_gets_what_it_wants(monkeypatch, T, last_dim_in_memory, with_state):
    """The package's kernel runs on CUDA alone. A stand-in insists on the layouts that the kernel
    insists on."""

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        assert x.stride(1) == 1 and x.stride(2) > 1
        assert x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        assert seq_idx is None
        assert initial_states is None or initial_states.stride(1) == 1
        state = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
        state = state if initial_states is None else initial_states
        return by_conv1d(x.transpose(1, 2), weight[:, None], state, activation)[0].transpose(1, 2)

    backend = with_package(monkeypatch, causal_conv1d_fn)
    inputs = x, weight, state = make(T=T)
    dim = "BTD".index(last_dim_in_memory)
    x = x.transpose(dim, 2).contiguous().transpose(dim, 2)
    state = state if with_state else None
    found = backend.short_convolution(x, weight, "silu", state, True, False, None)
    wanted = short_convolution(x, weight, initial_state=state, output_final_state=True)
    torch.testing.assert_close(found, wanted)
    inputs = inputs if with_state else inputs[:2]
    torch.testing.assert_close(gradients(found, inputs), gradients(wanted, inputs))


def test_causal_conv1d_is_told_the_packed_sequences(monkeypatch):
    seen = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        seen.append(seq_idx)
        return x

    backend = with_package(monkeypatch, causal_conv1d_fn)
    x, weight, _ = make(1, 6)
    cu_seqlens = torch.tensor([0, 2, 2, 6])
    backend.short_convolution(x, weight, "silu", None, False, False, cu_seqlens)
    assert torch.equal(seen[0], torch.tensor([[0, 0, 2, 2, 2, 2]], dtype=torch.int32))


@pytest.mark.parametrize(
    ("W", "D", "packed_state", "reason"),
    [
        (4, 8, False, None),
        (2, 16, False, None),
        (5, 8, False, "W = 5, wanted 2, 3 or 4"),
        (1, 8, False, "W = 1, wanted 2, 3 or 4"),
        (4, 12, False, "D = 12, wanted a multiple of 8"),
        (4, 8, True, "cu_seqlens together with a state"),
    ],
)
def test_limits_of_causal_conv1d(monkeypatch, W, D, packed_state, reason):
    backend = with_package(monkeypatch, None)
    found = backend.unsupported_reason(
        torch.bfloat16, torch.device("cuda"), D=D, W=W, packed_state=packed_state
    )
    assert (found is None) if reason is None else (reason in found)
