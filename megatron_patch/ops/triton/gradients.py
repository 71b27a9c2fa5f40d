"""The kernel for the gradients of q, gate logits, v and aug, given those of y and of the states."""

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
    """Grid: (chunks * H,); chunks flagged exact are left to `exact_gradients`.

    Each program reads its part of early, late and d_y before it writes d_q, d_gates and d_v, which
    may share their memory. d_aug [chunks, H, K] float32 are each chunk's share.

    The gradient of G_i, the running sum of log decays, is early_i d_early_i - late_i d_late_i, and
    that of a log decay g_t the sum of those over i >= t. The sum over pairs of tokens on one side
    of t cancels; it does so exactly, for both products use the same rounded operands.
    """
    unit, head = unit_and_head(H)
    sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    k_columns = tl.arange(0, BK)
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
    early_tile = tl.load(early + k_offsets, mask=mask, other=0.0)
    late_tile = tl.load(late + k_offsets, mask=mask, other=0.0)
    # Transposes are products of their own: cheaper than the way of a tile through shared memory.
    scores_t = matmul(late_tile, tl.trans(early_tile), PRECISION)
    scores_t = tl.where(rows <= token[None, :], scores_t, 0.0).to(early.dtype.element_ty)
    if HAS_AUG:
        weight = tl.load(similarity + token_at + token * H, mask=token < length, other=0.0)

    d_scores = tl.zeros([C, C], tl.float32)
    d_scores_t = tl.zeros([C, C], tl.float32)
    d_early = tl.zeros([C, BK], tl.float32)
    d_late = tl.zeros([C, BK], tl.float32)
    edge = tl.zeros([BK], tl.float32)
    d_similarity = tl.zeros([C], tl.float32)
    for v_tile in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        v_columns = v_tile * BV + tl.arange(0, BV)
        v_mask = (rows < length) & (v_columns < V)[None, :]
        values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=v_mask, other=0.0)
        offsets = rows * (H * V) + v_columns[None, :]
        dy = tl.load(d_y + offsets, mask=v_mask, other=0.0)
        state = load_state(states, chunk_at, k_columns, v_columns, K, V)
        d_state = load_state(d_states, chunk_at, k_columns, v_columns, K, V)
        dv = matmul(scores_t, dy, PRECISION)
        dv += matmul(late_tile, d_state, PRECISION)
        if HAS_AUG:
            values_float = beside(values, dv)
            s = sigmoid(weight[:, None] * values_float)
            d_s = beside(dy, dv) * s * (1 - s)
            d_similarity += tl.sum(d_s * values_float, 1)
            dv += weight[:, None] * d_s
        tl.store(d_v + offsets, dv.to(d_v.dtype.element_ty), mask=v_mask)
        d_scores += matmul(dy, tl.trans(values), PRECISION)
        d_scores_t += matmul(values, tl.trans(dy), PRECISION)
        d_early += matmul(dy, tl.trans(state), PRECISION)
        d_late += matmul(values, tl.trans(d_state), PRECISION)
        edge += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)

    d_scores = tl.where(rows >= token[None, :], d_scores, 0.0)
    d_scores_t = tl.where(rows <= token[None, :], d_scores_t, 0.0)
    d_early += matmul(d_scores, late_tile, PRECISION)
    dk = matmul(d_scores_t, early_tile, PRECISION)
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
    g = log_decay(logits, inverse_tau, PRECISION)
    total = tl.load(chunk_decays + chunk_at * K + k_columns, mask=k_known, other=0.0)
    since = sums_along_time(g, C, False, PRECISION) - 0.5 * total[None, :]
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
        share = d_similarity[:, None]
        tl.store(d_aug + chunk_at * K + k_columns, tl.sum(share * raw_q * k, 0), mask=k_known)
        dq += share * balance * k
        dk += share * balance * raw_q
    d_logits = (dg - (1.0 - k) * dk) * sigmoid(-logits) * inverse_tau
    tl.store(d_q + k_offsets, dq.to(d_q.dtype.element_ty), mask=mask)
    tl.store(d_gates + k_offsets, d_logits.to(d_gates.dtype.element_ty), mask=mask)
