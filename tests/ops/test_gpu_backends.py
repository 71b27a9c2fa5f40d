"""Backends that rest on other packages, on a GPU that has them: against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops import meta_linear_attention, short_convolution
from megatron_patch.ops.backends import import_failure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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
def test_fla_equals_reference(make_inputs, dtype, tolerance, bounds, T, K, V):
    if bounds is not None and bounds[-1] != T:
        pytest.skip("boundaries are for the long sequence")
    inputs = make_inputs(1, T, 2, K, V, N=None if bounds is None else 3, dtype=dtype)
    inputs = {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    arguments = {
        "output_final_state": True,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds, device="cuda"),
    }
    found = meta_linear_attention(**inputs, **arguments, backend="fla")
    wanted = meta_linear_attention(**exact, **arguments, backend="reference")
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    weight = torch.randn_like(found[0])
    found += torch.autograd.grad((found[0] * weight).sum(), list(inputs.values()))
    wanted += torch.autograd.grad((wanted[0] * weight).sum(), list(exact.values()))
    for name, a, b in zip(["out", "state", *inputs], found, wanted, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
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
    B, D = (1 if mode == "packed" else 2), 64
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()

    x = draw(T, B, D) if time_major else draw(B, T, D)
    leaves = {"x": x, "weight": draw(D, 1, 4)}
    if mode == "state":
        leaves["initial_state"] = draw(B, D, 3)
    cu_seqlens = torch.tensor([0, T // 2, T], device="cuda") if mode == "packed" else None
    weight = torch.randn(B, T, D, generator=generator, device="cuda")
    results = []
    for backend, tensors in (
        ("causal_conv1d", leaves),
        ("torch", {name: t.detach().double().requires_grad_() for name, t in leaves.items()}),
    ):
        arguments = dict(tensors)
        if time_major:
            arguments["x"] = arguments["x"].transpose(0, 1)
        y, state = short_convolution(
            **arguments,
            cu_seqlens=cu_seqlens,
            output_final_state=mode != "packed",
            backend=backend,
        )
        gradients = torch.autograd.grad((y * weight).sum(), list(tensors.values()))
        results.append([y, *([] if state is None else [state]), *gradients])
    for found, wanted in zip(*results, strict=True):
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()
