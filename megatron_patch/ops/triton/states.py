"""Kernels that carry states, and gradients of states, along the sequence.

Two levels keep every multiprocessor busy even for one long sequence: where sequences have several
segments, `carry` first sums up each segment alone, all at once, `scan` walks the segments, and
`carry` then walks each segment's chunks from the state that enters it.
Both run backwards for gradients.
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.tiles import exp2, locate, matmul, unit_and_head


@triton.jit(do_not_specialize=["T", "chunks", "units"])
def carry(
    x,
    y,
    chunk_decays,
    exact,
    states,
    entering,
    leaving,
    total_decays,
    table,
    chunk_bounds,
    bounds,
    T,
    units,
    chunks,
    y_b,
    y_t,
    y_h,
    y_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
    WHOLE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """States within segments. Grid: (segments * H, K tiles * V tiles).

    Forwards: S = 2^total S + 2^m sum of late_t v_t^T, with x = late, y = v.
    Backwards: D = 2^total D + 2^m sum of early_t dy_t^T, with x = early, y = dy.
    Here 2 m = total = `chunk_decays`; in exact chunks 1 stands in place of 2^m.

    WHOLE: states [chunks, H, K, V] are written, 2^m times the state before each chunk in walking
    order. Otherwise the log decays of whole segments are, total_decays [segments, H, K] float32.
    entering, leaving: states before and after each segment, [segments, H, K, V] float32; `None` for
    zeros, and for not needed.
    """
    unit, head = unit_and_head(H)
    v_tiles = tl.cdiv(V, BV)
    k_tile = tl.program_id(1) // v_tiles
    v_tile = tl.program_id(1) % v_tiles
    sequence, index, batch, start, end = locate(unit, units, table, bounds, T, SEGMENT, PACKED)
    if sequence < 0:
        return
    if PACKED:
        first_chunk = tl.load(chunk_bounds + sequence).to(tl.int64)
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
    y_tile = y + batch * y_b + head * y_h + (rows * y_t + v_columns[None, :] * y_v)
    state_offsets = k_columns[:, None] * V + v_columns[None, :]
    state_mask = k_mask[:, None] & v_mask

    at_segment = (unit.to(tl.int64) * H + head) * K
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_ENTERING:
        state += tl.load(entering + at_segment * V + state_offsets, mask=state_mask, other=0.0)
    decay = tl.zeros([BK], tl.float32)
    at = (first_chunk + (count - 1 if REVERSE else 0)) * H + head
    total = tl.load(chunk_decays + at * K + k_columns, mask=k_mask, other=0.0)
    is_exact = tl.load(exact + at)
    for step in range(0, count):
        c = count - 1 - step if REVERSE else step
        first = start + c * C
        # The next chunk's: asked for only when it is its turn, they would be waited for.
        following = tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, count - 1)
        next_at = (first_chunk + following) * H + head
        next_total = tl.load(chunk_decays + next_at * K + k_columns, mask=k_mask, other=0.0)
        next_exact = tl.load(exact + next_at)
        length = tl.minimum(end - first, C).to(tl.int32)
        x_chunk = tl.load(
            x_tile + first * (H * K), mask=(rows < length) & k_mask[None, :], other=0.0
        )
        y_chunk = tl.load(y_tile + first * y_t, mask=(rows < length) & v_mask, other=0.0)
        middle = tl.where(is_exact != 0, 0.0, 0.5 * total)
        factor = exp2(middle, PRECISION)[:, None]
        if WHOLE:
            tl.store(
                states + at * (K * V) + state_offsets,
                (state * factor).to(states.dtype.element_ty),
                mask=state_mask,
            )
        update = matmul(tl.trans(x_chunk), y_chunk, PRECISION)
        state = state * exp2(total, PRECISION)[:, None] + update * factor
        decay += total
        at, total, is_exact = next_at, next_total, next_exact
    if leaving is not None:
        tl.store(leaving + at_segment * V + state_offsets, state, mask=state_mask)
    if not WHOLE:
        if v_tile == 0:
            tl.store(total_decays + at_segment + k_columns, decay, mask=k_mask)


@triton.jit(do_not_specialize=["units"])
def scan(
    totals,
    total_decays,
    initial,
    final,
    segment_bounds,
    units,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Turns each segment's own state into the state that enters it, in place, and writes the state
    that leaves the sequence's last segment. Grid: (sequences * H, K tiles * V tiles).

    totals, initial, final: [segments or sequences, H, K, V] float32; all contiguous.
    """
    sequence, head = unit_and_head(H)
    sequence = sequence.to(tl.int64)
    v_tiles = tl.cdiv(V, BV)
    k_columns = (tl.program_id(1) // v_tiles) * BK + tl.arange(0, BK)
    v_columns = (tl.program_id(1) % v_tiles) * BV + tl.arange(0, BV)
    mask = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    offsets = k_columns[:, None] * V + v_columns[None, :]
    if PACKED:
        first = tl.load(segment_bounds + sequence).to(tl.int64)
        count = (tl.load(segment_bounds + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence * units
        count = units
    own = (sequence * H + head) * (K * V) + offsets
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + own, mask=mask, other=0.0)
    for step in range(0, count):
        segment = first + (count - 1 - step if REVERSE else step)
        at = segment * H + head
        total = tl.load(totals + at * (K * V) + offsets, mask=mask, other=0.0)
        decay = tl.load(total_decays + at * K + k_columns, mask=k_columns < K, other=0.0)
        tl.store(totals + at * (K * V) + offsets, state, mask=mask)
        state = state * tl.exp2(decay)[:, None] + total
    tl.store(final + own, state, mask=mask)


@triton.jit
def load_state(states, chunk_at, k_columns, v_columns, K: tl.constexpr, V: tl.constexpr):
    """What `carry` wrote for a chunk, [BK, BV]; chunk_at is chunk * H + head."""
    mask = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    offsets = k_columns[:, None] * V + v_columns[None, :]
    return tl.load(states + chunk_at * (K * V) + offsets, mask=mask, other=0.0)
