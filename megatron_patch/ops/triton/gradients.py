"""The kernels for the gradients of q, gate logits, v and aug, given those of y and of the states.

With early and late as `factors` wrote them, the scores P = early late^T (j <= i), the states that
`load_state` reads, S before a chunk and dS after it, and each token's similarity b = q (aug * k):

    y = P v + early S + s            with s = sigmoid(b v)
    dv = P^T dy + late dS + b ds     with ds = dy s (1 - s)
    db = sum over V of ds v
    dP = dy v^T                      (j <= i)
    d early = dy S^T + dP late
    d late = v dS^T + dP^T early

from which dq, dk and the gradients of decays follow channel by channel. dv and dP take all channels
of K, the others only their own. For heads of one tile of K, `gradients` does everything. For wider
ones that would take more registers than there are: `value_gradients` computes dv, db and dP, and a
program of `gradients` all else for its tile of K.
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.states import load_state
from megatron_patch.ops.triton.tiles import (
    beside,
    exp2,
    key,
    locate,
    log_decay,
    matmul,
    sigmoid,
    sums_along_time,
    unit_and_head,
)


@triton.jit
def transposed_scores(early_tile, late_tile, C: tl.constexpr, PRECISION: tl.constexpr):
    """P^T as an operand: a product of its own, cheaper than the way of P through shared memory."""
    token = tl.arange(0, C)
    scores_t = matmul(late_tile, tl.trans(early_tile), PRECISION)
    return tl.where(token[:, None] <= token[None, :], scores_t, 0.0).to(late_tile.dtype)


@triton.jit
def value_gradient(
    values,
    dy,
    d_state,
    scores_t,
    late_tile,
    b,
    HAS_AUG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv of a tile of V, and what the tile adds to db."""
    dv = matmul(scores_t, dy, PRECISION)
    dv += matmul(late_tile, d_state, PRECISION)
    db = tl.zeros_like(b)
    if HAS_AUG:
        values = beside(values, dv)
        s = sigmoid(b[:, None] * values)
        d_s = beside(dy, dv) * s * (1 - s)
        db = tl.sum(d_s * values, 1)
        dv += b[:, None] * d_s
    return dv, db


