"""Chunked gated linear attention, backward: the gradients of q, gate logits, v and aug from
those of y and of the states.

With qg and kg as `chunk_prepare` writes them, the scores P = qg kg^T (j <= i), the states h before
a chunk and dh after it (`chunk_h.py`), and each token's b = aug_score = q (aug * k):

    y = P v + qg h + s               with s = sigmoid(b v)
    dv = P^T dy + kg dh + b ds       with ds = dy s (1 - s)
    db = sum over V of ds v
    dP = dy v^T                      (j <= i)
    d qg = dy h^T + dP kg
    d kg = v dh^T + dP^T qg

dq, dk and the gradients of decays follow channel by channel. dv and dP need all channels of K, the
others only their own. For heads of one tile of K, `chunk_bwd_kernel` computes everything. Wider
heads would not fit in registers: there `chunk_bwd_dv_kernel` computes dv, db and dP first, and each
program of `chunk_bwd_kernel` the rest for its tile of K.
"""

import torch
import triton
import triton.language as tl

from megatron_patch.ops.triton.config import ChunkCall, head_stride, power_of_two
from megatron_patch.ops.triton.launch import cdiv, launch
from megatron_patch.ops.triton.tiles import (
    chunk_and_head,
    chunk_rows,
    convert_layout_like,
    cumsum_over_tokens,
    exp2,
    key,
    load_aug_score,
    load_h,
    load_v_and_dy,
    locate,
    log_decay,
    matmul,
    offset_of,
    sigmoid,
)


@triton.jit
def transposed_scores(qg, kg, offsets, mask, C: tl.constexpr, PRECISION: tl.constexpr):
    """Returns P^T as an operand, and the tile of kg. A second product is cheaper than transposing P
    through shared memory."""
    token = tl.arange(0, C)
    qg_tile = tl.load(qg + offsets, mask=mask, other=0.0)
    kg_tile = tl.load(kg + offsets, mask=mask, other=0.0)
    scores_t = matmul(kg_tile, tl.trans(qg_tile), PRECISION)
    return tl.where(token[:, None] <= token[None, :], scores_t, 0.0).to(kg_tile.dtype), kg_tile


