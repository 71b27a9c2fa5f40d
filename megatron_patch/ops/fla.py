"""MetaLA by `chunk_gla` of flash-linear-attention (0.4 to 0.6), for CUDA where our own kernels do
not run."""

from __future__ import annotations

import torch
from fla.ops.gla import chunk_gla

from megatron_patch.ops.torch_ops import (
    augment_norm_gate,
    compute_dtype,
    decay_and_key,
    give_state,
    one_step,
)


def meta_linear_attention(
    q: torch.Tensor,
    gate_logits: torch.Tensor,
    v: torch.Tensor,
    aug: torch.Tensor | None = None,
    out_gate: torch.Tensor | None = None,
    *,
    out_gate_bias: torch.Tensor | None = None,
    tau: float,
    scale: float,
    norm_eps: float,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes `megatron_patch.ops.meta_linear_attention` on arguments that it has checked.

    The recurrence multiplies in the dtype of `v`, with the log decay and the carried state in
    float32. What is local to a token is computed in float32.
    """
    dtype, in_dtype = compute_dtype(v), v.dtype
    g, k = decay_and_key(gate_logits.to(dtype), tau)
    if cu_seqlens is None and q.shape[1] == 1:
        # Decoding: one launch of the chunk kernels costs more than this handful of operations.
        o, final_state = one_step(q.to(dtype), k, v.to(dtype), g, scale, initial_state)
    else:
        o, final_state = chunk_gla(
            q=q,
            k=k.to(in_dtype),
            v=v,
            g=g,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state or inplace_final_state,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
        )
    out = augment_norm_gate(
        o.to(dtype), q.to(dtype), k, v.to(dtype), aug, out_gate, out_gate_bias, norm_eps
    )
    final_state = give_state(final_state, initial_state, output_final_state, inplace_final_state)
    return out.to(in_dtype), final_state
