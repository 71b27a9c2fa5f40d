"""Context parallelism: one sequence, its tokens split in order over the ranks of a group.

The decay is diagonal, so all that a rank's tokens do to the state is

    S_out = diag(exp(G)) S_in + U,

with G [K] the sum of their log decays and U [K, V] the state that they reach from zero. Every rank
computes its own G and U, all gather them, and each combines those of the ranks before it into the
state that enters its tokens (the all-gather of LASP-2, arXiv 2502.07563). The operator then runs
from that `initial_state`. The gradient of the state goes the same way backwards: all gather the
gradients that the ranks' read-outs give, and each combines those of the ranks after it.

The Triton kernels compute U and G on their way, and take an `Exchange` for the rest. For the other
backends `incoming_state` computes them, with gradients of its own.

The short convolution takes its W - 1 inputs before the first token from the previous rank.

A rank sends one state, with its decay, per sequence and head, and W - 1 rows, whatever the length.
Every rank of the group must call these functions in the same order.

Packed documents are kept apart by the `cu_seqlens` of a rank's own tokens, its B rows of T laid end
to end. Behind the first rank, a row's first sequence is the rest of the document before; it is
empty where a document begins with the row. It alone gets what the previous rank hands on. A rank
hands on its last document alone: a document begins with a log decay of -inf, so G is -inf and U is
the state of the last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_patch.ops.torch_ops import compute_dtype, without_autocast

if TYPE_CHECKING:  # some builds of PyTorch have none
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that hold the tokens of sequences, for `meta_linear_attention`.

    Attributes:
        group: the ranks, in the order of their tokens.
        rows: B, the number of sequences, or of rows of packed documents, of which each rank has T
            tokens.
    """

    group: ProcessGroup
    rows: int

    def exchange(self, q: Tensor, cu_seqlens: Tensor | None) -> Exchange:
        """Returns what finds states for a call of the operator on q [B, T, H, K]."""
        return Exchange(self, q.shape[0] * q.shape[1] // self.rows, cu_seqlens)


class Exchange:
    """Finds the states that enter the sequences of this rank from what other ranks reach.

    Args:
        time: T, a rank's tokens of a row.
        cu_seqlens: [N + 1], the boundaries of documents in this rank's tokens.
    """

    def __init__(self, context: ContextParallel, time: int, cu_seqlens: Tensor | None):
        self.context, self.is_packed = context, cu_seqlens is not None
        if self.is_packed:
            self.first, self.last = _edges(cu_seqlens, context.rows, time)

    def __call__(self, own: Tensor, log_decay: Tensor, reverse: bool = False) -> Tensor:
        """Returns the state before the first token of each sequence, [N, H, K, V], zeros on the
        first rank. With `reverse` the gradient of the state behind the last token.

        Args:
            own: [N, H, K, V], what a sequence's tokens on this rank reach from zero: the state
                behind the last one, with `reverse` the gradient of the state before the first one.
            log_decay: [N, H, K], the sum of the log decays of a sequence's tokens on this rank.
        """
        if not self.is_packed:
            return _entering(own, log_decay, self.context.group, reverse)
        source, target = (self.first, self.last) if reverse else (self.last, self.first)
        is_cut = (self.first != self.last)[:, None, None]
        log_decay = log_decay[self.first].masked_fill(is_cut, -math.inf)
        entering = _entering(own[source], log_decay, self.context.group, reverse)
        return _give_to(target, entering, len(own))


def incoming_rows(
    x: Tensor, count: int, group: ProcessGroup, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Returns the inputs before this rank's first token, for `short_convolution` to begin from.

    Args:
        x: [B, T, D], this rank's tokens, T >= count.
        count: W - 1, for a convolution of width W.
        group: the ranks that hold the sequence, in order.
        cu_seqlens: [N + 1], the boundaries of documents in this rank's tokens.

    Returns:
        [B, D, count], the last rows of the previous rank; zeros on the first, and for tokens of
        documents that end there. With `cu_seqlens` [N, D, count], which are zeros for all but the
        first sequence of each row. Gradients flow back to that rank.
    """
    batch, time, channels = x.shape
    if count == 0:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        return x.new_empty(sequences, channels, 0)
    rows = x[:, time - count :]
    if cu_seqlens is None:
        return _FromPrevious.apply(rows.transpose(1, 2), group)
    first, starts = _sequences(cu_seqlens, batch, time)
    later = F.pad(starts[:, time - count + 1 :].flip(1).cumsum(1).flip(1), (0, 1))
    rows = rows.masked_fill((later > 0)[..., None], 0)  # of documents that end on this rank
    incoming = _FromPrevious.apply(rows.transpose(1, 2), group)
    return _give_to(first, incoming, len(cu_seqlens) - 1)


def incoming_state(
    gate_logits: Tensor,
    v: Tensor,
    tau: float,
    context: ContextParallel,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Returns the state before this rank's first token, the `initial_state` of
    `meta_linear_attention`.

    Args:
        gate_logits: [B, T, H, K], of this rank's tokens; with `cu_seqlens` its B rows laid end to
            end, [1, B T, H, K].
        v: [B, T, H, V], or [1, B T, H, V].
        tau: the log decay's divisor.
        cu_seqlens: [N + 1], the boundaries of documents in this rank's tokens.

    Returns:
        [B, H, K, V] in float32 (float64 for float64 inputs); zeros on the first rank. With
        `cu_seqlens` [N, H, K, V], which are zeros for all but the first sequence of each row.
        Gradients flow to `gate_logits` and `v` of all ranks before.
    """
    if cu_seqlens is None:
        return _Combine.apply(*_OwnState.apply(gate_logits, v, tau, None), context.group)
    gate_logits, v = (x.view(context.rows, -1, *x.shape[2:]) for x in (gate_logits, v))
    first, starts = _sequences(cu_seqlens, *v.shape[:2])
    incoming = _Combine.apply(*_OwnState.apply(gate_logits, v, tau, starts), context.group)
    return _give_to(first, incoming, len(cu_seqlens) - 1)


def _edges(cu_seqlens: Tensor, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """Returns the numbers of each row's first and last sequence, int64 [B]. The first may be empty,
    the last is not."""
    rows = torch.arange(
        0, (batch + 1) * time, time, dtype=cu_seqlens.dtype, device=cu_seqlens.device
    )
    begin = torch.searchsorted(cu_seqlens, rows)
    return begin[:-1], begin[1:] - 1


def _sequences(cu_seqlens: Tensor, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """Returns the number of each row's first sequence, int64 [B], and where the others begin, bool
    [B, T]."""
    total, device = batch * time, cu_seqlens.device
    first, _ = _edges(cu_seqlens, batch, time)
    others = cu_seqlens[:-1].long().index_fill(0, first, total)
    starts = torch.zeros(total + 1, dtype=torch.bool, device=device).index_fill(0, others, True)
    return first, starts[:total].view(batch, time)


def _give_to(first: Tensor, incoming: Tensor, sequences: int) -> Tensor:
    """Returns [N, ...], zeros but for the sequences `first`, which get `incoming` [B, ...]."""
    zeros = incoming.new_zeros(sequences, *incoming.shape[1:])
    return zeros.index_copy(0, first, incoming)


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Returns [ranks, *x.shape]."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=group)
    return gathered


def _entering(own: Tensor, log_decay: Tensor, group: ProcessGroup, reverse: bool) -> Tensor:
    """Returns the state that enters this rank's tokens, [B, H, K, V]; with `reverse`, the gradient
    that enters them from behind.

    Args:
        own: [B, H, K, V], what a rank's tokens reach from zero.
        log_decay: [B, H, K], by which they change what enters.
    """
    gathered = _all_gather(torch.cat([log_decay[..., None], own], -1), group)
    decays, reached = gathered[..., :1].exp(), gathered[..., 1:]
    rank, state = dist.get_rank(group), torch.zeros_like(own)
    for other in range(len(gathered) - 1, rank, -1) if reverse else range(rank):
        state = torch.addcmul(reached[other], decays[other], state)
    return state


class _FromPrevious(torch.autograd.Function):
    """The previous rank's tensor; zeros on the first rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        rank, gathered = dist.get_rank(group), _all_gather(x, group)
        return gathered[rank - 1] if rank > 0 else torch.zeros_like(gathered[0])

    @staticmethod
    def backward(ctx: Any, d_previous: Tensor) -> tuple[Tensor, None]:
        following = dist.get_rank(ctx.group) + 1
        gathered = _all_gather(d_previous, ctx.group)
        is_last = following == len(gathered)
        return torch.zeros_like(d_previous) if is_last else gathered[following], None


class _OwnState(torch.autograd.Function):
    """U [B, H, K, V], the state that a rank's tokens reach from zero, and G [B, H, K], the sum of
    their log decays.

    With u_t the sum of the log decays after token t, U = sum of (k_t exp(u_t)) v_t^T. All exponents
    are at most zero; they are -inf across the `starts` of documents. Only the inputs are kept for
    the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, gate_logits: Tensor, v: Tensor, tau: float, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate_logits, v, starts)
        ctx.tau = tau
        with without_autocast(v.device):
            *_, weight, total = _own_weights(gate_logits, tau, starts)
            update = torch.einsum("bthk,bthv->bhkv", weight, v.to(weight.dtype))
        return update, total

    @staticmethod
    def backward(ctx: Any, d_update: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        gate_logits, v, starts = ctx.saved_tensors
        with without_autocast(v.device):
            logits, g, decay_after, weight, _ = _own_weights(gate_logits, ctx.tau, starts)
            d_v = torch.einsum("bthk,bhkv->bthv", weight, d_update)
            d_weight = torch.einsum("bthv,bhkv->bthk", v.to(weight.dtype), d_update)
            # Token t's log decay acts on the whole state and on what the tokens before t added.
            before = F.pad((d_weight * weight).cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
            d_g = d_total[:, None] + before - d_weight * decay_after * g.exp()
            d_logits = d_g * torch.sigmoid(-logits) / ctx.tau
        return d_logits.to(gate_logits.dtype), d_v.to(v.dtype), None, None


def _own_weights(gate_logits: Tensor, tau: float, starts: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the logits, g, exp(u), k exp(u) [B, T, H, K] and G [B, H, K], in float32 or
    float64."""
    logits = gate_logits.to(compute_dtype(gate_logits))
    g = F.logsigmoid(logits) / tau
    cut = g if starts is None else g.masked_fill(starts[..., None, None], -math.inf)
    since = cut.flip(1).cumsum(1).flip(1)  # from each token on; u is that of the next token
    decay_after = F.pad(since[:, 1:], (0, 0, 0, 0, 0, 1)).exp()
    return logits, g, decay_after, -torch.expm1(g) * decay_after, since[:, 0]


class _Combine(torch.autograd.Function):
    """The state that enters each rank, from U and G of all ranks."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, total: Tensor, group: ProcessGroup) -> Tensor:
        state = _entering(update, total, group, False)
        ctx.save_for_backward(state, total)
        ctx.group = group
        return state

    @staticmethod
    def backward(ctx: Any, d_state: Tensor) -> tuple[Tensor, Tensor, None]:
        state, total = ctx.saved_tensors
        d_out = _entering(d_state, total, ctx.group, True)
        return d_out, (d_out * state * total[..., None].exp()).sum(-1), None
