"""The gated activation of the MLP, on both halves of one projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_patch.ops.backends import choose, names_of
from megatron_patch.ops.checks import FLOAT_DTYPES, check_choice, is_traced

SWIGLU_BACKENDS = names_of("swiglu")


def swiglu(gate_and_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up, the first and the second half of the last dimension (arXiv 2002.05202).

    Args:
        gate_and_up: [..., 2 F] float16, bfloat16, float32 or float64; not modified, and all that is
            kept for the backward pass.
        backend: "triton" (CUDA), which computes in float32 and writes the gradient of both halves
            where it belongs, once (not for second derivatives), "torch", or "auto", which takes the
            first of these that can run, and "torch" under `torch.compile`, which fuses it, and
            under `torch.func`.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: the last dimension is odd, the dtype is not a float, or the backend asked for by
            name cannot run here.
    """
    check_choice("backend", backend, SWIGLU_BACKENDS)
    shape, dtype = list(gate_and_up.shape), gate_and_up.dtype
    if not shape or shape[-1] % 2 or dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"gate_and_up: found {dtype} {shape}, wanted floats [..., 2 F] with an even last size"
        )
    if backend == "auto" and is_traced(gate_and_up):
        backend = "torch"
    if choose("swiglu", backend, dtype, gate_and_up.device) == "triton":
        from megatron_patch.ops.triton import swiglu as implementation

        return implementation(gate_and_up)
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up
