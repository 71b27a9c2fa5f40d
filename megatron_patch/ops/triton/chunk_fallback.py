"""The fallback path: chunks whose decays are so strong that scores do not factor, token by token.

Only non-positive numbers are exponentiated and no sums are subtracted, as in the recurrence. In
these chunks qg = scale q 2^G and kg = k 2^(sum of the later log decays). They serve the state only,
with 1 in place of 2^m; `chunk_fwd_o` reads the scores from memory. The code goes through narrow
tiles of channels, because a rare path should cost neither registers nor compile time.
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.config import ChunkCall, head_stride, power_of_two
from megatron_patch.ops.triton.launch import launch
from megatron_patch.ops.triton.tiles import (
    key,
    load_aug_score,
    load_h,
    load_log_decay,
    load_v_and_dy,
    locate,
    matmul,
    offset_of,
    sigmoid,
)

NARROW = tl.constexpr(16)
PROGRAMS = 256  # in the grid of the backward kernel, of which a multiprocessor holds two


@triton.jit
def decay_to_end(gates, gate_t, rows, length, k_mask, inverse_tau, PRECISION: tl.constexpr):
    """Returns the log decay after each token to the end of the chunk, by summing the later tokens:
    a difference of large cumulative sums has no digits left. `gates` points to the tile."""
    later = load_log_decay(gates + gate_t, (rows + 1 < length) & k_mask, inverse_tau, PRECISION)
    return tl.cumsum(later, 0, reverse=True)


@triton.jit
def fallback_factors(
    q, gates, qg, kg, length, scale, inverse_tau, q_t, gate_t,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes qg and kg. All pointers are to the chunk's first row."""
    rows = tl.arange(0, C)[:, None]
    for k_tile in range(0, (K + NARROW - 1) // NARROW):
        columns = k_tile * NARROW + tl.arange(0, NARROW)
        k_mask = (columns < K)[None, :]
        mask = (rows < length) & k_mask
        gate_tile = gates + (rows * gate_t + columns[None, :])
        g = load_log_decay(gate_tile, mask, inverse_tau, PRECISION)
        raw_q = tl.load(q + (rows * q_t + columns[None, :]), mask=mask, other=0.0)
        offsets = rows * (H * K) + columns[None, :]
        factor = raw_q.to(tl.float32) * tl.exp2(tl.cumsum(g, 0)) * scale
        tl.store(qg + offsets, factor.to(qg.dtype.element_ty), mask=mask)
        until = decay_to_end(gate_tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
        factor = key(g, PRECISION) * tl.exp2(until)
        tl.store(kg + offsets, factor.to(kg.dtype.element_ty), mask=mask)


@triton.jit
def fallback_scores(
    q, gates, length, scale, inverse_tau, q_t, gate_t,
    K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the scores [C, C] in float32, zero above the diagonal. Pointers are to the chunk's
    first row."""
    token = tl.arange(0, C)
    rows = token[:, None]
    scores = tl.zeros([C, C], tl.float32)
    for k_tile in range(0, (K + NARROW - 1) // NARROW):
        columns = k_tile * NARROW + tl.arange(0, NARROW)
        k_known = columns < K
        mask = (rows < length) & k_known[None, :]
        gate_tile = gates + (rows * gate_t + columns[None, :])
        k = key(load_log_decay(gate_tile, mask, inverse_tau, PRECISION), PRECISION)
        between = tl.zeros([C, NARROW], tl.float32)  # log decay after token j up to token i
        for i in range(0, length):
            q_row = tl.load(q + i * q_t + columns, mask=k_known, other=0.0)
            g_row = load_log_decay(gates + i * gate_t + columns, k_known, inverse_tau, PRECISION)
            between = tl.where(rows < i, between + g_row[None, :], 0.0)
            score = tl.sum(k * tl.exp2(between) * q_row.to(tl.float32)[None, :], 1)
            score = tl.where(token <= i, score, 0.0)
            scores += tl.where(rows == i, score[None, :], 0.0)
    return scores * scale


@triton.jit
def fallback_chunk(
    inputs, d_y, prepared, d_scores, h, dh, gradients, length, head, chunk_at, token_at, scale,
    inverse_tau, q_t, gate_t, v_t,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes all gradients of one chunk and head. q, gates and v point to its first row; d_scores
    [C, C] is scratch memory."""
    q, gates, v, aug = inputs
    qg, kg, _, _, aug_score = prepared
    d_q, d_gates, d_v, d_aug = gradients
    token = tl.arange(0, C)
    rows = token[:, None]
    d_y += token_at * V
    d_v += token_at * D_V
    b = load_aug_score(aug_score, token_at, length, H, C, aug is not None)

    dp = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for v_tile in range(0, (V + BV - 1) // BV):
        values, dy = load_v_and_dy(v, d_y, v_tile, length, v_t, H, V, C, BV)[:2]
        dp += matmul(dy, tl.trans(values), PRECISION)
        if aug is not None:
            values = values.to(tl.float32)
            s = sigmoid(b[:, None] * values)
            db += tl.sum(dy.to(tl.float32) * s * (1 - s) * values, 1)
    dp = tl.where(rows >= token[None, :], dp, 0.0).to(d_scores.dtype.element_ty)
    tl.store(d_scores + (rows * C + token[None, :]), dp)
    tl.debug_barrier()

    for k_tile in range(0, (K + NARROW - 1) // NARROW):
        columns = k_tile * NARROW + tl.arange(0, NARROW)
        k_known = columns < K
        k_mask = k_known[None, :]
        mask = (rows < length) & k_mask
        d_qg = tl.zeros([C, NARROW], tl.float32)
        d_kg = tl.zeros([C, NARROW], tl.float32)
        dg = tl.zeros([NARROW], tl.float32)
        for v_tile in range(0, (V + BV - 1) // BV):
            values, dy, v_columns = load_v_and_dy(v, d_y, v_tile, length, v_t, H, V, C, BV)[:3]
            h_tile = load_h(h, chunk_at, columns, v_columns, K, V)
            dh_tile = load_h(dh, chunk_at, columns, v_columns, K, V)
            d_qg += matmul(dy, tl.trans(h_tile), PRECISION)
            d_kg += matmul(values, tl.trans(dh_tile), PRECISION)
            dg += tl.sum(h_tile.to(tl.float32) * dh_tile.to(tl.float32), 1)

        k_offsets = token_at * K + (rows * (H * K) + columns[None, :])
        qg_tile = tl.load(qg + k_offsets, mask=mask, other=0.0).to(tl.float32)
        kg_tile = tl.load(kg + k_offsets, mask=mask, other=0.0).to(tl.float32)
        gate_tile = gates + (rows * gate_t + columns[None, :])
        g = load_log_decay(gate_tile, mask, inverse_tau, PRECISION)
        k = key(g, PRECISION)
        until = decay_to_end(gate_tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
        from_state = kg_tile * d_kg
        dg = tl.zeros([C, NARROW], tl.float32) + (dg * tl.exp2(tl.sum(g, 0)))[None, :]
        dg += tl.cumsum(qg_tile * d_qg, 0, reverse=True)
        dg += tl.cumsum(from_state, 0) - from_state
        dq = tl.exp2(tl.cumsum(g, 0)) * d_qg  # without the scale
        dk = tl.exp2(until) * d_kg
        between = tl.zeros([C, NARROW], tl.float32)
        for i in range(0, length):
            q_row = tl.load(q + i * q_t + columns, mask=k_known, other=0.0)
            g_row = load_log_decay(gates + i * gate_t + columns, k_known, inverse_tau, PRECISION)
            between = tl.where(rows < i, between + g_row[None, :], 0.0)
            d_row = tl.load(d_scores + i * C + token, mask=token <= i, other=0.0)
            d_row = d_row.to(tl.float32)
            pair = tl.exp2(between) * d_row[:, None]
            dq += tl.where(rows == i, tl.sum(pair * k, 0)[None, :], 0.0)
            pair *= q_row.to(tl.float32)[None, :] * scale
            dk += pair
            # The score of (i, j) depends on the decays j + 1 .. i.
            pair = tl.where(rows < i, pair * k, 0.0)
            dg += tl.where(rows <= i, tl.cumsum(pair, 0) - pair, 0.0)
        dq *= scale
        if aug is not None:
            raw_q = tl.load(q + (rows * q_t + columns[None, :]), mask=mask, other=0.0)
            raw_q = raw_q.to(tl.float32)
            aug_weight = tl.load(aug + head * K + columns, mask=k_known, other=0.0).to(tl.float32)
            db_column = db[:, None]
            tl.store(d_aug + chunk_at * K + columns, tl.sum(db_column * raw_q * k, 0), mask=k_known)
            dq += db_column * aug_weight[None, :] * k
            dk += db_column * aug_weight[None, :] * raw_q
        logits = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
        d_logits = (dg - (1.0 - k) * dk) * sigmoid(-logits) * inverse_tau
        d_offsets = token_at * D_K + (rows * (H * D_K) + columns[None, :])
        tl.store(d_q + d_offsets, dq.to(d_q.dtype.element_ty), mask=mask)
        tl.store(d_gates + d_offsets, d_logits.to(d_gates.dtype.element_ty), mask=mask)

    # Rounded before the transpose: `tl.trans(weights).to(...)` gave a wrong dv on Hopper.
    weights = fallback_scores(
        q, gates, length, scale, inverse_tau, q_t, gate_t, K, C, PRECISION
    ).to(kg.dtype.element_ty)
    tl.debug_barrier()
    for v_tile in range(0, (V + BV - 1) // BV):
        v_columns = v_tile * BV + tl.arange(0, BV)
        v_mask = (rows < length) & (v_columns < V)[None, :]
        offsets = rows * (H * V) + v_columns[None, :]
        dy = tl.load(d_y + offsets, mask=v_mask, other=0.0)
        dv = matmul(tl.trans(weights), dy, PRECISION)
        for k_tile in range(0, (K + NARROW - 1) // NARROW):
            columns = k_tile * NARROW + tl.arange(0, NARROW)
            k_mask = (columns < K)[None, :]
            gate_tile = gates + (rows * gate_t + columns[None, :])
            # kg is computed again, because d_gates may have taken its memory.
            g = load_log_decay(gate_tile, (rows < length) & k_mask, inverse_tau, PRECISION)
            until = decay_to_end(gate_tile, gate_t, rows, length, k_mask, inverse_tau, PRECISION)
            kg_tile = (key(g, PRECISION) * tl.exp2(until)).to(kg.dtype.element_ty)
            dh_tile = load_h(dh, chunk_at, columns, v_columns, K, V)
            dv += matmul(kg_tile, dh_tile, PRECISION)
        if aug is not None:
            values = tl.load(v + (rows * v_t + v_columns[None, :]), mask=v_mask, other=0.0)
            s = sigmoid(b[:, None] * values.to(tl.float32))
            dv += b[:, None] * dy.to(tl.float32) * s * (1 - s)
        d_v_at = d_v + (rows * (H * D_V) + v_columns[None, :])
        tl.store(d_v_at, dv.to(d_v.dtype.element_ty), mask=v_mask)


@triton.jit(do_not_specialize=["T", "chunks", "count"])
def chunk_bwd_fallback_kernel(
    inputs, d_y, prepared, d_scores, h, dh, gradients, chunk_indices, cu_seqlens, T, chunks, count,
    scale, inverse_tau, q_strides, gate_strides, v_strides,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the fallback chunks among `count` chunks and heads.

    These are rare, so the grid is any number of programs that stride over all of them, each with
    its own scratch memory d_scores [C, C]. Tuples are those of `chunk_bwd_kernel`.
    """
    q, gates, v, aug = inputs
    fallback = prepared[3]
    program, programs = tl.program_id(0), tl.num_programs(0)
    for step in range(0, tl.cdiv(count - program, programs)):
        place = program + step * programs
        chunk, head = place // H, (place % H).to(tl.int64)
        sequence, _, batch, first, end = locate(chunk, chunks, chunk_indices, cu_seqlens, T, C)
        chunk_at = chunk.to(tl.int64) * H + head
        is_fallback = 0
        if sequence >= 0:
            is_fallback = tl.load(fallback + chunk_at)
        if is_fallback != 0:
            fallback_chunk(
                (
                    q + offset_of(batch, first, head, q_strides),
                    gates + offset_of(batch, first, head, gate_strides),
                    v + offset_of(batch, first, head, v_strides),
                    aug,
                ),
                d_y, prepared, d_scores + program * (C * C), h, dh, gradients,
                tl.minimum(end - first, C).to(tl.int32), head, chunk_at,
                (batch * T + first) * H + head, scale, inverse_tau,
                q_strides[1], gate_strides[1], v_strides[1], H, K, V, D_K, D_V, C, BV, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()  # before the next chunk's d_scores


def chunk_bwd_fallback(call: ChunkCall, d_y, prepared, h, dh, gradients) -> None:
    """Writes the gradients of the fallback chunks; see `chunk_bwd`."""
    chunk, programs = call.config.chunk, min(call.grid[0], PROGRAMS)
    d_scores = call.new(programs, chunk, chunk, dtype=call.dtype)
    strides = call.q_strides, call.gate_strides, call.v_strides
    launch(
        chunk_bwd_fallback_kernel, (programs,),
        (call.inputs, d_y, prepared, d_scores, h, dh, gradients, *call.chunk_tensors),
        (*call.chunk_numbers, call.grid[0], *call.scales, *strides),
        H=call.heads, K=call.k, V=call.width, D_K=head_stride(gradients[0]),
        D_V=head_stride(gradients[2]), C=chunk, BV=min(32, power_of_two(call.width)),
        PRECISION=call.config.precision, num_warps=4,
    )  # fmt: skip
