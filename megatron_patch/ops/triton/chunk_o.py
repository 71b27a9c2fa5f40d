"""Chunked gated linear attention, step 3: the output of each chunk, with self-augmentation,
LayerNorm and output gate fused behind it; and the backward pass of LayerNorm and gate.

A program holds all V entries of a head, because LayerNorm needs them.
"""

import triton
import triton.language as tl

from megatron_patch.ops.triton.config import ChunkCall, head_stride
from megatron_patch.ops.triton.launch import launch
from megatron_patch.ops.triton.tiles import (
    chunk_and_head,
    chunk_rows,
    convert_layout_like,
    load_aug_score,
    load_h,
    locate,
    matmul,
    offset_of,
    sigmoid,
)


@triton.jit(do_not_specialize=["T", "chunks"])
def chunk_fwd_o_kernel(
    v, out_gate, bias, prepared, scores, h, out, x_hat, rstd, chunk_indices, cu_seqlens, T, chunks,
    norm_eps, v_strides, gate_strides,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, HAS_AUG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = silu(out_gate + bias) * LayerNorm(y). Grid: (chunks * H,).

    out_gate and bias may be `None`. For the backward pass it also writes x_hat [B, T, H, V], the
    normalised y, and rstd [B, T, H] float32, 1 / its standard deviation; `None` without one.
    """
    qg, kg, _, fallback, aug_score = prepared
    chunk, head = chunk_and_head(H)
    sequence, _, batch, first, end = locate(chunk, chunks, chunk_indices, cu_seqlens, T, C)
    if sequence < 0:
        return
    length, token_at, token, rows = chunk_rows(batch, first, end, head, T, H, C)
    chunk_at = chunk.to(tl.int64) * H + head
    v += offset_of(batch, first, head, v_strides)
    columns = tl.arange(0, BV)
    v_mask = (columns < V)[None, :]
    mask = (rows < length) & v_mask
    tile = token_at * K + rows * (H * K)
    is_fallback = tl.load(fallback + chunk_at) != 0
    # Loaded early: behind the products, the program would wait for it.
    b = load_aug_score(aug_score, token_at, length, H, C, HAS_AUG)
    if is_fallback:
        weights = tl.load(
            scores + token_at * C + rows * (H * C) + token[None, :], mask=rows < length, other=0.0
        ).to(tl.float32)
    else:
        weights = tl.zeros([C, C], tl.float32)
        for score_tile in tl.static_range((K + BK - 1) // BK):
            score_columns = score_tile * BK + tl.arange(0, BK)[None, :]
            score_mask = (rows < length) & (score_columns < K)
            qg_tile = tl.load(qg + tile + score_columns, mask=score_mask, other=0.0)
            kg_tile = tl.load(kg + tile + score_columns, mask=score_mask, other=0.0)
            weights += matmul(qg_tile, tl.trans(kg_tile), PRECISION)
    weights = tl.where(rows >= token[None, :], weights, 0.0)
    y = tl.zeros([C, BV], tl.float32)
    for k_tile in tl.static_range((K + BK - 1) // BK):
        k_columns = k_tile * BK + tl.arange(0, BK)
        k_mask = (rows < length) & (k_columns < K)[None, :]
        qg_tile = tl.load(qg + tile + k_columns[None, :], mask=k_mask, other=0.0)
        h_tile = load_h(h, chunk_at, k_columns, columns, K, V)
        y += matmul(qg_tile, h_tile, PRECISION)
    v_tile = tl.load(v + rows * v_strides[1] + columns[None, :], mask=mask, other=0.0)
    y += matmul(weights, v_tile, PRECISION)
    if HAS_AUG:
        y += sigmoid(b[:, None] * convert_layout_like(v_tile, y))
    y = tl.where(v_mask, y, 0.0)
    mean = tl.sum(y, 1) * (1 / V)
    centred = tl.where(v_mask, y - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * (1 / V)
    rstd_tile = tl.rsqrt(variance + norm_eps)
    result = centred * rstd_tile[:, None]
    offsets = token_at * V + (rows * (H * V) + columns[None, :])
    if x_hat is not None:
        tl.store(x_hat + offsets, result.to(x_hat.dtype.element_ty), mask=mask)
        tl.store(rstd + token_at + token * H, rstd_tile, mask=token < length)
    if out_gate is not None:
        out_gate += offset_of(batch, first, head, gate_strides)
        z_tile = out_gate + (rows * gate_strides[1] + columns[None, :])
        z = convert_layout_like(tl.load(z_tile, mask=mask, other=0.0), result)
        if bias is not None:
            bias_tile = tl.load(bias + head * V + columns, mask=columns < V, other=0.0)
            z += bias_tile.to(tl.float32)[None, :]
        result *= z * sigmoid(z)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunks"])
def chunk_bwd_o_kernel(
    x_hat, rstd, out_gate, bias, d_out, d_y, d_out_gate, d_bias, chunk_indices, cu_seqlens, T,
    chunks, gate_strides, d_out_strides,
    H: tl.constexpr, V: tl.constexpr, D_V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Turns the gradient of `out` into d_y, d_out_gate, and each chunk's partial sum of the bias's
    gradient, d_bias [chunks, H, V] float32. d_y may be `x_hat`. Heads of d_out_gate lie D_V entries
    apart. Grid: (chunks * H,).

    The kernel is bound by memory. Tiles of ROWS tokens keep many loads in flight.
    """
    chunk, head = chunk_and_head(H)
    sequence, _, batch, first, end = locate(chunk, chunks, chunk_indices, cu_seqlens, T, C)
    columns = tl.arange(0, BV)
    v_mask = columns < V
    bias_at = (chunk.to(tl.int64) * H + head) * V + columns
    if sequence < 0:
        if bias is not None:
            tl.store(d_bias + bias_at, tl.zeros([BV], tl.float32), mask=v_mask)
        return
    length = tl.minimum(end - first, C).to(tl.int32)
    token_at = (batch * T + first) * H + head
    d_out += offset_of(batch, first, head, d_out_strides)
    if out_gate is not None:
        out_gate += offset_of(batch, first, head, gate_strides)
        bias_tile = tl.zeros([BV], tl.float32)
        if bias is not None:
            bias_tile += tl.load(bias + head * V + columns, mask=v_mask, other=0.0).to(tl.float32)
            d_bias_tile = tl.zeros([ROWS, BV], tl.float32)
    for start in range(0, C, ROWS):
        token = start + tl.arange(0, ROWS)
        rows = token[:, None]
        mask = (rows < length) & v_mask[None, :]
        offsets = token_at * V + (rows * (H * V) + columns[None, :])
        d_x = tl.load(d_out + (rows * d_out_strides[1] + columns[None, :]), mask=mask, other=0.0)
        d_x = d_x.to(tl.float32)
        x_hat_tile = tl.load(x_hat + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd_tile = tl.load(rstd + token_at + token * H, mask=token < length, other=0.0)
        if out_gate is not None:
            z_tile = out_gate + (rows * gate_strides[1] + columns[None, :])
            z = tl.load(z_tile, mask=mask, other=0.0)
            z = z.to(tl.float32) + bias_tile[None, :]
            s = sigmoid(z)
            d_z = d_x * x_hat_tile * (s + z * s * (1 - s))
            d_z_at = d_out_gate + token_at * D_V + (rows * (H * D_V) + columns[None, :])
            tl.store(d_z_at, d_z.to(d_out_gate.dtype.element_ty), mask=mask)
            if bias is not None:
                d_bias_tile += d_z
            d_x *= z * s
        mean = tl.sum(d_x, 1) * (1 / V)
        projection = tl.sum(d_x * x_hat_tile, 1) * (1 / V)
        d_x = (d_x - mean[:, None] - x_hat_tile * projection[:, None]) * rstd_tile[:, None]
        tl.store(d_y + offsets, d_x.to(d_y.dtype.element_ty), mask=mask)
    if bias is not None:
        tl.store(d_bias + bias_at, tl.sum(d_bias_tile, 0), mask=v_mask)


def chunk_fwd_o(call: ChunkCall, prepared, scores, h, out, x_hat, rstd, norm_eps: float) -> None:
    """Writes out, and x_hat and rstd unless they are `None`."""
    config = call.config
    launch(
        chunk_fwd_o_kernel, call.grid,
        (
            call.v, call.out_gate, call.bias, prepared, scores, h, out, x_hat, rstd,
            *call.chunk_tensors,
        ),
        (*call.chunk_numbers, norm_eps, call.v_strides, call.out_gate_strides),
        H=call.heads, K=call.k, V=call.width, C=config.chunk, BK=config.o_k, BV=config.o_v,
        HAS_AUG=call.aug is not None, PRECISION=config.precision,
        num_warps=config.o_warps, maxnreg=config.o_registers,
    )  # fmt: skip


def chunk_bwd_o(call: ChunkCall, x_hat, rstd, d_out, d_y, d_out_gate, d_bias) -> None:
    """Writes d_y, d_out_gate and d_bias; see `chunk_bwd_o_kernel`."""
    config = call.config
    launch(
        chunk_bwd_o_kernel, call.grid,
        (
            x_hat, rstd, call.out_gate, call.bias, d_out, d_y, d_out_gate, d_bias,
            *call.chunk_tensors,
        ),
        (*call.chunk_numbers, call.out_gate_strides, d_out.stride()[:3]),
        H=call.heads, V=call.width, D_V=head_stride(d_out_gate), C=config.chunk,
        ROWS=config.bwd_o_rows, BV=config.o_v, num_warps=config.bwd_o_warps,
    )  # fmt: skip
