"""MetaLA as the paper writes it, one loop over time: the oracle of every other backend."""

from __future__ import annotations

from functools import partial

import torch

from megatron_patch.ops import torch_ops


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence token by token. Arguments and results are those of `chunk_fwd`.

    Keeps every state for the backward pass. Differentiable any number of times.
    """
    q = scale * q
    if cu_seqlens is None:
        spans, states = [slice(None)], [initial_state]
    else:
        starts = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        states = [None] * len(spans) if initial_state is None else list(initial_state[:, None])

    outputs, final_states = [], []
    for span, state in zip(spans, states, strict=True):
        if state is None:
            state = v.new_zeros(v.shape[0], *q.shape[2:], v.shape[3])
        o, state = _one_sequence(q[:, span], k[:, span], v[:, span], g[:, span], state)
        outputs.append(o)
        final_states.append(state)
    return torch.cat(outputs, 1), torch.cat(final_states)


def _one_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t for t = 0 .. T - 1."""
    outputs = []
    for t in range(q.shape[1]):
        decay = g[:, t].exp()
        state = decay[..., :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1) if outputs else torch.empty_like(v), state


meta_linear_attention = partial(torch_ops.meta_linear_attention, recurrence=recurrence)