@triton.jit
def write_dv(
    d_v, mask, values, dy, dh_tile, scores_t, kg_tile, b,
    HAS_AUG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dv of a tile of V to the pointers d_v. Returns what the tile adds to dP and db."""
    dv = matmul(scores_t, dy, PRECISION)
    dv += matmul(kg_tile, dh_tile, PRECISION)
    db = tl.zeros_like(b)
    if HAS_AUG:
        x = convert_layout_like(values, dv)
        s = sigmoid(b[:, None] * x)
        d_s = convert_layout_like(dy, dv) * s * (1 - s)
        db = tl.sum(d_s * x, 1)
        dv += b[:, None] * d_s
    tl.store(d_v, dv.to(d_v.dtype.element_ty), mask=mask)
    return matmul(dy, tl.trans(values), PRECISION), db


@triton.jit(do_not_specialize=["T", "chunks"])
def chunk_bwd_dv_kernel(
    v, d_y, prepared, d_v, d_scores, d_aug_score, dh, chunk_indices, cu_seqlens, T, chunks,
    v_strides,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D_V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, HAS_AUG: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes d_v, d_scores [B, T, H, C] and d_aug_score [B, T, H], except in fallback chunks.
    d_aug_score may share memory with aug_score. Heads of d_v lie D_V entries apart.
    Grid: (chunks * H,)."""
    qg, kg, _, fallback, aug_score = prepared
    chunk, head = chunk_and_head(H)
    sequence, _, batch, first, end = locate(chunk, chunks, chunk_indices, cu_seqlens, T, C)
    if sequence < 0:
        return
    chunk_at = chunk.to(tl.int64) * H + head
    if tl.load(fallback + chunk_at) != 0:
        return
    length, token_at, token, rows = chunk_rows(batch, first, end, head, T, H, C)
    v += offset_of(batch, first, head, v_strides)
    d_y += token_at * V
    d_v += token_at * D_V
    k_columns = tl.arange(0, BK)
    mask = (rows < length) & (k_columns < K)[None, :]
    k_offsets = token_at * K + (rows * (H * K) + k_columns[None, :])
    scores_t, kg_tile = transposed_scores(qg, kg, k_offsets, mask, C, PRECISION)
    b = load_aug_score(aug_score, token_at, length, H, C, HAS_AUG)

    dp = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for v_tile in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        values, dy, v_columns, v_mask = load_v_and_dy(
            v, d_y, v_tile, length, v_strides[1], H, V, C, BV
        )
        dh_tile = load_h(dh, chunk_at, k_columns, v_columns, K, V)
        dp_tile, db_tile = write_dv(
            d_v + (rows * (H * D_V) + v_columns[None, :]), v_mask, values, dy, dh_tile, scores_t,
            kg_tile, b, HAS_AUG, PRECISION,
        )  # fmt: skip
        dp += dp_tile
        db += db_tile

    dp = tl.where(rows >= token[None, :], dp, 0.0).to(d_scores.dtype.element_ty)
    tl.store(d_scores + token_at * C + (rows * (H * C) + token[None, :]), dp, mask=rows < length)
    if HAS_AUG:
        tl.store(d_aug_score + token_at + token * H, db, mask=token < length)


@triton.jit(do_not_specialize=["T", "chunks"])
def chunk_bwd_kernel(
    inputs, d_y, prepared, dv_results, h, dh, gradients, chunk_indices, cu_seqlens, T, chunks,
    scale, inverse_tau, q_strides, gate_strides, v_strides,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Writes all gradients, except in fallback chunks. Grid: (chunks * H * tiles of K,).

    inputs: (q, gate logits, v, aug or `None`).
    dv_results: (d_scores, d_aug_score) from `chunk_bwd_dv_kernel`, which has also written d_v; used
        where K has several tiles.
    gradients: (d_q, d_gates, d_v, d_aug). d_q, d_gates and d_v may share memory with qg, kg and
        d_y, because a program reads its part of those first. d_aug [chunks, H, K] float32 are the
        partial sums of each chunk. Heads of d_q and d_gates lie D_K entries apart, those of d_v
        D_V.

    The gradient of G_i, the running sum of log decays, is qg_i d_qg_i - kg_i d_kg_i, and that of a
    log decay g_t is the sum of those over i >= t. Pairs of tokens on the same side of t cancel, and
    cancel exactly, because both products use the same rounded operands.
    """
    q, gates, v, aug = inputs
    qg, kg, g_last, fallback, aug_score = prepared
    d_scores, d_aug_score = dv_results
    d_q, d_gates, d_v, d_aug = gradients
    HAS_AUG: tl.constexpr = aug is not None
    TILES: tl.constexpr = (K + BK - 1) // BK
    chunk, head = chunk_and_head(H, TILES)
    sequence, _, batch, first, end = locate(chunk, chunks, chunk_indices, cu_seqlens, T, C)
    k_columns = (tl.program_id(0) % TILES) * BK + tl.arange(0, BK)
    k_known = k_columns < K
    chunk_at = chunk.to(tl.int64) * H + head
    if sequence < 0:
        if HAS_AUG:
            tl.store(d_aug + chunk_at * K + k_columns, tl.zeros([BK], tl.float32), mask=k_known)
        return
    if tl.load(fallback + chunk_at) != 0:
        return
    length, token_at, token, rows = chunk_rows(batch, first, end, head, T, H, C)
    v += offset_of(batch, first, head, v_strides)
    d_y += token_at * V
    d_v += token_at * D_V
    mask = (rows < length) & k_known[None, :]
    k_offsets = token_at * K + (rows * (H * K) + k_columns[None, :])
    if TILES == 1:
        scores_t, kg_tile = transposed_scores(qg, kg, k_offsets, mask, C, PRECISION)
        b = load_aug_score(aug_score, token_at, length, H, C, HAS_AUG)
        dp = tl.zeros([C, C], tl.float32)
        db = tl.zeros([C], tl.float32)

    d_qg = tl.zeros([C, BK], tl.float32)
    d_kg = tl.zeros([C, BK], tl.float32)
    edge = tl.zeros([BK], tl.float32)
    for v_tile in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        values, dy, v_columns, v_mask = load_v_and_dy(
            v, d_y, v_tile, length, v_strides[1], H, V, C, BV
        )
        h_tile = load_h(h, chunk_at, k_columns, v_columns, K, V)
        dh_tile = load_h(dh, chunk_at, k_columns, v_columns, K, V)
        if TILES == 1:
            dp_tile, db_tile = write_dv(
                d_v + (rows * (H * D_V) + v_columns[None, :]), v_mask, values, dy, dh_tile,
                scores_t, kg_tile, b, HAS_AUG, PRECISION,
            )  # fmt: skip
            dp += dp_tile
            db += db_tile
        d_qg += matmul(dy, tl.trans(h_tile), PRECISION)
        d_kg += matmul(values, tl.trans(dh_tile), PRECISION)
        edge += tl.sum(h_tile.to(tl.float32) * dh_tile.to(tl.float32), 1)

    if TILES == 1:
        dp = tl.where(rows >= token[None, :], dp, 0.0).to(qg.dtype.element_ty)
    else:
        dp_at = d_scores + token_at * C + (rows * (H * C) + token[None, :])
        dp = tl.load(dp_at, mask=rows < length, other=0.0)
        if HAS_AUG:
            db = tl.load(d_aug_score + token_at + token * H, mask=token < length, other=0.0)
    # With one tile, these are loaded a second time rather than kept in registers over the loop.
    qg_tile = tl.load(qg + k_offsets, mask=mask, other=0.0)
    kg_tile = tl.load(kg + k_offsets, mask=mask, other=0.0)
    d_qg += matmul(dp, kg_tile, PRECISION)
    dk = matmul(tl.trans(dp), qg_tile, PRECISION)
    kg_float = convert_layout_like(kg_tile, dk)
    # A token's part of the state is decayed by the log decays after it. `edge` holds the sum over
    # all tokens; the reverse cumulative sum below removes those from t on.
    from_state = kg_float * d_kg
    edge += tl.sum(from_state, 0)
    dk += d_kg
    d_cumsum = convert_layout_like(qg_tile, dk) * d_qg - kg_float * dk
    dg = cumsum_over_tokens(d_cumsum, C, True, PRECISION)
    dg += edge[None, :]

    gates += offset_of(batch, first, head, gate_strides)
    gate_tile = gates + (rows * gate_strides[1] + k_columns[None, :])
    logits = convert_layout_like(tl.load(gate_tile, mask=mask, other=0.0), dk)
    total = tl.load(g_last + chunk_at * K + k_columns, mask=k_known, other=0.0)
    g = tl.where(rows < length, log_decay(logits, inverse_tau, PRECISION), 0.0)
    # G_t - m from the sum of the later log decays, which reuses the triangle of ones of dg.
    since = 0.5 * total[None, :] + g - cumsum_over_tokens(g, C, True, PRECISION)
    dq = d_qg * (exp2(since, PRECISION) * scale)
    dk *= exp2(-since, PRECISION)
    k = key(g, PRECISION)
    if HAS_AUG:
        q += offset_of(batch, first, head, q_strides)
        raw_q = tl.load(q + (rows * q_strides[1] + k_columns[None, :]), mask=mask, other=0.0)
        raw_q = convert_layout_like(raw_q, dk)
        aug_weight = tl.load(aug + head * K + k_columns, mask=k_known, other=0.0)
        aug_weight = aug_weight.to(tl.float32)[None, :]
        db_column = db[:, None]
        tl.store(d_aug + chunk_at * K + k_columns, tl.sum(db_column * raw_q * k, 0), mask=k_known)
        dq += db_column * aug_weight * k
        dk += db_column * aug_weight * raw_q
    d_logits = (dg - (1.0 - k) * dk) * sigmoid(-logits) * inverse_tau
    d_offsets = token_at * D_K + (rows * (H * D_K) + k_columns[None, :])
    tl.store(d_q + d_offsets, dq.to(d_q.dtype.element_ty), mask=mask)
    tl.store(d_gates + d_offsets, d_logits.to(d_gates.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "width"])
def sum_partials_kernel(
    partials, total, rows, width, BLOCK: tl.constexpr = 32, DEPTH: tl.constexpr = 256
):
    """total [width] is the sum of partials [rows, width] float32 over rows, in a fixed order.
    Grid: (width / BLOCK,)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (columns < width)[None, :]
    sums = tl.zeros([DEPTH, BLOCK], tl.float32)
    for start in range(0, rows, DEPTH):
        row = start + tl.arange(0, DEPTH)[:, None]
        sums += tl.load(
            partials + row.to(tl.int64) * width + columns[None, :],
            mask=(row < rows) & mask,
            other=0.0,
        )
    tl.store(total + columns, tl.sum(sums, 0).to(total.dtype.element_ty), mask=columns < width)


def chunk_bwd_dv(call: ChunkCall, d_y, prepared, d_v, dh) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes d_v; returns d_scores and d_aug_score, see `chunk_bwd_dv_kernel`."""
    config = call.config
    results = call.new_scores(), torch.empty_like(prepared.aug_score)
    launch(
        chunk_bwd_dv_kernel, call.grid,
        (call.v, d_y, prepared, d_v, *results, dh, *call.chunk_tensors),
        (*call.chunk_numbers, call.v_strides),
        H=call.heads, K=call.k, V=call.width, D_V=head_stride(d_v), C=config.chunk,
        BK=power_of_two(call.k), BV=config.dv_v, HAS_AUG=call.aug is not None,
        PRECISION=config.full_precision, STAGES=config.dv_stages, num_warps=4,
        maxnreg=config.dv_registers,
    )  # fmt: skip
    return results


def chunk_bwd(call: ChunkCall, d_y, prepared, dv_results, h, dh, gradients) -> None:
    """Writes the gradients of q, gate logits, v and aug; see `chunk_bwd_kernel`."""
    config = call.config
    launch(
        chunk_bwd_kernel, (call.grid[0] * cdiv(call.k, config.bwd_k),),
        (call.inputs, d_y, prepared, dv_results, h, dh, gradients, *call.chunk_tensors),
        (*call.chunk_numbers, *call.scales, call.q_strides, call.gate_strides, call.v_strides),
        H=call.heads, K=call.k, V=call.width, D_K=head_stride(gradients[0]),
        D_V=head_stride(gradients[2]), C=config.chunk, BK=config.bwd_k, BV=config.bwd_v,
        PRECISION=config.precision, STAGES=config.bwd_stages,
        num_warps=config.bwd_warps, maxnreg=config.bwd_registers,
    )  # fmt: skip


def sum_partials(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the sum of the chunks' partial sums [chunks, H, W] in a fixed order, as `dtype`."""
    rows, width = partials.shape[0], partials.shape[1] * partials.shape[2]
    total = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    grid = (cdiv(width, 32),)
    launch(sum_partials_kernel, grid, (partials, total), (rows, width), num_warps=8)
    return total
