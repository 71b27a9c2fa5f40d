"""The operators in plain PyTorch: for the CPU, for float64 and for GPUs without a kernel.

Needs torch and nothing else, so that an exported model folder can carry a copy of this file (see
`megatron_patch.hf.remote_code`). Features:

- Meta linear attention in chunks, safe for gate logits of any size
- The same for one token: the decoding step
- The causal depthwise convolution and SwiGLU
- Packed sequences (`cu_seqlens`), carried states, autograd, `torch.compile`

Chunked gated linear attention: within a chunk, token i reads token j <= i through the product of
the decays j + 1 .. i. The usual way takes this product from one running sum of log decays, as a
difference. That loses digits, and overflows where gates are strongly negative. Here the products
come from halving. For two neighbouring blocks of s tokens, with m the first token of the later one,

    prod(j + 1 .. i) = exp(sum of g over m .. i) * exp(sum of g over j + 1 .. m - 1),

so one matrix product serves all pairs between the two blocks. Blocks of 1, 2, 4, ... tokens cover
every pair once, and one addition turns the sums for s into those for 2 s. Sums are never subtracted
and every exponent is at most zero, so nothing overflows, no digits cancel and no gradient is
inf * 0. A decay that underflows becomes zero, as it does in the recurrence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

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
    recurrence: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes Meta Linear Attention (arXiv 2411.10741) in chunks.

    The arguments are those of `megatron_patch.ops.meta_linear_attention` and are not checked here.
    Computes in float64 for float64 inputs and in float32 for all others, under autocast too.

    Args:
        q, gate_logits: [B, T, H, K].
        v, out_gate: [B, T, H, V].
        aug: [H, K].
        out_gate_bias: [H, V].
        tau, scale, norm_eps: the divisor of the log decay, the read-out's scale, the LayerNorm's
            epsilon.
        initial_state: [N, H, K, V], N = B or the number of packed sequences.
        output_final_state: whether to return the state after the last token.
        inplace_final_state: whether to write that state over `initial_state`, and return it.
        cu_seqlens: [N + 1], the boundaries of sequences packed along time.
        recurrence: takes the place of `chunk_fwd`.

    Returns:
        out [B, T, H, V] in the dtype of `v`, and the final state or `None`.
    """
    dtype, out_dtype = compute_dtype(v), v.dtype
    with without_autocast(q.device):
        q, v = q.to(dtype), v.to(dtype)
        g, k = decay_and_key(gate_logits.to(dtype), tau)
        o, final_state = (recurrence or chunk_fwd)(
            q, k, v, g, scale, initial_state, output_final_state or inplace_final_state, cu_seqlens
        )
        out = augment_norm_gate(o, q, k, v, aug, out_gate, out_gate_bias, norm_eps)
    final_state = give_state(final_state, initial_state, output_final_state, inplace_final_state)
    return out.to(out_dtype), final_state


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    activation: str | None = "silu",
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolves each channel of x along time, causally, and applies SiLU.

    The arguments are those of `megatron_patch.ops.short_convolution` and are not checked here.

    Args:
        x: [B, T, D].
        weight: [D, 1, W].
        activation: "silu" or `None`.
        initial_state: [N, D, W - 1], the inputs before the first token, oldest first.
        output_final_state, inplace_final_state, cu_seqlens: as in `meta_linear_attention`.

    Returns:
        y [B, T, D], and the final state [N, D, W - 1] or `None`, both in the dtype of `x`.
    """
    if cu_seqlens is None:
        y, final_state = _convolve(x, weight, initial_state)
    else:
        y, final_state = _convolve_packed(x, weight, initial_state, cu_seqlens)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), give_state(
        final_state, initial_state, output_final_state, inplace_final_state
    )


def swiglu(gate_and_up: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """Returns silu(gate) * up [..., F] (arXiv 2002.05202), of one tensor [..., 2 F] or of two."""
    gate, up = gate_and_up.chunk(2, dim=-1) if up is None else (gate_and_up, up)
    return F.silu(gate) * up


def swiglu_backward(
    gate_and_up: torch.Tensor, d_y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of `gate_and_up` [..., 2 F], given that of y [..., F], and y again."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    s = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_y * up, gate)
    return torch.cat([d_gate, d_y * s], dim=-1), s * up


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x + residual, or x without a residual, and its RMS norm without weights."""
    total = x if residual is None else x + residual
    return total, F.rms_norm(total, total.shape[-1:], eps=eps)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype of sums and states: float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context in which products keep the precision of their inputs."""
    # "meta" has no autocast to ask for.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def decay_and_key(gate_logits: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log decay g = logsigmoid(a) / tau and the key k = 1 - exp(g), shaped like a.

    `expm1` keeps the key's digits where the decay is close to one.
    """
    g = F.logsigmoid(gate_logits) / tau
    return g, -torch.expm1(g)


