"""The read-out of a chunk, with self-augmentation, LayerNorm and output gate behind it, and the way
back through the last two. A program has all of a head's V entries."""

import triton
import triton.language as tl

from megatron_patch.ops.triton.states import load_state
from megatron_patch.ops.triton.tiles import beside, locate, matmul, sigmoid, unit_and_head


@triton.jit(do_not_specialize=["T", "chunks"])
def output(
    v,
    out_gate,
    bias,
    early,
    late,
    exact,
    scores,
    similarity,
    states,
    out,
    normalised,
    inverse_std,
    table,
    bounds,
    T,
    chunks,
    norm_eps,
    v_b,
    v_t,
    v_h,
    v_v,
    z_b,
    z_t,
    z_h,
    z_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_AUG: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = silu(out_gate + bias) * LayerNorm(y). Grid: (chunks * H,).

    For `output_backward` also normalised [B, T, H, V], LayerNorm(y), and inverse_std [B, T, H]
    float32, 1 / its standard deviation; `None` where there will be no backward pass.
    """
    unit, head = unit_and_head(H)
    sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    if sequence < 0:
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    chunk_at = unit.to(tl.int64) * H + head
    token_at = (batch * T + first) * H + head
    v += batch * v_b + head * v_h + first * v_t
    token = tl.arange(0, C)
    rows = token[:, None]
    columns = tl.arange(0, BV)
    v_mask = (columns < V)[None, :]
    mask = (rows < length) & v_mask
    tile = token_at * K + rows * (H * K)
    is_exact = tl.load(exact + chunk_at) != 0
    if HAS_AUG:  # asked for here, for it would be waited for behind the products
        weight = tl.load(similarity + token_at + token * H, mask=token < length, other=0.0)
    if is_exact:
        weights = tl.load(
            scores + token_at * C + rows * (H * C) + token[None, :], mask=rows < length, other=0.0
        ).to(tl.float32)
    else:
        weights = tl.zeros([C, C], tl.float32)
        for score_tile in tl.static_range((K + BK - 1) // BK):
            score_columns = score_tile * BK + tl.arange(0, BK)[None, :]
            score_mask = (rows < length) & (score_columns < K)
            q_factor = tl.load(early + tile + score_columns, mask=score_mask, other=0.0)
            k_factor = tl.load(late + tile + score_columns, mask=score_mask, other=0.0)
            weights += matmul(q_factor, tl.trans(k_factor), PRECISION)
    weights = tl.where(rows >= token[None, :], weights, 0.0)
    y = tl.zeros([C, BV], tl.float32)
    for k_tile in tl.static_range((K + BK - 1) // BK):
        k_columns = k_tile * BK + tl.arange(0, BK)
        k_mask = (rows < length) & (k_columns < K)[None, :]
        early_tile = tl.load(early + tile + k_columns[None, :], mask=k_mask, other=0.0)
        state = load_state(states, chunk_at, k_columns, columns, K, V)
        y += matmul(early_tile, state, PRECISION)
    v_tile = tl.load(v + rows * v_t + columns[None, :] * v_v, mask=mask, other=0.0)
    y += matmul(weights, v_tile, PRECISION)
    if HAS_AUG:
        y += sigmoid(weight[:, None] * beside(v_tile, y))
    y = tl.where(v_mask, y, 0.0)
    mean = tl.sum(y, 1) * (1 / V)
    centred = tl.where(v_mask, y - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1 / V)
    factor = tl.rsqrt(variance + norm_eps)
    x_hat = centred * factor[:, None]
    offsets = token_at * V + (rows * (H * V) + columns[None, :])
    if normalised is not None:
        tl.store(normalised + offsets, x_hat.to(normalised.dtype.element_ty), mask=mask)
        tl.store(inverse_std + token_at + token * H, factor, mask=token < length)
    if HAS_GATE:
        z = tl.load(
            out_gate
            + batch * z_b
            + head * z_h
            + first * z_t
            + (rows * z_t + columns[None, :] * z_v),
            mask=mask,
            other=0.0,
        )
        z = beside(z, x_hat)
        if HAS_BIAS:
            shift = tl.load(bias + head * V + columns, mask=columns < V, other=0.0)
            z += shift.to(tl.float32)[None, :]
        x_hat *= z * sigmoid(z)
    tl.store(out + offsets, x_hat.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunks"])
def output_backward(
    normalised,
    inverse_std,
    out_gate,
    bias,
    d_out,
    d_y,
    d_out_gate,
    d_bias,
    table,
    bounds,
    T,
    chunks,
    z_b,
    z_t,
    z_h,
    z_v,
    d_out_b,
    d_out_t,
    d_out_h,
    d_out_v,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """From the gradient of `out` to those of y and out_gate, and each chunk's share of the bias's,
    d_bias [chunks, H, V] float32. d_y may be `normalised`. Grid: (chunks * H,).

    By tiles of ROWS tokens, to have many loads under way: nothing is computed here but what
    memory waits for.
    """
    unit, head = unit_and_head(H)
    sequence, _, batch, first, end = locate(unit, chunks, table, bounds, T, C, PACKED)
    columns = tl.arange(0, BV)
    v_mask = columns < V
    share_at = (unit.to(tl.int64) * H + head) * V + columns
    if sequence < 0:
        if HAS_BIAS:
            tl.store(d_bias + share_at, tl.zeros([BV], tl.float32), mask=v_mask)
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    token_at = (batch * T + first) * H + head
    d_out += batch * d_out_b + head * d_out_h + first * d_out_t
    if HAS_GATE:
        out_gate += batch * z_b + head * z_h + first * z_t
        shift = tl.zeros([BV], tl.float32)
        if HAS_BIAS:
            shift += tl.load(bias + head * V + columns, mask=v_mask, other=0.0).to(tl.float32)
            shares = tl.zeros([ROWS, BV], tl.float32)
    for start in range(0, C, ROWS):
        token = start + tl.arange(0, ROWS)
        rows = token[:, None]
        mask = (rows < length) & v_mask[None, :]
        offsets = token_at * V + (rows * (H * V) + columns[None, :])
        d_x = tl.load(d_out + (rows * d_out_t + columns[None, :] * d_out_v), mask=mask, other=0.0)
        d_x = d_x.to(tl.float32)
        x_hat = tl.load(normalised + offsets, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(inverse_std + token_at + token * H, mask=token < length, other=0.0)
        if HAS_GATE:
            z = tl.load(out_gate + (rows * z_t + columns[None, :] * z_v), mask=mask, other=0.0)
            z = z.to(tl.float32) + shift[None, :]
            s = sigmoid(z)
            d_z = d_x * x_hat * (s + z * s * (1 - s))
            tl.store(d_out_gate + offsets, d_z.to(d_out_gate.dtype.element_ty), mask=mask)
            if HAS_BIAS:
                shares += d_z
            d_x *= z * s
        mean = tl.sum(d_x, 1) * (1 / V)
        projection = tl.sum(d_x * x_hat, 1) * (1 / V)
        d_x = (d_x - mean[:, None] - x_hat * projection[:, None]) * factor[:, None]
        tl.store(d_y + offsets, d_x.to(d_y.dtype.element_ty), mask=mask)
    if HAS_GATE and HAS_BIAS:
        tl.store(d_bias + share_at, tl.sum(shares, 0), mask=v_mask)
