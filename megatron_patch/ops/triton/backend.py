"""The Triton kernels' entry: which of them serve a call."""

from __future__ import annotations

from torch import Tensor

from megatron_patch.ops.epilogue import give_state
from megatron_patch.ops.triton import operator


def meta_linear_attention(
    *tensors: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    **arguments,
) -> tuple[Tensor, Tensor | None]:
    """The operator of `megatron_patch.ops.meta_linear_attention`, on arguments it has checked."""
    output_final_state = output_final_state or inplace_final_state
    out, final_state = operator.meta_linear_attention(
        *tensors, initial_state=initial_state, output_final_state=output_final_state, **arguments
    )
    return out, give_state(final_state, initial_state, output_final_state, inplace_final_state)