def augment_norm_gate(
    o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    aug: torch.Tensor | None,
    out_gate: torch.Tensor | None,
    out_gate_bias: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """Returns silu(out_gate + bias) * LayerNorm_V(o + sigmoid((q . (aug * k)) v)).

    Args:
        o: [..., H, V], the recurrence's scaled output. The result has its dtype.
        q: [..., H, K], not scaled, in the dtype of `o`.
        k: [..., H, K], 1 - exp(g), in the dtype of `o`.
        v: [..., H, V], in the dtype of `o`.
        aug: [H, K], or `None` for no self-augmentation.
        out_gate: [..., H, V], or `None` for no gate.
        out_gate_bias: [H, V], added to `out_gate`, or `None`.
        norm_eps: epsilon of the LayerNorm over V, which has no affine parameters.
    """
    dtype = o.dtype
    if aug is not None:
        aug_score = (q * (aug.to(dtype) * k)).sum(-1, keepdim=True)
        o = o + torch.sigmoid(aug_score * v)
    out = F.layer_norm(o, o.shape[-1:], eps=norm_eps)
    if out_gate is not None:
        z = out_gate.to(dtype)
        out = F.silu(z if out_gate_bias is None else z + out_gate_bias.to(dtype)) * out
    return out


def give_state(
    final_state: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    inplace_final_state: bool,
) -> torch.Tensor | None:
    """Returns the final state as the caller wants it: written over the initial one, or as it is, or
    not at all."""
    if inplace_final_state:
        return initial_state.copy_(final_state)
    return final_state if output_final_state else None


def one_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence for one token: [B, 1, H, *] to o [B, 1, H, V] and state [B, H, K, V]."""
    # [B, 1, H, *] to [B, H, 1, *], without a copy.
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
    new = k.mT * v
    if state is not None:
        new = torch.addcmul(new, g.exp().mT, state)
    return ((scale * q) @ new).transpose(1, 2), new


class _Layout(NamedTuple):
    """How the tokens of B or N sequences lie in M chunks of C tokens.

    The chunks that come c-th in their sequence stand side by side, so that one loop over c carries
    the states of all sequences together. The last three fields are `None` for sequences of one
    length, which stay in order.

    Attributes:
        chunk_size: C.
        active: for each c, how many sequences have a c-th chunk. Never rises.
        rows: [M * C] int64, the token at each place in the chunks, or T at padding.
        places: [T] int64, the inverse: each token's place in the chunks.
        order: [N] int64, the sequence behind each carried state, longest first.
    """

    chunk_size: int
    active: list[int]
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    order: torch.Tensor | None = None


def _chunk_size(longest: int) -> int:
    """Returns `CHUNK_SIZE`, or for short sequences the power of two that holds them."""
    return min(CHUNK_SIZE, 1 << max(longest - 1, 0).bit_length())


def _layout(batch: int, time: int, cu_seqlens: torch.Tensor | None) -> _Layout:
    if cu_seqlens is None:
        size = _chunk_size(time)
        return _Layout(size, [batch] * math.ceil(time / size))

    device, cu_seqlens = cu_seqlens.device, cu_seqlens.long()
    lengths = cu_seqlens.diff()
    size = _chunk_size(int(lengths.max()))
    chunks = (lengths + size - 1) // size
    order = chunks.argsort(descending=True, stable=True)
    rank = order.argsort()
    step = torch.arange(int(chunks.max()), device=device)
    active = torch.searchsorted(-chunks[order], -step)  # counts chunks > step
    first_chunk = active.cumsum(0) - active

    token = torch.arange(time, device=device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    offset = token - cu_seqlens[sequence]
    places = (first_chunk[offset // size] + rank[sequence]) * size + offset % size
    rows = torch.full((int(chunks.sum()) * size,), time, device=device).index_copy(0, places, token)
    return _Layout(size, active.tolist(), rows, places, order)


def _to_chunks(x: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """Copies [B, T, H, *] of any strides to a contiguous [M, H, C, *], with zeros at padding."""
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
    """Undoes `_to_chunks`: [M, H, C, *] to [B, T, H, *]."""
    if layout.places is not None:
        return x.transpose(1, 2).flatten(0, 1)[layout.places][None]
    tokens = x.unflatten(0, (-1, batch)).permute(1, 0, 3, 2, 4)
    return tokens.flatten(1, 2)[:, :time]


def chunk_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale S_t^T q_t in chunks.

    Args:
        q, k, g: [B, T, H, K].
        v: [B, T, H, V].
        scale, initial_state, output_final_state, cu_seqlens: as in `meta_linear_attention`.

    Returns:
        o [B, T, H, V], and the final states [N, H, K, V], or possibly `None` if not asked for.
    """
    batch, time = q.shape[:2]
    if cu_seqlens is None and time == 1:
        return one_step(q, k, v, g, scale, initial_state)
    if cu_seqlens is not None and initial_state is None and not output_final_state:
        # Training on packed documents. A decay of zero at each first token separates them, with no
        # padding and without reading the values of cu_seqlens, which would wait for the GPU.
        starts = torch.zeros(time + 1, dtype=torch.bool, device=q.device)
        starts = starts.index_fill(0, cu_seqlens[:-1].long(), True)[:time, None, None]
        g = g.masked_fill(starts, -math.inf)
        cu_seqlens = None

    layout = _layout(batch, time, cu_seqlens)
    q, k, v, g = (_to_chunks(x, layout) for x in (scale * q, k, v, g))
    scores, since_start, until_end = _scores(q, k, g)
    o = scores @ v

    if len(layout.active) > 1 or initial_state is not None or output_final_state:
        updates = (k * until_end.exp()).mT @ v
        g_last = since_start[:, :, -1, :, None]
        h, final_state = _chunk_fwd_h(updates, g_last, initial_state, layout, batch)
        o = o + (q * since_start.exp()) @ h
    else:
        final_state = None
    return _from_chunks(o, layout, batch, time), final_state


def _scores(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the scores within chunks by halving, from blocks of one token up to the chunk (see
    the top of this file).

    Args:
        q, k, g: [M, H, C, K], C a power of two.

    Returns:
        scores [M, H, C, C], lower triangular: sum over K of q_i k_j prod(j + 1 .. i of the decay);
        since_start [M, H, C, K]: sum of g from the chunk's first token to i, both included;
        until_end [M, H, C, K]: sum of g after j to the chunk's end.
    """
    size = q.shape[2]
    scores = (q * k).sum(-1)[..., None, None]  # [M, H, C / s, s, s] for blocks of s = 1
    since_start = g[..., None, :]  # [M, H, C / s, s, K], within each block
    until_end = torch.zeros_like(since_start)
    block = 1
    while block < size:
        pairs = (size // (2 * block), 2, block)
        q_later = q.unflatten(2, pairs)[:, :, :, 1]
        k_earlier = k.unflatten(2, pairs)[:, :, :, 0]
        since_earlier, since_later = since_start.unflatten(2, pairs[:2]).unbind(3)
        until_earlier, until_later = until_end.unflatten(2, pairs[:2]).unbind(3)
        scores_earlier, scores_later = scores.unflatten(2, pairs[:2]).unbind(3)

        across = (q_later * since_later.exp()) @ (k_earlier * until_earlier.exp()).mT
        scores = torch.cat(
            [F.pad(scores_earlier, (0, block)), torch.cat([across, scores_later], -1)], -2
        )
        earlier_total = since_earlier[..., -1:, :]
        later_total = since_later[..., -1:, :]
        since_start = torch.cat([since_earlier, since_later + earlier_total], -2)
        until_end = torch.cat([until_earlier + later_total, until_later], -2)
        block *= 2
    return scores[:, :, 0], since_start[:, :, 0], until_end[:, :, 0]


def _chunk_fwd_h(
    updates: torch.Tensor,
    g_last: torch.Tensor,
    initial_state: torch.Tensor | None,
    layout: _Layout,
    batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carries the state from chunk to chunk.

    Args:
        updates: [M, H, K, V], what each chunk adds to the state at its end.
        g_last: [M, H, K, 1], the whole chunk's log decay.
        initial_state: [N, H, K, V] or `None`.

    Returns:
        The state h before each chunk [M, H, K, V], and after each sequence [N, H, K, V].
    """
    sequences = batch if layout.order is None else len(layout.order)
    if initial_state is None:
        state = updates.new_zeros(sequences, *updates.shape[1:])
    else:
        state = initial_state if layout.order is None else initial_state[layout.order]
    h, finished = [], []
    steps = zip(
        updates.split(layout.active),
        g_last.exp().split(layout.active),
        layout.active,
        strict=True,
    )
    for update, decay, active in steps:
        if active < len(state):
            finished.append(state[active:])
            state = state[:active]
        h.append(state)
        state = torch.addcmul(update, decay, state)
    final_state = torch.cat([state, *reversed(finished)])
    if layout.order is not None:
        final_state = torch.empty_like(final_state).index_copy(0, layout.order, final_state)
    return torch.cat(h), final_state


def _weighted_sum(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolves [B, W - 1 + T, D] with [D, 1, W] to [B, T, D], in float32 or float64.

    One fused multiply-add per entry of the kernel beats a grouped `conv1d` on the CPU, and needs no
    change of layout.
    """
    dtype = compute_dtype(padded)
    kernel_size = weight.shape[-1]
    time = padded.shape[1] - kernel_size + 1
    padded, weight = padded.to(dtype), weight.to(dtype)
    y = padded[:, :time] * weight[:, 0, 0]
    for w in range(1, kernel_size):
        y = torch.addcmul(y, padded[:, w : w + time], weight[:, 0, w])
    return y


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolves sequences of one length.

    Returns:
        The sums [B, T, D] before the activation, and the final state [B, D, W - 1].
    """
    time, past = x.shape[1], weight.shape[-1] - 1
    if initial_state is None:
        padded = F.pad(x, (0, 0, past, 0))
    else:
        padded = torch.cat([initial_state.transpose(1, 2), x], dim=1)
    return _weighted_sum(padded, weight), transposed_copy(padded[:, time:])


def _convolve_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolves packed sequences; returns what `_convolve` does.

    Puts W - 1 rows of state (or zeros) before each sequence, so that the kernel never reaches into
    the sequence before. Shapes do not depend on the values of `cu_seqlens`.
    """
    time, channels, past = x.shape[1], x.shape[2], weight.shape[-1] - 1
    cu_seqlens = cu_seqlens.long()
    sequences = len(cu_seqlens) - 1
    token = torch.arange(time, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    token_rows = token + (sequence + 1) * past
    # The rows of state before sequence n; those before n + 1 follow the last token of n.
    state_rows = cu_seqlens[:, None] + torch.arange(sequences + 1, device=x.device)[:, None] * past
    state_rows = state_rows + torch.arange(past, device=x.device)

    padded = x.new_zeros(time + sequences * past, channels).index_copy(0, token_rows, x[0])
    if initial_state is not None:
        rows = initial_state.transpose(1, 2).reshape(-1, channels)
        padded = padded.index_copy(0, state_rows[:-1].reshape(-1), rows)
    y = _weighted_sum(padded[None], weight)[:, token_rows - past]
    return y, transposed_copy(padded[state_rows[1:] - past])


def transposed_copy(rows: torch.Tensor) -> torch.Tensor:
    """Copies [N, W - 1, D] to [N, D, W - 1], so that a small state keeps no long sequence in
    memory."""
    return rows.transpose(1, 2).clone(memory_format=torch.contiguous_format)