@triton.jit(do_not_specialize=["T", "chunks"])
def value_gradients(
    v,
    d_y,
    early,
    late,
    exact,
    similarity,
    d_v,
    d_scores,
    d_similarity,
    d_states,
    table,
    bounds,
    T,
    chunks,
    v_b,
    v_t,
    v_h,
    v_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_AUG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes d_v, d_scores [B, T, H, C] and d_similarity [B, T, H], which may share the memory of
    `similarity`. Grid: (chunks * H,); chunks flagged exact are left to `exact_gradients`."""
    unit, head = unit_and_head(H)
    sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    if sequence < 0:
        return
    chunk_at = unit.to(tl.int64) * H + head
    if tl.load(exact + chunk_at) != 0:
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    token_at = (batch * T + first) * H + head
    token = tl.arange(0, C)
    rows = token[:, None]
    v += batch * v_b + head * v_h + first * v_t
    d_y += token_at * V
    d_v += token_at * V
    k_columns = tl.arange(0, BK)
    mask = (rows < length) & (k_columns < K)[None, :]
    k_offsets = token_at * K + (rows * (H * K) + k_columns[None, :])
    early_tile = tl.load(early + k_offsets, mask=mask, other=0.0)
    late_tile = tl.load(late + k_offsets, mask=mask, other=0.0)
    scores_t = transposed_scores(early_tile, late_tile, C, PRECISION)
    b = tl.zeros([C], tl.float32)
    if HAS_AUG:
        b = tl.load(similarity + token_at + token * H, mask=token < length, other=0.0)

    dp = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for v_tile in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        v_columns = v_tile * BV + tl.arange(0, BV)
        v_mask = (rows < length) & (v_columns < V)[None, :]
        values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=v_mask, other=0.0)
        offsets = rows * (H * V) + v_columns[None, :]
        dy = tl.load(d_y + offsets, mask=v_mask, other=0.0)
        d_state = load_state(d_states, chunk_at, k_columns, v_columns, K, V)
        dv, share = value_gradient(values, dy, d_state, scores_t, late_tile, b, HAS_AUG, PRECISION)
        tl.store(d_v + offsets, dv.to(d_v.dtype.element_ty), mask=v_mask)
        dp += matmul(dy, tl.trans(values), PRECISION)
        db += share

    dp = tl.where(rows >= token[None, :], dp, 0.0).to(d_scores.dtype.element_ty)
    tl.store(d_scores + token_at * C + (rows * (H * C) + token[None, :]), dp, mask=rows < length)
    if HAS_AUG:
        tl.store(d_similarity + token_at + token * H, db, mask=token < length)


@triton.jit(do_not_specialize=["T", "chunks"])
def gradients(
    q,
    gates,
    v,
    aug,
    d_y,
    early,
    late,
    chunk_decays,
    exact,
    similarity,
    d_scores,
    d_similarity,
    states,
    d_states,
    d_q,
    d_gates,
    d_v,
    d_aug,
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
    v_b,
    v_t,
    v_h,
    v_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_AUG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (chunks * H * tiles of K,); chunks flagged exact are left to `exact_gradients`.

    Where K has several tiles, `value_gradients` has written d_v, d_scores and d_similarity; where
    it has one, d_v is written, and the other two are not used. Each program reads its part of
    early, late and d_y before it writes d_q, d_gates and d_v, which may share their memory.
    d_aug [chunks, H, K] float32 are each chunk's share.

    The gradient of G_i, the running sum of log decays, is early_i d_early_i - late_i d_late_i, and
    that of a log decay g_t the sum of those over i >= t. The sum over pairs of tokens on one side
    of t cancels; it does so exactly, for both products use the same rounded operands.
    """
    TILES: tl.constexpr = (K + BK - 1) // BK
    unit, head = unit_and_head(H, TILES)
    sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    k_columns = (tl.program_id(0) % TILES) * BK + tl.arange(0, BK)
    k_known = k_columns < K
    chunk_at = unit.to(tl.int64) * H + head
    if sequence < 0:
        if HAS_AUG:
            tl.store(d_aug + chunk_at * K + k_columns, tl.zeros([BK], tl.float32), mask=k_known)
        return
    if tl.load(exact + chunk_at) != 0:
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    token_at = (batch * T + first) * H + head
    token = tl.arange(0, C)
    rows = token[:, None]
    v += batch * v_b + head * v_h + first * v_t
    d_y += token_at * V
    d_v += token_at * V
    mask = (rows < length) & k_known[None, :]
    k_offsets = token_at * K + (rows * (H * K) + k_columns[None, :])
    if TILES == 1:
        early_tile = tl.load(early + k_offsets, mask=mask, other=0.0)
        late_tile = tl.load(late + k_offsets, mask=mask, other=0.0)
        scores_t = transposed_scores(early_tile, late_tile, C, PRECISION)
        b = tl.zeros([C], tl.float32)
        if HAS_AUG:
            b = tl.load(similarity + token_at + token * H, mask=token < length, other=0.0)
        dp = tl.zeros([C, C], tl.float32)
        db = tl.zeros([C], tl.float32)

    d_early = tl.zeros([C, BK], tl.float32)
    d_late = tl.zeros([C, BK], tl.float32)
    edge = tl.zeros([BK], tl.float32)
    for v_tile in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        v_columns = v_tile * BV + tl.arange(0, BV)
        v_mask = (rows < length) & (v_columns < V)[None, :]
        values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=v_mask, other=0.0)
        offsets = rows * (H * V) + v_columns[None, :]
        dy = tl.load(d_y + offsets, mask=v_mask, other=0.0)
        state = load_state(states, chunk_at, k_columns, v_columns, K, V)
        d_state = load_state(d_states, chunk_at, k_columns, v_columns, K, V)
        if TILES == 1:
            dv, share = value_gradient(
                values, dy, d_state, scores_t, late_tile, b, HAS_AUG, PRECISION
            )
            tl.store(d_v + offsets, dv.to(d_v.dtype.element_ty), mask=v_mask)
            dp += matmul(dy, tl.trans(values), PRECISION)
            db += share
        d_early += matmul(dy, tl.trans(state), PRECISION)
        d_late += matmul(values, tl.trans(d_state), PRECISION)
        edge += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)

    if TILES == 1:
        dp = tl.where(rows >= token[None, :], dp, 0.0).to(early.dtype.element_ty)
    else:
        score_tile = d_scores + token_at * C + (rows * (H * C) + token[None, :])
        dp = tl.load(score_tile, mask=rows < length, other=0.0)
        if HAS_AUG:
            db = tl.load(d_similarity + token_at + token * H, mask=token < length, other=0.0)
    # With one tile for the second time, rather than kept in registers through the loop.
    early_tile = tl.load(early + k_offsets, mask=mask, other=0.0)
    late_tile = tl.load(late + k_offsets, mask=mask, other=0.0)
    d_early += matmul(dp, late_tile, PRECISION)
    dk = matmul(tl.trans(dp), early_tile, PRECISION)
    late_float = beside(late_tile, dk)
    # `from_state` counts for the decays after its token: all of it, less that from t on.
    from_state = late_float * d_late
    edge += tl.sum(from_state, 0)
    dk += d_late
    dg = sums_along_time(beside(early_tile, dk) * d_early - late_float * dk, C, True, PRECISION)
    dg += edge[None, :]

    gate_tile = (
        gates + batch * gate_b + head * gate_h + first * gate_t
        + (rows * gate_t + k_columns[None, :] * gate_k)
    )  # fmt: skip
    logits = beside(tl.load(gate_tile, mask=mask, other=0.0), dk)
    total = tl.load(chunk_decays + chunk_at * K + k_columns, mask=k_known, other=0.0)
    g = tl.where(rows < length, log_decay(logits, inverse_tau, PRECISION), 0.0)
    # G_t - m, from the later log decays: the triangle of ones is the one that dg took.
    since = 0.5 * total[None, :] + g - sums_along_time(g, C, True, PRECISION)
    dq = d_early * (exp2(since, PRECISION) * scale)
    dk *= exp2(-since, PRECISION)
    k = key(g, PRECISION)
    if HAS_AUG:
        raw_q = tl.load(
            q + batch * q_b + head * q_h + first * q_t
            + (rows * q_t + k_columns[None, :] * q_k),
            mask=mask, other=0.0,
        )  # fmt: skip
        raw_q = beside(raw_q, dk)
        balance = tl.load(aug + head * K + k_columns, mask=k_known, other=0.0)
        balance = balance.to(tl.float32)[None, :]
        share = db[:, None]
        tl.store(d_aug + chunk_at * K + k_columns, tl.sum(share * raw_q * k, 0), mask=k_known)
        dq += share * balance * k
        dk += share * balance * raw_q
    d_logits = (dg - (1.0 - k) * dk) * sigmoid(-logits) * inverse_tau
    tl.store(d_q + k_offsets, dq.to(d_q.dtype.element_ty), mask=mask)
    tl.store(d_gates + k_offsets, d_logits.to(d_gates.dtype.element_ty), mask=mask)
