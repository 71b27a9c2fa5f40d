"""The kernel before all others: it turns q and gate logits into the factors of every product.

The score of tokens i >= j is the sum over K of q_i k_j 2^(G_i - G_j), with G the running sum of log
decays within the chunk. With m half of the chunk's log decay it factors into

    early_i = q_i 2^(G_i - m)    and    late_j = k_j 2^(m - G_j),

which stay in range because MetaLA divides the decay by tau = 16. The same two serve the states: a
token reads the state that enters the chunk by q_i 2^G_i = 2^m early_i, and adds to the one that
leaves it by k_j 2^(2m - G_j) = 2^m late_j. The 2^m goes into the states (`carry`).

A chunk and head for which a factor could overflow is flagged exact. Then early = q 2^G and late =
k 2^(sum of the later log decays), which serve the states alone, with 1 in place of 2^m, and scores
are computed token by token (`exact_scores`).
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.tiles import FACTOR_LIMIT, decays, key, locate, until_end


@triton.jit(do_not_specialize=["T", "chunks"])
def factors(
    q,
    gates,
    aug,
    early,
    late,
    totals,
    exact,
    similarity,
    table,
    bounds,
    T,
    chunks,
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
    HAS_AUG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (chunks, H).

    Writes: early, late [B, T, H, K]; totals [chunks, H, K] float32, log decays of whole chunks;
    exact [chunks, H] int32; similarity [B, T, H] float32, q . (aug * k).
    """
    unit = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, index, link, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    if sequence < 0:
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    rows = tl.arange(0, C)[:, None]
    columns = tl.arange(0, BK)
    k_mask = (columns < K)[None, :]
    mask = (rows < length) & k_mask
    gate_tile = (
        gates + batch * gate_b + head * gate_h + first * gate_t
        + (rows * gate_t + columns[None, :] * gate_k)
    )  # fmt: skip
    q_tile = q + batch * q_b + head * q_h + first * q_t + (rows * q_t + columns[None, :] * q_k)
    raw_q = tl.load(q_tile, mask=mask, other=0.0).to(tl.float32)
    g = decays(gate_tile, mask, inverse_tau, PRECISION)
    k = key(g, PRECISION)
    total = tl.sum(g, 0)
    since = tl.cumsum(g, 0) - 0.5 * total[None, :]
    at = unit.to(tl.int64) * H + head
    token_at = (batch * T + first) * H + head
    offsets = token_at * K + (rows * (H * K) + columns[None, :])
    tl.store(early + offsets, (raw_q * tl.exp2(since)).to(early.dtype.element_ty), mask=mask)
    tl.store(late + offsets, (k * tl.exp2(-since)).to(late.dtype.element_ty), mask=mask)
    tl.store(totals + at * K + columns, total, mask=columns < K)
    is_exact = tl.min(total) < FACTOR_LIMIT
    tl.store(exact + at, is_exact.to(tl.int32))
    if HAS_AUG:
        weight = tl.load(aug + head * K + columns, mask=columns < K, other=0.0).to(tl.float32)
        token = tl.arange(0, C)
        tl.store(
            similarity + token_at + token * H,
            tl.sum(raw_q * k * weight[None, :], 1),
            mask=token < length,
        )
    if is_exact:
        # Loaded again, lest this rare path take registers from the usual one.
        raw_q = tl.load(q_tile, mask=mask, other=0.0).to(tl.float32)
        g = decays(gate_tile, mask, inverse_tau, PRECISION)
        until = until_end(gate_tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
        factor = raw_q * tl.exp2(tl.cumsum(g, 0))
        tl.store(early + offsets, factor.to(early.dtype.element_ty), mask=mask)
        factor = key(g, PRECISION) * tl.exp2(until)
        tl.store(late + offsets, factor.to(late.dtype.element_ty), mask=mask)
