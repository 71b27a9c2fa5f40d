"""The gated activation of the MLP, on both halves of one projection or on two."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_patch.ops.backends import choose, names_of
from megatron_patch.ops.checks import FLOAT_DTYPES, check_choice, check_tensor, is_traced

SWIGLU_BACKENDS = names_of("swiglu")


def swiglu(
    gate_and_up: torch.Tensor, up: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202).

    Args:
        gate_and_up: [..., 2 F] float16, bfloat16, float32 or float64, the gate before `up` in the
            last dimension; or, with `up`, the gate alone, [..., F]. Not modified, and with `up` all
            that is kept for the backward pass.
        up: [..., F] in the same dtype, where it is a tensor of its own.
        backend: "triton" (CUDA), which computes in float32 and writes the gradient of both halves
            where it belongs, once (not for second derivatives), "torch", or "auto", which takes the
            first of these that can run, and "torch" under `torch.compile`, which fuses it, and
            under `torch.func`.

    Returns:
        [..., F] in the same dtype.

    Raises:
        ValueError: the last dimension is odd, the dtype is not a float, `up` is not like the gate,
            or the backend asked for by name cannot run here.
    """
    check_choice("backend", backend, SWIGLU_BACKENDS)
    shape, dtype = list(gate_and_up.shape), gate_and_up.dtype
    if not shape or (up is None and shape[-1] % 2) or dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"gate_and_up: found {dtype} {shape}, wanted floats [..., 2 F] with an even last size"
        )
    if up is not None:
        check_tensor("up", up, "gate's", shape, (dtype,), gate_and_up.device)
    if backend == "auto" and (is_traced(gate_and_up) or (up is not None and is_traced(up))):
        backend = "torch"
    if choose("swiglu", backend, dtype, gate_and_up.device) == "triton":
        from megatron_patch.ops.triton import swiglu as implementation

        return implementation(gate_and_up, up)
    gate, up = gate_and_up.chunk(2, dim=-1) if up is None else (gate_and_up, up)
    return F.silu(gate) * up
