"""Random arguments of the operator, and everything that can be compared of one call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_patch.ops import meta_linear_attention

Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    """Leaf tensors for every tensor argument, by name, drawn from a fixed seed."""

    def make(B=2, T=65, H=2, K=8, V=12, *, N=None, dtype=torch.float64, seed=0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "q": (B, T, H, K),
            "gate_logits": (B, T, H, K),
            "v": (B, T, H, V),
            "aug": (H, K),
            "out_gate": (B, T, H, V),
            "out_gate_bias": (H, V),
            "initial_state": (B if N is None else N, H, K, V),
        }
        inputs = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: x.to(state_dtype if name == "initial_state" else dtype).requires_grad_()
            for name, x in inputs.items()
        }

    return make


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., dict[str, torch.Tensor]]:
    """Calls the operator, and returns its results and the gradients of a fixed random functional of
    them with respect to every input, by name."""

    def evaluate(inputs: Inputs, **arguments) -> dict[str, torch.Tensor]:
        arguments = {"output_final_state": True, **arguments}
        out, final_state = meta_linear_attention(**inputs, **arguments)
        results = {"out": out}
        if final_state is not None:
            results["final_state"] = final_state
        generator = torch.Generator().manual_seed(1)
        # Weights that every dtype holds exactly, so that incoming gradients are the same in all.
        weights = [torch.randn(x.shape, generator=generator).bfloat16() for x in results.values()]
        loss = sum((x.double() * w).sum() for x, w in zip(results.values(), weights, strict=True))
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        results |= {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}
        return {name: x.detach() for name, x in results.items()}

    return evaluate


@pytest.fixture(scope="session")
def relative_errors() -> Callable[..., dict[str, float]]:
    """Largest difference by name, relative to the largest entry of what is wanted."""

    def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
        assert found.keys() == wanted.keys()
        result = {}
        for name, want in wanted.items():
            assert found[name].shape == want.shape, name
            difference = (found[name].double() - want.double()).abs().max().item()
            result[name] = difference / max(want.double().abs().max().item(), 1e-300)
        return result

    return errors
