"""Chunked gated linear attention, step 2: the inter-chunk scan of states, and of their gradients.

Two levels keep every multiprocessor busy even for one long sequence. Where sequences have several
segments, `chunk_h_kernel` first sums up every segment on its own, `segment_scan_kernel` walks the
segments, and `chunk_h_kernel` then walks the chunks of each segment from the state that enters it.
Gradients go the same way backwards.

Where ranks split the tokens of a sequence, they are one more level: between the two walks they
exchange the state that each one's tokens reach from zero, and its decay.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from megatron_patch.ops.context_parallel import Exchange
from megatron_patch.ops.triton.config import ChunkCall, power_of_two
from megatron_patch.ops.triton.launch import cdiv, contiguous, is_compiling, launch
from megatron_patch.ops.triton.tiles import chunk_and_head, exp2, locate, matmul


@triton.jit(do_not_specialize=["T", "segments", "chunks"])
def chunk_h_kernel(
    x, y, g_last, fallback, h, h0, ht, g_segment, segment_indices, chunk_offsets, cu_seqlens, T,
    segments, chunks, y_strides,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, SEGMENT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of each segment. Grid: (segments * H, K tiles * V tiles).

    Forward:  S  = 2^g_last S  + 2^m sum of kg_t v_t^T,  with x = kg, y = v.
    Backward: dS = 2^g_last dS + 2^m sum of qg_t dy_t^T, with x = qg, y = dy.
    2 m = g_last; in fallback chunks 1 takes the place of 2^m.

    h: [chunks, H, K, V], written as 2^m times the state before each chunk in walking order; only if
        g_segment is `None`.
    h0, ht: [segments, H, K, V] float32, the state before and after each segment; `None` for zeros,
        and for not wanted.
    g_segment: [segments, H, K] float32, written as the log decay of each segment; or `None`.
    """
    y_b, y_t, y_h = y_strides
    segment, head = chunk_and_head(H)
    v_tiles = tl.cdiv(V, BV)
    k_tile = tl.program_id(1) // v_tiles
    v_tile = tl.program_id(1) % v_tiles
    sequence, index, batch, start, end = locate(
        segment, segments, segment_indices, cu_seqlens, T, SEGMENT
    )
    if sequence < 0:
        return
    if cu_seqlens is not None:
        first_chunk = tl.load(chunk_offsets + sequence).to(tl.int64)
    else:
        first_chunk = sequence * chunks
    first_chunk += index * (SEGMENT // C)
    count = tl.cdiv(tl.minimum(end - start, SEGMENT), C).to(tl.int32)

    rows = tl.arange(0, C)[:, None]
    k_columns = k_tile * BK + tl.arange(0, BK)
    v_columns = v_tile * BV + tl.arange(0, BV)
    k_mask = k_columns < K
    v_mask = (v_columns < V)[None, :]
    x_tile = x + (batch * T * H + head) * K + (rows * (H * K) + k_columns[None, :])
    y_tile = y + batch * y_b + head * y_h + (rows * y_t + v_columns[None, :])
    h_offsets = k_columns[:, None] * V + v_columns[None, :]
    h_mask = k_mask[:, None] & v_mask

    segment_at = (segment.to(tl.int64) * H + head) * K
    state = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        state += tl.load(h0 + segment_at * V + h_offsets, mask=h_mask, other=0.0)
    decay = tl.zeros([BK], tl.float32)
    at = (first_chunk + (count - 1 if REVERSE else 0)) * H + head
    total = tl.load(g_last + at * K + k_columns, mask=k_mask, other=0.0)
    is_fallback = tl.load(fallback + at)
    for step in range(0, count):
        c = count - 1 - step if REVERSE else step
        first = start + c * C
        # Loads for the next chunk start one step early, or the next step would wait for them.
        following = tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, count - 1)
        next_at = (first_chunk + following) * H + head
        next_total = tl.load(g_last + next_at * K + k_columns, mask=k_mask, other=0.0)
        next_fallback = tl.load(fallback + next_at)
        length = tl.minimum(end - first, C).to(tl.int32)
        x_chunk = tl.load(
            x_tile + first * (H * K), mask=(rows < length) & k_mask[None, :], other=0.0
        )
        y_chunk = tl.load(y_tile + first * y_t, mask=(rows < length) & v_mask, other=0.0)
        middle = tl.where(is_fallback != 0, 0.0, 0.5 * total)
        factor = exp2(middle, PRECISION)[:, None]
        if g_segment is None:
            tl.store(
                h + at * (K * V) + h_offsets,
                (state * factor).to(h.dtype.element_ty),
                mask=h_mask,
            )
        update = matmul(tl.trans(x_chunk), y_chunk, PRECISION)
        state = state * exp2(total, PRECISION)[:, None] + update * factor
        decay += total
        at, total, is_fallback = next_at, next_total, next_fallback
    if ht is not None:
        tl.store(ht + segment_at * V + h_offsets, state, mask=h_mask)
    if g_segment is not None:
        if v_tile == 0:
            tl.store(g_segment + segment_at + k_columns, decay, mask=k_mask)


