"""The public SwiGLU, on one tensor that holds both halves or on two tensors."""

from __future__ import annotations

import torch

from megatron_patch.ops.backends import implementation
from megatron_patch.ops.checks import FLOAT_DTYPES, check_tensor, is_traced


def swiglu(
    gate_and_up: torch.Tensor, up: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """Returns silu(gate) * up (arXiv 2002.05202), the activation of the MLP.

    Args:
        gate_and_up: [..., 2 F] float16, bfloat16, float32 or float64, the gate before `up` in the
            last dimension; or the gate alone, [..., F], if `up` is given. Not modified.
        up: [..., F] in the same dtype, if it is a tensor of its own.
        backend: "triton" (CUDA; computes in float32, keeps the inputs alone for the backward pass,
            has no second derivatives), "torch", or "auto": the first of these that can run, but
            "torch" under `torch.compile`, which fuses it, and under `torch.func`.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: the last dimension is odd, the dtype is not a float, `up` is not like the gate,
            or the backend asked for by name cannot run here.
    """
    shape, dtype = list(gate_and_up.shape), gate_and_up.dtype
    if not shape or (up is None and shape[-1] % 2) or dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"gate_and_up: found {dtype} {shape}, wanted floats [..., 2 F] with an even last size"
        )
    if up is not None:
        check_tensor("up", up, "gate's", shape, (dtype,), gate_and_up.device)
    if backend == "auto" and is_traced(gate_and_up, up):
        backend = "torch"
    return implementation("swiglu", backend, dtype, gate_and_up.device)(gate_and_up, up)
