"""Chunks in which decays are so strong that scores do not factor: computed token by token.

Only non-positive numbers are exponentiated and sums are never subtracted, as in the recurrence. In
these chunks early = scale q 2^G and late = k 2^(sum of the later log decays), which serve the
states alone, with 1 in place of 2^m; `output` finds their scores in memory. By narrow tiles of
channels: what is rare shall cost neither registers nor time to compile.
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.states import load_state
from megatron_patch.ops.triton.tiles import decays, key, locate, matmul, sigmoid

NARROW = tl.constexpr(16)


@triton.jit
def until_end(gates, stride, rows, length, k_mask, inverse_tau, PRECISION: tl.constexpr):
    """Log decay after each token to the chunk's end, by summing the later tokens themselves: a
    difference of large sums has no digits left. `gates` point to the tile, rows `stride` apart."""
    later = decays(gates + stride, (rows + 1 < length) & k_mask, inverse_tau, PRECISION)
    return tl.cumsum(later, 0, reverse=True)


@triton.jit
def exact_factors(
    q,
    gates,
    early,
    late,
    length,
    scale,
    inverse_tau,
    q_t,
    q_k,
    gate_t,
    gate_k,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes early and late. All pointers are to the chunk's first row."""
    rows = tl.arange(0, C)[:, None]
    for narrow in range(0, (K + NARROW - 1) // NARROW):
        columns = narrow * NARROW + tl.arange(0, NARROW)
        k_mask = (columns < K)[None, :]
        mask = (rows < length) & k_mask
        tile = gates + (rows * gate_t + columns[None, :] * gate_k)
        g = decays(tile, mask, inverse_tau, PRECISION)
        raw_q = tl.load(q + (rows * q_t + columns[None, :] * q_k), mask=mask, other=0.0)
        offsets = rows * (H * K) + columns[None, :]
        factor = raw_q.to(tl.float32) * tl.exp2(tl.cumsum(g, 0)) * scale
        tl.store(early + offsets, factor.to(early.dtype.element_ty), mask=mask)
        until = until_end(tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
        factor = key(g, PRECISION) * tl.exp2(until)
        tl.store(late + offsets, factor.to(late.dtype.element_ty), mask=mask)


@triton.jit
def exact_scores(
    q,
    gates,
    length,
    scale,
    inverse_tau,
    q_t,
    q_k,
    gate_t,
    gate_k,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [C, C] float32: zeros above the diagonal. Pointers are to the chunk's first row."""
    token = tl.arange(0, C)
    rows = token[:, None]
    scores = tl.zeros([C, C], tl.float32)
    for narrow in range(0, (K + NARROW - 1) // NARROW):
        columns = narrow * NARROW + tl.arange(0, NARROW)
        k_known = columns < K
        mask = (rows < length) & k_known[None, :]
        tile = gates + (rows * gate_t + columns[None, :] * gate_k)
        k = key(decays(tile, mask, inverse_tau, PRECISION), PRECISION)
        between = tl.zeros([C, NARROW], tl.float32)  # log decay after token j up to token i
        for i in range(0, length):
            q_row = tl.load(q + i * q_t + columns * q_k, mask=k_known, other=0.0)
            g_row = decays(gates + i * gate_t + columns * gate_k, k_known, inverse_tau, PRECISION)
            between = tl.where(rows < i, between + g_row[None, :], 0.0)
            score = tl.sum(k * tl.exp2(between) * q_row.to(tl.float32)[None, :], 1)
            score = tl.where(token <= i, score, 0.0)
            scores += tl.where(rows == i, score[None, :], 0.0)
    return scores * scale


@triton.jit
def exact_chunk(
    q,
    gates,
    v,
    aug,
    d_y,
    early,
    late,
    similarity,
    d_scores,
    states,
    d_states,
    d_q,
    d_gates,
    d_v,
    d_aug,
    length,
    head,
    chunk_at,
    token_at,
    scale,
    inverse_tau,
    q_t,
    q_k,
    gate_t,
    gate_k,
    v_t,
    v_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    HAS_AUG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All that `value_gradients` and `gradients` do, for one chunk and head. q, gates and v point
    to its first row, d_scores [C, C] to memory that is written to be read again."""
    token = tl.arange(0, C)
    rows = token[:, None]
    d_y += token_at * V
    d_v += token_at * V
    if HAS_AUG:
        weight = tl.load(similarity + token_at + token * H, mask=token < length, other=0.0)

    dp = tl.zeros([C, C], tl.float32)
    d_similarity = tl.zeros([C], tl.float32)
    for v_tile in range(0, (V + BV - 1) // BV):
        v_columns = v_tile * BV + tl.arange(0, BV)
        v_mask = (rows < length) & (v_columns < V)[None, :]
        values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=v_mask, other=0.0)
        dy = tl.load(d_y + (rows * (H * V) + v_columns[None, :]), mask=v_mask, other=0.0)
        dp += matmul(dy, tl.trans(values), PRECISION)
        if HAS_AUG:
            values = values.to(tl.float32)
            s = sigmoid(weight[:, None] * values)
            d_similarity += tl.sum(dy.to(tl.float32) * s * (1 - s) * values, 1)
    dp = tl.where(rows >= token[None, :], dp, 0.0).to(d_scores.dtype.element_ty)
    tl.store(d_scores + (rows * C + token[None, :]), dp)
    tl.debug_barrier()

    for narrow in range(0, (K + NARROW - 1) // NARROW):
        columns = narrow * NARROW + tl.arange(0, NARROW)
        k_known = columns < K
        k_mask = k_known[None, :]
        mask = (rows < length) & k_mask
        d_early = tl.zeros([C, NARROW], tl.float32)
        d_late = tl.zeros([C, NARROW], tl.float32)
        dg = tl.zeros([NARROW], tl.float32)
        for v_tile in range(0, (V + BV - 1) // BV):
            v_columns = v_tile * BV + tl.arange(0, BV)
            v_mask = (rows < length) & (v_columns < V)[None, :]
            values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=v_mask, other=0.0)
            dy = tl.load(d_y + (rows * (H * V) + v_columns[None, :]), mask=v_mask, other=0.0)
            state = load_state(states, chunk_at, columns, v_columns, K, V)
            d_state = load_state(d_states, chunk_at, columns, v_columns, K, V)
            d_early += matmul(dy, tl.trans(state), PRECISION)
            d_late += matmul(values, tl.trans(d_state), PRECISION)
            dg += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)

        k_offsets = token_at * K + (rows * (H * K) + columns[None, :])
        early_tile = tl.load(early + k_offsets, mask=mask, other=0.0).to(tl.float32)
        late_tile = tl.load(late + k_offsets, mask=mask, other=0.0).to(tl.float32)
        tile = gates + (rows * gate_t + columns[None, :] * gate_k)
        g = decays(tile, mask, inverse_tau, PRECISION)
        k = key(g, PRECISION)
        until = until_end(tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
        from_state = late_tile * d_late
        dg = tl.zeros([C, NARROW], tl.float32) + (dg * tl.exp2(tl.sum(g, 0)))[None, :]
        dg += tl.cumsum(early_tile * d_early, 0, reverse=True)
        dg += tl.cumsum(from_state, 0) - from_state
        dq = tl.exp2(tl.cumsum(g, 0)) * d_early  # without the scale
        dk = tl.exp2(until) * d_late
        between = tl.zeros([C, NARROW], tl.float32)
        for i in range(0, length):
            q_row = tl.load(q + i * q_t + columns * q_k, mask=k_known, other=0.0)
            g_row = decays(gates + i * gate_t + columns * gate_k, k_known, inverse_tau, PRECISION)
            between = tl.where(rows < i, between + g_row[None, :], 0.0)
            d_row = tl.load(d_scores + i * C + token, mask=token <= i, other=0.0)
            d_row = d_row.to(tl.float32)
            pair = tl.exp2(between) * d_row[:, None]
            dq += tl.where(rows == i, tl.sum(pair * k, 0)[None, :], 0.0)
            pair *= q_row.to(tl.float32)[None, :] * scale
            dk += pair
            # The pair (i, j) depends on the decays j + 1 .. i.
            pair = tl.where(rows < i, pair * k, 0.0)
            dg += tl.where(rows <= i, tl.cumsum(pair, 0) - pair, 0.0)
        dq *= scale
        if HAS_AUG:
            raw_q = tl.load(q + (rows * q_t + columns[None, :] * q_k), mask=mask, other=0.0)
            raw_q = raw_q.to(tl.float32)
            balance = tl.load(aug + head * K + columns, mask=k_known, other=0.0).to(tl.float32)
            share = d_similarity[:, None]
            tl.store(d_aug + chunk_at * K + columns, tl.sum(share * raw_q * k, 0), mask=k_known)
            dq += share * balance[None, :] * k
            dk += share * balance[None, :] * raw_q
        logits = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        d_logits = (dg - (1.0 - k) * dk) * sigmoid(-logits) * inverse_tau
        tl.store(d_q + k_offsets, dq.to(d_q.dtype.element_ty), mask=mask)
        tl.store(d_gates + k_offsets, d_logits.to(d_gates.dtype.element_ty), mask=mask)

    # Rounded before it is transposed: `tl.trans(weights).to(...)` gave a wrong d v on Hopper.
    weights = exact_scores(
        q, gates, length, scale, inverse_tau, q_t, q_k, gate_t, gate_k, K, C, PRECISION
    ).to(late.dtype.element_ty)
    tl.debug_barrier()
    for v_tile in range(0, (V + BV - 1) // BV):
        v_columns = v_tile * BV + tl.arange(0, BV)
        v_mask = (rows < length) & (v_columns < V)[None, :]
        offsets = rows * (H * V) + v_columns[None, :]
        dy = tl.load(d_y + offsets, mask=v_mask, other=0.0)
        dv = matmul(tl.trans(weights), dy, PRECISION)
        for narrow in range(0, (K + NARROW - 1) // NARROW):
            columns = narrow * NARROW + tl.arange(0, NARROW)
            k_mask = (columns < K)[None, :]
            tile = gates + (rows * gate_t + columns[None, :] * gate_k)
            # Once more, for d_gates may have taken its memory.
            g = decays(tile, (rows < length) & k_mask, inverse_tau, PRECISION)
            until = until_end(tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
            late_tile = (key(g, PRECISION) * tl.exp2(until)).to(late.dtype.element_ty)
            d_state = load_state(d_states, chunk_at, columns, v_columns, K, V)
            dv += matmul(late_tile, d_state, PRECISION)
        if HAS_AUG:
            values = tl.load(v + (rows * v_t + v_columns[None, :] * v_v), mask=v_mask, other=0.0)
            s = sigmoid(weight[:, None] * values.to(tl.float32))
            dv += weight[:, None] * dy.to(tl.float32) * s * (1 - s)
        tl.store(d_v + offsets, dv.to(d_v.dtype.element_ty), mask=v_mask)


@triton.jit(do_not_specialize=["T", "chunks", "count"])
def exact_gradients(
    q,
    gates,
    v,
    aug,
    d_y,
    early,
    late,
    exact,
    similarity,
    d_scores,
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
    count,
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
    BV: tl.constexpr,
    HAS_AUG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of chunks flagged exact, of `count` chunks and heads. Grid: any number of
    programs, each with memory d_scores [C, C] of its own: these chunks are rare."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for turn in range(0, tl.cdiv(count - program, programs)):
        place = program + turn * programs
        unit, head = place // H, (place % H).to(tl.int64)
        sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
        chunk_at = unit.to(tl.int64) * H + head
        is_exact = 0
        if sequence >= 0:
            is_exact = tl.load(exact + chunk_at)
        if is_exact != 0:
            exact_chunk(
                q + batch * q_b + head * q_h + first * q_t,
                gates + batch * gate_b + head * gate_h + first * gate_t,
                v + batch * v_b + head * v_h + first * v_t,
                aug, d_y, early, late, similarity, d_scores + program * (C * C),
                states, d_states, d_q, d_gates, d_v, d_aug,
                tl.minimum(end - first, C).to(tl.int32), head, chunk_at,
                (batch * T + first) * H + head, scale, inverse_tau,
                q_t, q_k, gate_t, gate_k, v_t, v_v, H, K, V, C, BV, HAS_AUG, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()  # before the next chunk's d_scores
