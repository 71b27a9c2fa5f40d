"""MetaLA as it is written on paper: one loop over time. The judge of every other backend."""

from __future__ import annotations

import torch

from megatron_patch.ops.epilogue import (
    augment_norm_gate,
    cast,
    compute_dtype,
    decay_and_key,
    give_state,
)


def recurrence(
    q: torch.Tensor,
    log_decay: torch.Tensor,
    key: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and r_t = S_t^T q_t, for t = 0 .. T - 1.

    Args:
        q, log_decay, key: [B, T, H, K]; v: [B, T, H, V]; state: [B, H, K, V] before the first
            token.

    Returns:
        Read-outs [B, T, H, V] and the state after the last token [B, H, K, V].
    """
    read_outs = []
    for t in range(q.shape[1]):
        decay = log_decay[:, t].exp()
        state = decay[..., :, None] * state + key[:, t, :, :, None] * v[:, t, :, None, :]
        read_outs.append((state * q[:, t, :, :, None]).sum(-2))
    # An empty sequence reads nothing.
    return torch.stack(read_outs, 1) if read_outs else torch.empty_like(v), state


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
    """The operator of `megatron_patch.ops.meta_linear_attention`, on arguments it has checked.

    Computes in float64 for float64 inputs and in float32 for all others; differentiable any number
    of times. Takes O(T) steps and keeps every state for the backward pass: for tests, not for
    training.
    """
    dtype, out_dtype = compute_dtype(v), v.dtype
    q, gate_logits, v = q.to(dtype), gate_logits.to(dtype), v.to(dtype)
    log_decay, key = decay_and_key(gate_logits, tau)

    if cu_seqlens is None:
        sequences = [(q, log_decay, key, v)]
        states = [initial_state]
    else:
        bounds = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        sequences = [tuple(x[:, span] for x in (q, log_decay, key, v)) for span in spans]
        states = [None] * len(spans) if initial_state is None else list(initial_state[:, None])

    read_outs, final_states = [], []
    for sequence, state in zip(sequences, states, strict=True):
        if state is None:
            state = v.new_zeros(v.shape[0], *q.shape[2:], v.shape[3])
        read_out, final_state = recurrence(scale * sequence[0], *sequence[1:], state)
        read_outs.append(read_out)
        final_states.append(final_state)

    out = augment_norm_gate(
        torch.cat(read_outs, 1),
        q,
        key,
        v,
        cast(aug, dtype),
        cast(out_gate, dtype),
        cast(out_gate_bias, dtype),
        norm_eps,
    )
    final_state = give_state(
        torch.cat(final_states), initial_state, output_final_state, inplace_final_state
    )
    return out.to(out_dtype), final_state
