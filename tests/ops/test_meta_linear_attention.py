"""The calls that the public function refuses, and its messages."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch

from megatron_patch.ops import BACKENDS, meta_linear_attention
from tests.ops.cases import make_leaves

B, T, H, K, V = 2, 6, 3, 4, 5


@pytest.fixture
def inputs():
    return make_leaves(B, T, H, K, V, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_shapes_and_dtypes_of_the_results(backend, dtype, state_dtype):
    inputs = make_leaves(B, T, H, K, V, dtype=dtype)
    out, state = meta_linear_attention(**inputs, output_final_state=True, backend=backend)
    assert (out.shape, out.dtype) == ((B, T, H, V), dtype)
    assert (state.shape, state.dtype) == ((B, H, K, V), state_dtype)
    assert meta_linear_attention(**inputs, backend=backend)[1] is None


def test_parameters_may_be_of_another_float_dtype():
    """Under autocast, activations are bfloat16 and parameters float32."""
    inputs = make_leaves(B, T, H, K, V, dtype=torch.bfloat16)
    wanted = meta_linear_attention(**inputs)[0]
    for name in ("aug", "out_gate_bias"):
        inputs[name] = inputs[name].float()
    assert torch.equal(meta_linear_attention(**inputs)[0], wanted)


def _wrong_shapes():
    """Yields an argument, a wrong shape, and what the message wants."""
    yield "q", (B, T, H), "[B, T, H, K] = [≥ 1, ≥ 1, ≥ 1, ≥ 1]"
    yield "q", (B, 0, H, K), "[B, T, H, K] = [≥ 1, ≥ 1, ≥ 1, ≥ 1]"
    yield "gate_logits", (B, T, H, K + 1), f"[B, T, H, K] = [{B}, {T}, {H}, {K}]"
    yield "v", (B, T + 1, H, V), f"[B, T, H, V] = [{B}, {T}, {H}, ≥ 1]"
    yield "v", (B, H, T, V), f"[B, T, H, V] = [{B}, {T}, {H}, ≥ 1]"
    yield "v", (B, T, H, 0), f"[B, T, H, V] = [{B}, {T}, {H}, ≥ 1]"
    yield "aug", (H * K,), f"[H, K] = [{H}, {K}]"
    yield "out_gate", (B, T, H * V), f"[B, T, H, V] = [{B}, {T}, {H}, {V}]"
    yield "out_gate_bias", (V, H), f"[H, V] = [{H}, {V}]"
    yield "initial_state", (B, H, V, K), f"[N, H, K, V] = [{B}, {H}, {K}, {V}]"
    yield "initial_state", (B + 1, H, K, V), f"[N, H, K, V] = [{B}, {H}, {K}, {V}]"


@pytest.mark.parametrize(("name", "shape", "wanted"), list(_wrong_shapes()))
def test_wrong_shapes(inputs, name, shape, wanted):
    inputs[name] = torch.zeros(shape)
    message = f"{name}: found shape {list(shape)}, wanted {wanted}"
    with pytest.raises(ValueError, match=re.escape(message)):
        meta_linear_attention(**inputs)


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("q", torch.int64, "float16 or bfloat16 or float32 or float64"),
        ("gate_logits", torch.float64, "float32"),
        ("v", torch.bfloat16, "float32"),
        ("aug", torch.bool, "float16 or bfloat16 or float32 or float64"),
        ("out_gate", torch.float16, "float32"),
        ("out_gate_bias", torch.int32, "float16 or bfloat16 or float32 or float64"),
        ("initial_state", torch.float64, "float32"),
    ],
)
def test_wrong_dtypes(inputs, name, dtype, wanted):
    shape = list(inputs[name].shape)
    inputs[name] = inputs[name].detach().to(dtype)
    found = str(dtype).removeprefix("torch.")
    message = re.escape(f"{name} {shape}: found dtype {found}, wanted {wanted}") + "$"
    with pytest.raises(ValueError, match=message):
        meta_linear_attention(**inputs)


def test_state_of_half_precision_inputs_is_float32():
    inputs = make_leaves(B, T, H, K, V, dtype=torch.bfloat16)
    inputs["initial_state"] = inputs["initial_state"].detach().bfloat16()
    with pytest.raises(ValueError, match="initial_state .*found dtype bfloat16, wanted float32"):
        meta_linear_attention(**inputs)


@pytest.mark.parametrize(
    "name", ["gate_logits", "v", "aug", "out_gate", "out_gate_bias", "initial_state"]
)
def test_wrong_devices(inputs, name):
    inputs[name] = inputs[name].detach().to("meta")
    message = rf"{name} .*: found on device meta, wanted cpu"
    with pytest.raises(ValueError, match=message):
        meta_linear_attention(**inputs)


def test_not_a_tensor(inputs):
    inputs["v"] = [1.0]
    with pytest.raises(ValueError, match=re.escape("v: found list, wanted a tensor [B, T, H, V]")):
        meta_linear_attention(**inputs)


def test_bias_without_the_gate_it_is_added_to(inputs):
    del inputs["out_gate"]
    with pytest.raises(ValueError, match="out_gate_bias .*found without out_gate"):
        meta_linear_attention(**inputs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", 0.0),
        ("tau", -1),
        ("tau", math.nan),
        ("tau", math.inf),
        ("tau", "16"),
        ("tau", torch.tensor(16.0)),
        ("norm_eps", 0),
        ("norm_eps", True),
        ("scale", math.inf),
        ("scale", math.nan),
    ],
)
def test_wrong_numbers(inputs, name, value):
    with pytest.raises(ValueError, match=rf"{name}: found .*, wanted a finite number"):
        meta_linear_attention(**inputs, **{name: value})


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([[0, T]]), r"cu_seqlens: found shape \[1, 2\], wanted \[N \+ 1\]"),
        (torch.tensor([0]), r"cu_seqlens: found shape \[1\], wanted \[N \+ 1\], N ≥ 1"),
        (torch.tensor([0.0, T]), "cu_seqlens .*found dtype float32, wanted int32 or int64"),
        (torch.tensor([0, T], device="meta"), "cu_seqlens .*found on device meta, wanted cpu"),
        (
            torch.tensor([1, T]),
            f"cu_seqlens .*found values from 1 to {T}, wanted from 0 to T = {T}",
        ),
        (torch.tensor([0, 2]), f"cu_seqlens .*found values from 0 to 2, wanted from 0 to T = {T}"),
        (torch.tensor([0, 4, 2, T]), "cu_seqlens .*found falling values"),
    ],
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_wrong_boundaries(cu_seqlens, message, backend):
    inputs = make_leaves(1, T, H, K, V, N=3)
    with pytest.raises(ValueError, match=message):
        meta_linear_attention(**inputs, cu_seqlens=cu_seqlens, backend=backend)


def test_packed_sequences_want_a_batch_of_one(inputs):
    message = f"cu_seqlens .*found a batch of B = {B}, wanted .* B = 1"
    with pytest.raises(ValueError, match=message):
        meta_linear_attention(**inputs, cu_seqlens=torch.tensor([0, T]))


def test_packed_sequences_want_a_state_each():
    inputs = make_leaves(1, T, H, K, V)
    message = re.escape(f"wanted [N, H, K, V] = [2, {H}, {K}, {V}]")
    with pytest.raises(ValueError, match=message):
        meta_linear_attention(**inputs, cu_seqlens=torch.tensor([0, 3, T]))


def test_unknown_backend_lists_the_known_ones(inputs):
    with pytest.raises(ValueError, match="backend: found 'cuda', the known ones are") as error:
        meta_linear_attention(**inputs, backend="cuda")
    assert all(repr(name) in str(error.value) for name in BACKENDS)


def test_import_loads_no_kernel_package():
    code = (
        "import sys, megatron_patch.ops\n"
        "packages = {'triton', 'fla', 'causal_conv1d', 'transformers', 'megatron'}\n"
        "loaded = packages & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
