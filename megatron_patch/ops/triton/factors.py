"""The kernel before all others: it turns q and gate logits into the factors of every product.

The score of tokens i >= j is the sum over K of scale q_i k_j 2^(G_i - G_j), with G the running sum
of log decays within the chunk. With m half of the chunk's log decay it factors into

    early_i = scale q_i 2^(G_i - m)    and    late_j = k_j 2^(m - G_j),

which stay in range because MetaLA divides the decay by tau = 16. The same two serve the states: a
token reads the state that enters the chunk by scale q_i 2^G_i = 2^m early_i, and adds to the one
that leaves it by k_j 2^(2m - G_j) = 2^m late_j. The 2^m goes into the states (`carry`).

A chunk and head for which a factor could overflow is flagged exact (`exact.py`).
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.exact import exact_factors, exact_scores
from megatron_patch.ops.triton.tiles import (
    FACTOR_LIMIT,
    LOWEST_LOG_DECAY,
    exp2,
    key,
    locate,
    log_decay,
    reciprocal,
    unit_and_head,
    widen,
)


@triton.jit(do_not_specialize=["T", "chunks"])
def factors(
    q,
    gates,
    aug,
    early,
    late,
    totals,
    exact,
    scores,
    similarity,
    table,
    bounds,
    T,
    chunks,
    scale,
    inverse_tau,
    q_b,
    q_t,
    q_h,
    q_k,
    gate_b,
    gate_t,
    gate_h,
    gate_k,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    RUN: tl.constexpr,
    HAS_AUG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (chunks * H,).

    Writes: early, late [B, T, H, K]; totals [chunks, H, K] float32, log decays of whole chunks;
    exact [chunks, H] int32; similarity [B, T, H] float32, q . (aug * k); and scores [B, T, H, C]
    in exact chunks alone.

    Tiles are [C / RUN, RUN, BK]: Triton hands out the last and then the first dimension to threads,
    so that where these suffice (`configure`) the tokens of a run, which follow each other, lie in
    one, and sums and products along a run need no exchanges.
    """
    unit, head = unit_and_head(H)
    sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    if sequence < 0:
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    run, place = tl.arange(0, C // RUN), tl.arange(0, RUN)
    token = run[:, None] * RUN + place[None, :]
    rows = token[:, :, None]
    columns = tl.arange(0, BK)
    mask = (rows < length) & (columns < K)[None, None, :]
    q += batch * q_b + head * q_h + first * q_t
    gates += batch * gate_b + head * gate_h + first * gate_t
    raw_q = tl.load(q + (rows * q_t + columns[None, None, :] * q_k), mask=mask, other=0.0)
    # Infinite logits: no decay. That of a chunk is bounded below, once for all of its tokens.
    logits = tl.load(
        gates + (rows * gate_t + columns[None, None, :] * gate_k), mask=mask, other=float("inf")
    )
    g = log_decay(widen(logits), inverse_tau, PRECISION)
    runs = tl.sum(g, 1)
    until = tl.cumsum(runs, 0)
    # The last of the sums, which lie where the scan left them; runs would be summed anew.
    total = tl.sum(tl.where((run == C // RUN - 1)[:, None], until, 0.0), 0)
    until -= 0.5 * total[None, :]

    at = unit.to(tl.int64) * H + head
    token_at = (batch * T + first) * H + head
    early += token_at * K
    late += token_at * K
    offsets = rows * (H * K) + columns[None, None, :]
    # Not sooner: what lives through the exchange between threads takes registers.
    raw_q = widen(raw_q)
    k = key(g, PRECISION)
    if HAS_AUG:
        weight = widen(tl.load(aug + head * K + columns, mask=columns < K, other=0.0))
        tl.store(
            similarity + token_at + token * H,
            tl.sum(raw_q * k * weight[None, None, :], 2),
            mask=token < length,
        )
    if PRECISION == "bf16":
        # 2^(G - m): before the run an exponential, within it products with decays, as k took.
        decay = exp2(g, PRECISION)
        before = exp2(until - runs, PRECISION)[:, None, :]
        factor = tl.cumprod(tl.where((place == 0)[None, :, None], before * decay, decay), 1)
        inverse = reciprocal(factor)
    else:
        # Products would gather the errors of their exponentials.
        until = (until - runs)[:, None, :] + tl.cumsum(g, 1)
        factor, inverse = tl.exp2(until), tl.exp2(-until)
    tl.store(early + offsets, (raw_q * scale * factor).to(early.dtype.element_ty), mask=mask)
    tl.store(late + offsets, (k * inverse).to(late.dtype.element_ty), mask=mask)
    total = tl.where(total < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, total)
    tl.store(totals + at * K + columns, total, mask=columns < K)
    is_exact = tl.min(total) < FACTOR_LIMIT
    tl.store(exact + at, is_exact.to(tl.int32))
    if is_exact:
        # Its threads write where others have written.
        tl.debug_barrier()
        exact_factors(
            q, gates, early, late, length, scale, inverse_tau, q_t, q_k, gate_t, gate_k,
            H, K, C, PRECISION,
        )  # fmt: skip
        weights = exact_scores(
            q, gates, length, scale, inverse_tau, q_t, q_k, gate_t, gate_k, K, C, PRECISION
        )
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        pair = token_at * C + (i * (H * C) + j)
        tl.store(scores + pair, weights.to(scores.dtype.element_ty), mask=i < length)
