"""MetaLA in plain PyTorch, parallel over chunks of the sequence: for the CPU and for float64.

Within a chunk, token i reads from token j <= i the product of the decays j + 1 .. i. The usual way
to get these products from one running sum of log decays subtracts two large sums: it loses digits,
and overflows for strongly negative gates. Here they come from halving. For neighbouring blocks of s
tokens, with m the first token of the later one, the product factors at m,

    prod(j + 1 .. i) = exp(sum of g over m .. i) * exp(sum of g over j + 1 .. m - 1),

so that all pairs between the two blocks are one matrix product. Blocks of 1, 2, 4, ... tokens cover
every pair once, and the sums for 2 s follow from those for s by one addition. Sums are never
subtracted and only non-positive numbers are exponentiated: nothing overflows, no digits cancel and
no gradient is inf * 0, whatever the gate logits. A decay that underflows is zero, as in the
recurrence.

From chunk to chunk the state is carried by a loop.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_patch.ops.epilogue import (
    augment_norm_gate,
    cast,
    compute_dtype,
    decay_and_key,
    give_state,
)

CHUNK_SIZE = 64


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

    Computes in float64 for float64 inputs and in float32 for all others.
    """
    dtype, out_dtype = compute_dtype(v), v.dtype
    q, v = q.to(dtype), v.to(dtype)
    log_decay, key = decay_and_key(gate_logits.to(dtype), tau)

    if cu_seqlens is None and q.shape[1] == 1:
        read_out, final_state = one_step(q, log_decay, key, v, scale, initial_state)
    else:
        read_out, final_state = _chunks(
            q, log_decay, key, v, scale, initial_state,
            output_final_state or inplace_final_state, cu_seqlens,
        )  # fmt: skip
    out = augment_norm_gate(
        read_out,
        q,
        key,
        v,
        cast(aug, dtype),
        cast(out_gate, dtype),
        cast(out_gate_bias, dtype),
        norm_eps,
    )
    final_state = give_state(final_state, initial_state, output_final_state, inplace_final_state)
    return out.to(out_dtype), final_state


