"""MetaLA as the paper writes it, one loop over time: the oracle of every other backend."""

from __future__ import annotations

import torch

from megatron_patch.ops.torch_ops import (
    augment_norm_gate,
    compute_dtype,
    decay_and_key,
    give_state,
)


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t for t = 0 .. T - 1.

    Args:
        q, k, g: [B, T, H, K].
        v: [B, T, H, V].
        state: [B, H, K, V], before the first token.

    Returns:
        o [B, T, H, V] and the state after the last token [B, H, K, V].
    """
    o = []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        state = decay[..., :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(o, 1) if o else torch.empty_like(v), state


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

    Computes in float64 for float64 inputs and in float32 for all others; differentiable any number
    of times. Takes T steps and keeps every state for the backward pass: for tests, not for
    training.
    """
    dtype, out_dtype = compute_dtype(v), v.dtype
    q, gate_logits, v = q.to(dtype), gate_logits.to(dtype), v.to(dtype)
    g, k = decay_and_key(gate_logits, tau)

    if cu_seqlens is None:
        sequences = [(scale * q, k, v, g)]
        states = [initial_state]
    else:
        starts = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        sequences = [tuple(x[:, span] for x in (scale * q, k, v, g)) for span in spans]
        states = [None] * len(spans) if initial_state is None else list(initial_state[:, None])

    outputs, final_states = [], []
    for sequence, state in zip(sequences, states, strict=True):
        if state is None:
            state = v.new_zeros(v.shape[0], *q.shape[2:], v.shape[3])
        o, final_state = recurrence(*sequence, state)
        outputs.append(o)
        final_states.append(final_state)

    out = augment_norm_gate(torch.cat(outputs, 1), q, k, v, aug, out_gate, out_gate_bias, norm_eps)
    final_state = give_state(
        torch.cat(final_states), initial_state, output_final_state, inplace_final_state
    )
    return out.to(out_dtype), final_state