@triton.jit(do_not_specialize=["segments"])
def segment_scan_kernel(
    h, g_segment, h0, ht, gt, segment_offsets, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Turns each segment's own sum into the state that enters it, in place, and writes the state
    after the last segment of each sequence. Grid: (sequences * H, K tiles * V tiles).

    h [segments, H, K, V]; h0 (or `None` for zeros) and ht (or `None` if not wanted) [sequences, H,
    K, V]; gt (or `None`) [sequences, H, K], written as the log decay of each sequence; all float32
    and contiguous.
    """
    sequence, head = chunk_and_head(H)
    sequence = sequence.to(tl.int64)
    v_tiles = tl.cdiv(V, BV)
    k_columns = (tl.program_id(1) // v_tiles) * BK + tl.arange(0, BK)
    v_columns = (tl.program_id(1) % v_tiles) * BV + tl.arange(0, BV)
    mask = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    offsets = k_columns[:, None] * V + v_columns[None, :]
    if segment_offsets is not None:
        first = tl.load(segment_offsets + sequence).to(tl.int64)
        count = (tl.load(segment_offsets + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence * segments
        count = segments
    own = (sequence * H + head) * (K * V) + offsets
    state = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        state = tl.load(h0 + own, mask=mask, other=0.0)
    sum_of_decays = tl.zeros([BK], tl.float32)
    for step in range(0, count):
        segment = first + (count - 1 - step if REVERSE else step)
        at = segment * H + head
        total = tl.load(h + at * (K * V) + offsets, mask=mask, other=0.0)
        decay = tl.load(g_segment + at * K + k_columns, mask=k_columns < K, other=0.0)
        tl.store(h + at * (K * V) + offsets, state, mask=mask)
        state = state * tl.exp2(decay)[:, None] + total
        sum_of_decays += decay
    if ht is not None:
        tl.store(ht + own, state, mask=mask)
    if gt is not None:
        # All tiles of V write the same numbers.
        at = (sequence * H + head) * K + k_columns
        tl.store(gt + at, sum_of_decays, mask=k_columns < K)


def _chunk_h(
    call: ChunkCall, x, y, y_strides, prepared, h0, wants_ht, reverse, exchange: Exchange | None
) -> tuple[torch.Tensor, torch.Tensor]:
    config, indices = call.config, call.indices
    heads, k, width = call.heads, call.k, call.width
    h0 = contiguous(h0)
    h = call.new(indices.chunk_count, heads, k, width, dtype=call.dtype)

    def walk(h0, ht, g_segment) -> None:
        tiles = cdiv(k, config.h_k) * cdiv(width, config.h_v)
        launch(
            chunk_h_kernel, (indices.segment_count * heads, tiles),
            (
                x, y, prepared.g_last, prepared.fallback, h, h0, ht, g_segment,
                indices.segment_indices, indices.chunk_offsets, call.cu_seqlens,
            ),
            (call.time, indices.segments, indices.chunks, y_strides),
            H=heads, K=k, V=width, C=config.chunk, BK=config.h_k, BV=config.h_v,
            SEGMENT=config.segment, REVERSE=reverse, PRECISION=config.full_precision,
            num_warps=config.h_warps, num_stages=config.h_stages,
        )  # fmt: skip

    def scan(h_segment, h0, ht, gt) -> None:
        block_k, block_v = 16, min(64, power_of_two(width))
        tiles = cdiv(k, block_k) * cdiv(width, block_v)
        launch(
            segment_scan_kernel, (indices.sequences * heads, tiles),
            (h_segment, g_segment, h0, ht, gt, indices.segment_offsets), (indices.segments,),
            H=heads, K=k, V=width, BK=block_k, BV=block_v, REVERSE=reverse, num_warps=2,
        )  # fmt: skip

    states = indices.sequences, heads, k, width
    ht = call.new(*states) if wants_ht else None
    if indices.segments != 1 or exchange is not None:
        h_segment = call.new(indices.segment_count, heads, k, width)
        g_segment = call.new(indices.segment_count, heads, k)
        walk(None, h_segment, g_segment)
    if exchange is not None:
        own, log_decay = h_segment, g_segment
        if indices.segments != 1:
            own, log_decay = call.new(*states), call.new(*states[:3])
            scan(h_segment.clone(), None, own, log_decay)
        h0 = own if is_compiling() else exchange(own, log_decay * math.log(2), reverse)
    if indices.segments == 1:
        walk(h0, ht, None)
    else:
        scan(h_segment, h0, ht, None)
        walk(h_segment, None, None)
    return h, call.new(0) if ht is None else ht


def chunk_fwd_h(
    call: ChunkCall, prepared, h0, wants_ht, exchange: Exchange | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 2^m times the state before each chunk, [chunks, H, K, V], and the state after the
    last token of each sequence, [N, H, K, V] float32, empty if not wanted. With `exchange` other
    ranks give the initial state."""
    return _chunk_h(
        call, prepared.kg, call.v, call.v_strides, prepared, h0, wants_ht, False, exchange
    )


def chunk_bwd_dh(
    call: ChunkCall, prepared, d_y, d_ht, wants_d_h0, exchange: Exchange | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 2^m times the gradient of the state after each chunk, [chunks, H, K, V], and the
    gradient of the initial state, [N, H, K, V] float32, empty if not wanted. d_y is contiguous.
    With `exchange` other ranks give the gradient of the final state."""
    strides = d_y.stride()[:3]
    return _chunk_h(call, prepared.qg, d_y, strides, prepared, d_ht, wants_d_h0, True, exchange)
