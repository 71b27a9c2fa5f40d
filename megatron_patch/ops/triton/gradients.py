"""The kernels per chunk for the gradients of v, and of q, gate logits and aug, given that of y."""

import triton
import triton.language as tl

from megatron_patch.ops.triton.states import entering_state
from megatron_patch.ops.triton.tiles import (
    decays,
    exact_score_gradients,
    exact_scores,
    key,
    locate,
    matmul,
    sigmoid,
    sums_to_end,
    until_end,
)


@triton.jit(do_not_specialize=["T", "chunks", "segments"])
def value_gradients(
    q,
    gates,
    v,
    d_y,
    early,
    late,
    exact,
    similarity,
    d_states,
    d_since,
    leaving,
    d_v,
    d_similarity,
    table,
    bounds,
    T,
    chunks,
    segments,
    chunks_per_segment,
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
    D_FIX: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of v and of the similarity q . (aug * k), [B, T, H] float32. Grid: (chunks, H)."""
    unit = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, index, link, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    if sequence < 0:
        return
    chunk_at = unit.to(tl.int64) * H + head
    segment = link
    if not PACKED:
        segment = sequence * segments + index // chunks_per_segment
    segment_at = segment * H + head
    length = tl.minimum(end - first, C).to(tl.int32)
    token_at = (batch * T + first) * H + head
    token = tl.arange(0, C)
    rows = token[:, None]
    tile = token_at * K + rows * (H * K)
    if tl.load(exact + chunk_at) != 0:
        scores = exact_scores(
            q + batch * q_b + head * q_h + first * q_t,
            gates + batch * gate_b + head * gate_h + first * gate_t,
            q_t,
            gate_t,
            q_k,
            gate_k,
            length,
            inverse_tau,
            K,
            C,
            PRECISION,
        )
    else:
        scores = tl.zeros([C, C], tl.float32)
        for score_tile in tl.static_range((K + BK - 1) // BK):
            score_columns = score_tile * BK + tl.arange(0, BK)[None, :]
            score_mask = (rows < length) & (score_columns < K)
            q_factor = tl.load(early + tile + score_columns, mask=score_mask, other=0.0)
            k_factor = tl.load(late + tile + score_columns, mask=score_mask, other=0.0)
            scores += matmul(q_factor, tl.trans(k_factor), PRECISION)
    scores = tl.where(rows >= token[None, :], scores, 0.0) * scale
    columns = tl.arange(0, BV)
    mask = (rows < length) & (columns < V)[None, :]
    offsets = token_at * V + (rows * (H * V) + columns[None, :])
    dy = tl.load(d_y + offsets, mask=mask, other=0.0)
    dv = matmul(tl.trans(scores), dy, PRECISION)
    for k_tile in tl.static_range((K + BK - 1) // BK):
        k_columns = k_tile * BK + tl.arange(0, BK)
        d_state = entering_state(
            d_states, d_since, leaving, chunk_at, segment_at, k_columns, columns, K, V, D_FIX
        )
        k_mask = (rows < length) & (k_columns < K)[None, :]
        late_tile = tl.load(late + tile + k_columns[None, :], mask=k_mask, other=0.0)
        dv += matmul(late_tile, d_state, PRECISION)
    if HAS_AUG:
        weight = tl.load(similarity + token_at + token * H, mask=token < length, other=0.0)
        values = tl.load(
            v + batch * v_b + head * v_h + first * v_t + (rows * v_t + columns[None, :] * v_v),
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        s = sigmoid(weight[:, None] * values)
        d_s = dy.to(tl.float32) * s * (1 - s)
        tl.store(d_similarity + token_at + token * H, tl.sum(d_s * values, 1), mask=token < length)
        dv += weight[:, None] * d_s
    tl.store(d_v + offsets, dv.to(d_v.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunks", "segments"])
def key_gradients(
    q,
    gates,
    v,
    aug,
    d_y,
    early,
    late,
    exact,
    d_similarity,
    states,
    since,
    entering,
    d_states,
    d_since,
    leaving,
    d_q,
    d_gates,
    d_aug,
    table,
    bounds,
    T,
    chunks,
    segments,
    chunks_per_segment,
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
    FIX: tl.constexpr,
    D_FIX: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid: (K tiles, chunks, H). d_aug [chunks, H, K] float32 are each chunk's share.

    EXACT: whether this launch serves the chunks flagged exact, or all others; apart, so that the
    rare path takes no registers from the usual one. d_q may share its memory with early, d_gates
    with late: each program reads its part before it writes it.

    The gradient of G_i, the running sum of log decays, is early_i d_early_i - late_i d_late_i, and
    that of a log decay g_t the sum of those over i >= t. The sum over pairs of tokens on one side
    of t cancels; it does so exactly, for both products use the same rounded operands.
    """
    unit = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    sequence, index, link, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    k_columns = tl.program_id(0) * BK + tl.arange(0, BK)
    chunk_at = unit.to(tl.int64) * H + head
    if sequence < 0:
        if HAS_AUG and not EXACT:
            tl.store(
                d_aug + chunk_at * K + k_columns, tl.zeros([BK], tl.float32), mask=k_columns < K
            )
        return
    if (tl.load(exact + chunk_at) != 0) != EXACT:
        return
    segment = link
    if not PACKED:
        segment = sequence * segments + index // chunks_per_segment
    segment_at = segment * H + head
    length = tl.minimum(end - first, C).to(tl.int32)
    q += batch * q_b + head * q_h + first * q_t
    gates += batch * gate_b + head * gate_h + first * gate_t
    v += batch * v_b + head * v_h + first * v_t
    token_at = (batch * T + first) * H + head
    token = tl.arange(0, C)
    rows = token[:, None]

    d_scores = tl.zeros([C, C], tl.float32)
    d_early = tl.zeros([C, BK], tl.float32)
    d_late = tl.zeros([C, BK], tl.float32)
    edge = tl.zeros([BK], tl.float32)
    # Unrolled: a loop of products in flight is where Triton was seen to miscompile on Hopper.
    for v_tile in tl.static_range((V + BV - 1) // BV):
        v_columns = v_tile * BV + tl.arange(0, BV)
        mask = (rows < length) & (v_columns < V)[None, :]
        values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=mask, other=0.0)
        offsets = token_at * V + (rows * (H * V) + v_columns[None, :])
        dy = tl.load(d_y + offsets, mask=mask, other=0.0)
        state = entering_state(
            states, since, entering, chunk_at, segment_at, k_columns, v_columns, K, V, FIX
        )
        d_state = entering_state(
            d_states, d_since, leaving, chunk_at, segment_at, k_columns, v_columns, K, V, D_FIX
        )
        edge += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        d_scores += matmul(dy, tl.trans(values), PRECISION)
        d_early += matmul(dy, tl.trans(state), PRECISION)
        d_late += matmul(values, tl.trans(d_state), PRECISION)

    d_early *= scale
    d_scores = tl.where(rows >= token[None, :], d_scores, 0.0) * scale
    k_mask = (k_columns < K)[None, :]
    mask = (rows < length) & k_mask
    k_offsets = token_at * K + (rows * (H * K) + k_columns[None, :])
    early_tile = tl.load(early + k_offsets, mask=mask, other=0.0)
    late_tile = tl.load(late + k_offsets, mask=mask, other=0.0)
    gate_tile = gates + (rows * gate_t + k_columns[None, :] * gate_k)
    g = decays(gate_tile, mask, inverse_tau, PRECISION)
    k = key(g, PRECISION)
    late_float = late_tile.to(tl.float32)
    from_state = late_float * d_late
    if EXACT:
        dq, dk, dg = exact_score_gradients(
            d_scores,
            k,
            q,
            gates,
            q_t,
            gate_t,
            q_k,
            gate_k,
            k_columns,
            length,
            inverse_tau,
            K,
            C,
            BK,
            PRECISION,
        )
        until = until_end(gate_tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
        dg += tl.cumsum(early_tile.to(tl.float32) * d_early, 0, reverse=True)
        dg += tl.cumsum(from_state, 0) - from_state
        dq += tl.exp2(tl.cumsum(g, 0)) * d_early
        dk += tl.exp2(until) * d_late
        edge *= tl.exp2(tl.sum(g, 0))
    else:
        dk = matmul(tl.trans(d_scores), early_tile, PRECISION)
        d_early += matmul(d_scores, late_tile, PRECISION)
        # `from_state` counts for the decays after its token: all of it, less that from t on.
        edge += tl.sum(from_state, 0)
        dg = sums_to_end(
            early_tile.to(tl.float32) * d_early - late_float * dk - from_state, PRECISION
        )
        since_middle = tl.cumsum(g, 0) - 0.5 * tl.sum(g, 0)[None, :]
        dq = d_early * tl.exp2(since_middle)
        dk = (dk + d_late) * tl.exp2(-since_middle)
    dg += edge[None, :]
    if HAS_AUG:
        raw_q = tl.load(q + (rows * q_t + k_columns[None, :] * q_k), mask=mask, other=0.0)
        raw_q = raw_q.to(tl.float32)
        weight = tl.load(d_similarity + token_at + token * H, mask=token < length, other=0.0)
        weight = weight[:, None]
        balance = tl.load(aug + head * K + k_columns, mask=k_columns < K, other=0.0)
        balance = balance.to(tl.float32)[None, :]
        tl.store(
            d_aug + chunk_at * K + k_columns, tl.sum(weight * raw_q * k, 0), mask=k_columns < K
        )
        dq += weight * balance * k
        dk += weight * balance * raw_q
    logits = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
    d_logits = (dg - (1.0 - k) * dk) * sigmoid(-logits) * inverse_tau
    tl.store(d_q + k_offsets, dq.to(d_q.dtype.element_ty), mask=mask)
    tl.store(d_gates + k_offsets, d_logits.to(d_gates.dtype.element_ty), mask=mask)
