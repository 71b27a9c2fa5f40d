"""Chunked gated linear attention, step 1: q and gate logits become the scaled factors qg and kg.

The score of tokens i >= j is the sum over K of scale q_i k_j 2^(G_i - G_j), where G is the running
sum of log decays within the chunk. With m half of the chunk's total log decay it factors into

    qg_i = scale q_i 2^(G_i - m)    and    kg_j = k_j 2^(m - G_j).

These stay in range because MetaLA divides log decays by tau = 16. The same factors serve the state:
a token reads the state before the chunk by scale q_i 2^G_i = 2^m qg_i, and adds to the state after
it by k_j 2^(2m - G_j) = 2^m kg_j. The inter-chunk scan (`chunk_h.py`) applies the 2^m.

A chunk and head whose factors could overflow is flagged for the fallback path
(`chunk_fallback.py`), which redefines qg and kg.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megatron_patch.ops.triton.chunk_fallback import fallback_factors, fallback_scores
from megatron_patch.ops.triton.config import ChunkCall, power_of_two
from megatron_patch.ops.triton.launch import launch
from megatron_patch.ops.triton.tiles import (
    FACTOR_LIMIT,
    LOWEST_LOG_DECAY,
    chunk_and_head,
    exp2,
    key,
    locate,
    log_decay,
    offset_of,
    reciprocal,
    to_float32,
)


class Prepared(NamedTuple):
    """The results of `chunk_prepare`, which the other kernels read.

    qg, kg: [B, T, H, K], the scaled factors.
    g_last: [chunks, H, K] float32, the log decay of whole chunks.
    fallback: [chunks, H] int32, whether the chunk takes the fallback path.
    aug_score: [B, T, H] float32, q . (aug * k); empty without aug.
    """

    qg: torch.Tensor
    kg: torch.Tensor
    g_last: torch.Tensor
    fallback: torch.Tensor
    aug_score: torch.Tensor


@triton.jit(do_not_specialize=["T", "chunks"])
def chunk_prepare_kernel(
    q, gates, aug, prepared, scores, chunk_indices, cu_seqlens, T, chunks, scale, inverse_tau,
    q_strides, gate_strides,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes `prepared`, and scores [B, T, H, C] in fallback chunks only. Grid: (chunks * H,).

    Tiles are [C / RUN, RUN, BK]. Triton assigns the last and then the first dimension to threads,
    so with enough of these (`configure`) one thread holds the RUN consecutive tokens of a run, and
    sums and products along a run need no exchange between threads.
    """
    qg, kg, g_last, fallback, aug_score = prepared
    chunk, head = chunk_and_head(H)
    sequence, _, batch, first, end = locate(chunk, chunks, chunk_indices, cu_seqlens, T, C)
    if sequence < 0:
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    run, place = tl.arange(0, C // RUN), tl.arange(0, RUN)
    token = run[:, None] * RUN + place[None, :]
    rows = token[:, :, None]
    columns = tl.arange(0, BK)
    mask = (rows < length) & (columns < K)[None, None, :]
    q_t, gate_t = q_strides[1], gate_strides[1]
    q += offset_of(batch, first, head, q_strides)
    gates += offset_of(batch, first, head, gate_strides)
    raw_q = tl.load(q + (rows * q_t + columns[None, None, :]), mask=mask, other=0.0)
    # Infinite logits mean no decay. The lower bound is applied once, to the chunk's total.
    logits = tl.load(
        gates + (rows * gate_t + columns[None, None, :]), mask=mask, other=float("inf")
    )
    g = log_decay(to_float32(logits), inverse_tau, PRECISION)
    runs = tl.sum(g, 1)
    until = tl.cumsum(runs, 0)
    # The last cumulative sum, in the layout that the scan left it in. Summing `runs` would not do.
    total = tl.sum(tl.where((run == C // RUN - 1)[:, None], until, 0.0), 0)
    until -= 0.5 * total[None, :]

    chunk_at = chunk.to(tl.int64) * H + head
    token_at = (batch * T + first) * H + head
    qg += token_at * K
    kg += token_at * K
    offsets = rows * (H * K) + columns[None, None, :]
    # Converted here and not above, because values that live through the scan take registers.
    raw_q = to_float32(raw_q)
    k = key(g, PRECISION)
    if aug is not None:
        aug_weight = to_float32(tl.load(aug + head * K + columns, mask=columns < K, other=0.0))
        tl.store(
            aug_score + token_at + token * H,
            tl.sum(raw_q * k * aug_weight[None, None, :], 2),
            mask=token < length,
        )
    if PRECISION == "bf16":
        # 2^(G - m): one exponential before the run, then products with the decays k was made of.
        decay = exp2(g, PRECISION)
        before = exp2(until - runs, PRECISION)[:, None, :]
        factor = tl.cumprod(tl.where((place == 0)[None, :, None], before * decay, decay), 1)
        inverse = reciprocal(factor)
    else:
        # Cumulative products would accumulate the errors of the exponentials.
        until = (until - runs)[:, None, :] + tl.cumsum(g, 1)
        factor, inverse = tl.exp2(until), tl.exp2(-until)
    tl.store(qg + offsets, (raw_q * scale * factor).to(qg.dtype.element_ty), mask=mask)
    tl.store(kg + offsets, (k * inverse).to(kg.dtype.element_ty), mask=mask)
    total = tl.where(total < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, total)
    tl.store(g_last + chunk_at * K + columns, total, mask=columns < K)
    is_fallback = tl.min(total) < FACTOR_LIMIT
    tl.store(fallback + chunk_at, is_fallback.to(tl.int32))
    if is_fallback:
        # The fallback writes over qg and kg from other threads.
        tl.debug_barrier()
        fallback_factors(
            q, gates, qg, kg, length, scale, inverse_tau, q_t, gate_t, H, K, C, PRECISION
        )
        weights = fallback_scores(
            q, gates, length, scale, inverse_tau, q_t, gate_t, K, C, PRECISION
        )
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        pair = token_at * C + (i * (H * C) + j)
        tl.store(scores + pair, weights.to(scores.dtype.element_ty), mask=i < length)


def chunk_prepare(call: ChunkCall) -> tuple[Prepared, torch.Tensor]:
    """Returns the factors, and the scores of fallback chunks."""
    shape = call.v.shape[:3]
    chunks = call.indices.chunk_count, call.heads
    prepared = Prepared(
        # `new_output`, because the gradients of q and gate logits may take this memory.
        qg=call.new_output(*shape, call.k, dtype=call.dtype),
        kg=call.new_output(*shape, call.k, dtype=call.dtype),
        g_last=call.new(*chunks, call.k),
        fallback=call.new(*chunks, dtype=torch.int32),
        aug_score=call.new(*(shape if call.aug is not None else (0,))),
    )
    scores = call.new_scores()
    launch(
        chunk_prepare_kernel, call.grid,
        (call.q, call.gates, call.aug, prepared, scores, *call.chunk_tensors),
        (*call.chunk_numbers, *call.scales, call.q_strides, call.gate_strides),
        H=call.heads, K=call.k, C=call.config.chunk, BK=power_of_two(call.k),
        RUN=call.config.prepare_run, PRECISION=call.config.precision,
        num_warps=call.config.prepare_warps,
    )  # fmt: skip
    return prepared, scores
