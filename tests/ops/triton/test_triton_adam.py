"""The optimizer's step as a kernel, on a GPU or in the interpreter, and in PyTorch."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops.backends import function_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def state(count: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "parameter": torch.randn(count, dtype=dtype, device=DEVICE),
        "copy": torch.full((count,), 7.0, dtype=torch.bfloat16, device=DEVICE),
        "mean": torch.zeros(count, dtype=dtype, device=DEVICE),
        "square": torch.zeros(count, dtype=dtype, device=DEVICE),
    }


def step(backend: str, tensors: dict, gradient: torch.Tensor, factor: float, number: int) -> None:
    function_of("adam_step", backend)(
        **tensors,
        gradient=gradient,
        factor=torch.tensor(factor, dtype=torch.float32, device=DEVICE),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        corrections=tuple(1 - beta**number for beta in BETAS),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("count", [1, 2048, 5001])
def test_steps_are_those_of_pytorch_in_float64(count, backend, dtype):
    torch.manual_seed(0)
    tensors = state(count)
    wanted = tensors["parameter"].double().requires_grad_()
    adam = torch.optim.AdamW([wanted], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for number in (1, 2, 3):
        gradient = torch.randn(count, device=DEVICE, dtype=dtype)
        wanted.grad = 0.25 * gradient.double()
        adam.step()
        step(backend, tensors, gradient, 0.25, number)
    for name, want in [
        ("parameter", wanted.detach()),
        ("mean", adam.state[wanted]["exp_avg"]),
        ("square", adam.state[wanted]["exp_avg_sq"]),
    ]:
        torch.testing.assert_close(tensors[name].double(), want, rtol=1e-5, atol=1e-6)
    # The interpreter truncates to bfloat16 instead of rounding.
    rtol = 0 if DEVICE == "cuda" or backend == "torch" else 2**-7
    torch.testing.assert_close(tensors["copy"], tensors["parameter"].bfloat16(), rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_factor_zero_changes_nothing(backend):
    tensors = state(100)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    step(backend, tensors, torch.full((100,), torch.nan, device=DEVICE), 0.0, 1)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
