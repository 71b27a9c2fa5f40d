"""The backends that call other packages against float64, where these packages are installed."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import meta_linear_attention, short_convolution
from megatron_patch.ops.backends import import_failure
from tests.ops.cases import evaluate, make, make_convolution


@pytest.mark.skipif(
    import_failure("megatron_patch.ops.fla") is not None,
    reason="flash-linear-attention is not installed",
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize("bounds", [None, [0, 1, 70, 300]])
@pytest.mark.parametrize("T", [1, 300])
@pytest.mark.parametrize(("K", "V"), [(64, 128), (64, 64), (16, 16), (64, 32)])
def test_fla_equals_reference(dtype, tolerance, bounds, T, K, V):
    if bounds is not None and bounds[-1] != T:
        pytest.skip("boundaries are for the long sequence")
    tensors = make(1, T, 2, K, V, N=None if bounds is None else 3, dtype=dtype)
    arguments = {
        "output_final_state": True,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds, device="cuda"),
    }
    weights = [torch.randn_like(tensors["v"]), torch.zeros_like(tensors["initial_state"])]
    found, wanted = (
        evaluate(meta_linear_attention, tensors, dtype, weights, backend=backend, **arguments)
        for backend, dtype in (("fla", None), ("reference", torch.float64))
    )
    assert found["out"].dtype == dtype and found["final_state"].dtype == torch.float32
    for name, want in wanted.items():
        error = (found[name].double() - want).norm() / want.norm().clamp_min(1e-30)
        assert error <= tolerance, (name, error.item())


@pytest.mark.skipif(
    import_failure("megatron_patch.ops.causal_conv1d") is not None,
    reason="causal-conv1d is not installed",
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("T", [1, 2, 130])
@pytest.mark.parametrize("mode", ["plain", "state", "packed"])
@pytest.mark.parametrize("time_major", [False, True])
def test_causal_conv1d_equals_torch(dtype, tolerance, T, mode, time_major):
    tensors = make_convolution(
        1 if mode == "packed" else 2, T, 64, dtype=dtype, time_major=time_major,
        absent=() if mode == "state" else ("initial_state",),
    )  # fmt: skip
    arguments = {"output_final_state": mode != "packed"}
    weights = [torch.randn_like(tensors["x"])]
    if mode == "packed":
        arguments["cu_seqlens"] = torch.tensor([0, T // 2, T], device="cuda")
    else:
        weights.append(torch.zeros(2, 64, 3, device="cuda"))
    found, wanted = (
        evaluate(short_convolution, tensors, dtype, weights, backend=backend, **arguments)
        for backend, dtype in (("causal_conv1d", None), ("torch", torch.float64))
    )
    for name, want in wanted.items():
        assert (found[name].double() - want).norm() <= tolerance * want.norm(), name