def one_step(
    q: torch.Tensor,
    log_decay: torch.Tensor,
    key: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoding step: read-outs [B, 1, H, V] and the new state [B, H, K, V] of one token."""
    # [B, 1, H, W] to [B, H, 1, W], without a copy.
    q, log_decay, key, v = (x.transpose(1, 2) for x in (q, log_decay, key, v))
    new = key.mT * v
    if state is not None:
        new = torch.addcmul(new, log_decay.exp().mT, state)
    return ((scale * q) @ new).transpose(1, 2), new


class _Layout(NamedTuple):
    """How tokens lie in chunks. All chunks that are the c-th of their sequence stand together, so
    that the loop over c carries the states of all sequences at once.

    rows: [M * C] int64, the row of the flattened [B * T] tokens at each place of the M chunks, and
        B * T at padding; `None` for sequences of one length.
    places: [B * T] int64, the inverse: where each token lies; `None` likewise.
    active: for each c, how many sequences have a c-th chunk; falling.
    order: [N] int64, the sequence behind each carried state: longest first; `None` for sequences of
        one length, which stay in order.
    """

    chunk_size: int
    active: list[int]
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    order: torch.Tensor | None = None


def _chunk_size(longest: int) -> int:
    """`CHUNK_SIZE`, or for short sequences the power of two that holds them."""
    return min(CHUNK_SIZE, 1 << max(longest - 1, 0).bit_length())


def _layout(batch: int, time: int, cu_seqlens: torch.Tensor | None) -> _Layout:
    if cu_seqlens is None:
        size = _chunk_size(time)
        return _Layout(size, [batch] * math.ceil(time / size))

    device, bounds = cu_seqlens.device, cu_seqlens.long()
    lengths = bounds.diff()
    size = _chunk_size(int(lengths.max()))
    chunks = (lengths + size - 1) // size
    order = chunks.argsort(descending=True, stable=True)
    rank = order.argsort()
    step = torch.arange(int(chunks.max()), device=device)
    active = torch.searchsorted(-chunks[order], -step)  # chunks > step, as `chunks[order]` falls
    first_chunk = active.cumsum(0) - active

    token = torch.arange(time, device=device)
    sequence = torch.searchsorted(bounds[1:], token, right=True)
    offset = token - bounds[sequence]
    places = (first_chunk[offset // size] + rank[sequence]) * size + offset % size
    rows = torch.full((int(chunks.sum()) * size,), time, device=device).index_copy(0, places, token)
    return _Layout(size, active.tolist(), rows, places, order)


def _to_chunks(x: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """[B, T, H, W] of any strides to a contiguous [M, H, C, W], zeros at padding."""
    batch, time, heads, width = x.shape
    size = layout.chunk_size
    if layout.rows is not None:
        padded = torch.cat([x[0], x.new_zeros(1, heads, width)])
        return padded[layout.rows].unflatten(0, (-1, size)).transpose(1, 2).contiguous()
    steps = len(layout.active)
    if time % size:
        x = F.pad(x, (0, 0, 0, 0, 0, steps * size - time))
    chunks = x.unflatten(1, (steps, size)).permute(1, 0, 3, 2, 4)
    return chunks.reshape(steps * batch, heads, size, width)


def _from_chunks(x: torch.Tensor, layout: _Layout, batch: int, time: int) -> torch.Tensor:
    """The inverse of `_to_chunks`: [M, H, C, W] to [B, T, H, W]."""
    if layout.places is not None:
        return x.transpose(1, 2).flatten(0, 1)[layout.places][None]
    tokens = x.unflatten(0, (-1, batch)).permute(1, 0, 3, 2, 4)
    return tokens.flatten(1, 2)[:, :time]


def _chunks(
    q: torch.Tensor,
    log_decay: torch.Tensor,
    key: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read-outs [B, T, H, V] and final states [N, H, K, V] of any number of tokens."""
    batch, time = q.shape[:2]
    if cu_seqlens is not None and initial_state is None and not output_final_state:
        # Training on packed documents: forgetting everything at each first token separates them,
        # with neither padding nor a look at the boundaries' values.
        starts = torch.zeros(time + 1, dtype=torch.bool, device=q.device)
        starts = starts.index_fill(0, cu_seqlens[:-1].long(), True)[:time, None, None]
        log_decay = log_decay.masked_fill(starts, -math.inf)
        cu_seqlens = None

    layout = _layout(batch, time, cu_seqlens)
    q, log_decay, key, v = (_to_chunks(x, layout) for x in (scale * q, log_decay, key, v))
    scores, since_start, until_end = _scores(q, log_decay, key)
    read_out = scores @ v

    if len(layout.active) > 1 or initial_state is not None or output_final_state:
        updates = (key * until_end.exp()).mT @ v
        chunk_decay = since_start[:, :, -1, :, None].exp()
        entering, final_state = _carry(updates, chunk_decay, initial_state, layout, batch)
        read_out = read_out + (q * since_start.exp()) @ entering
    else:
        final_state = None
    return _from_chunks(read_out, layout, batch, time), final_state


def _scores(
    q: torch.Tensor, log_decay: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halving, from blocks of one token up to the chunk (see the top of this file).

    Args:
        q, log_decay, key: [M, H, C, K], C a power of two.

    Returns:
        scores [M, H, C, C], lower triangular: sum over K of q_i k_j prod(j + 1 .. i of the decay);
        since_start [M, H, C, K]: sum of log decays from the chunk's first token to i, both
            included;
        until_end [M, H, C, K]: sum of log decays after j to the chunk's end.
    """
    size = q.shape[2]
    scores = (q * key).sum(-1)[..., None, None]  # [M, H, C / s, s, s] for blocks of s = 1
    since_start = log_decay[..., None, :]  # [M, H, C / s, s, K], within each block
    until_end = torch.zeros_like(since_start)
    block = 1
    while block < size:
        pairs = (size // (2 * block), 2, block)
        q_later = q.unflatten(2, pairs)[:, :, :, 1]
        key_earlier = key.unflatten(2, pairs)[:, :, :, 0]
        since_earlier, since_later = since_start.unflatten(2, pairs[:2]).unbind(3)
        until_earlier, until_later = until_end.unflatten(2, pairs[:2]).unbind(3)
        scores_earlier, scores_later = scores.unflatten(2, pairs[:2]).unbind(3)

        across = (q_later * since_later.exp()) @ (key_earlier * until_earlier.exp()).mT
        scores = torch.cat(
            [F.pad(scores_earlier, (0, block)), torch.cat([across, scores_later], -1)], -2
        )
        earlier_total = since_earlier[..., -1:, :]
        later_total = since_later[..., -1:, :]
        since_start = torch.cat([since_earlier, since_later + earlier_total], -2)
        until_end = torch.cat([until_earlier + later_total, until_later], -2)
        block *= 2
    return scores[:, :, 0], since_start[:, :, 0], until_end[:, :, 0]


def _carry(
    updates: torch.Tensor,
    chunk_decay: torch.Tensor,
    initial_state: torch.Tensor | None,
    layout: _Layout,
    batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carries the state from chunk to chunk.

    Args:
        updates: [M, H, K, V], what each chunk adds to the state at its end.
        chunk_decay: [M, H, K, 1], the whole chunk's decay.
        initial_state: [N, H, K, V] or `None`.

    Returns:
        The states entering each chunk [M, H, K, V], and those after each sequence [N, H, K, V].
    """
    sequences = batch if layout.order is None else len(layout.order)
    if initial_state is None:
        state = updates.new_zeros(sequences, *updates.shape[1:])
    else:
        state = initial_state if layout.order is None else initial_state[layout.order]
    entering, finished = [], []
    for update, decay, active in zip(
        updates.split(layout.active), chunk_decay.split(layout.active), layout.active, strict=True
    ):
        if active < len(state):
            finished.append(state[active:])
            state = state[:active]
        entering.append(state)
        state = torch.addcmul(update, decay, state)
    final_state = torch.cat([state, *reversed(finished)])
    if layout.order is not None:
        final_state = torch.empty_like(final_state).index_copy(0, layout.order, final_state)
    return torch.cat(entering), final_state
