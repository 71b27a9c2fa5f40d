"""One decoding step (T = 1) of the recurrence and of the short convolution, one launch each.

The state is updated in place or written anew. These kernels have no gradients; `chunk.py` and
`convolution.py` call them where none are recorded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.config import precision_of
from megatron_patch.ops.triton.launch import cdiv, contiguous, last_stride_one, launch
from megatron_patch.ops.triton.tiles import exp2, key, load_log_decay, sigmoid

TILE = 8192  # entries of the state that a program holds in registers at a time


@triton.jit
def attention_step_kernel(
    q, gates, v, aug, out_gate, bias, state, new_state, out, scale, inverse_tau, norm_eps,
    q_strides, gate_strides, v_strides, out_gate_strides,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes one token of one head. The state [K, V] passes through in tiles, read once and
    written once; `new_state` may be `state`. Strides are those of (batch, head). Grid: (B * H,)."""
    q_b, q_h = q_strides
    gate_b, gate_h = gate_strides
    v_b, v_h = v_strides
    program = tl.program_id(0).to(tl.int64)
    batch = program // H
    head = program % H
    columns = tl.arange(0, BV)
    v_mask = columns < V
    value = tl.load(v + batch * v_b + head * v_h + columns, mask=v_mask, other=0.0).to(tl.float32)
    # The epilogue's loads start here, before those of the state.
    if out_gate is not None:
        z_b, z_h = out_gate_strides
        z = tl.load(out_gate + batch * z_b + head * z_h + columns, mask=v_mask, other=0.0)
        z = z.to(tl.float32)
        if bias is not None:
            z += tl.load(bias + head * V + columns, mask=v_mask, other=0.0).to(tl.float32)
    q += batch * q_b + head * q_h
    gates += batch * gate_b + head * gate_h
    y = tl.zeros([BV], tl.float32)
    aug_scores = tl.zeros([BK], tl.float32)
    for first in tl.range(0, K, BK, loop_unroll_factor=4):
        rows = first + tl.arange(0, BK)
        k_mask = rows < K
        offsets = program * (K * V) + rows[:, None] * V + columns[None, :]
        mask = k_mask[:, None] & v_mask[None, :]
        past = tl.load(state + offsets, mask=mask, other=0.0)
        query = tl.load(q + rows, mask=k_mask, other=0.0).to(tl.float32)
        g = load_log_decay(gates + rows, k_mask, inverse_tau, PRECISION)
        k = key(g, PRECISION)
        if aug is not None:
            aug_weight = tl.load(aug + head * K + rows, mask=k_mask, other=0.0).to(tl.float32)
            aug_scores += query * aug_weight * k
        tile = exp2(g, PRECISION)[:, None] * past + k[:, None] * value[None, :]
        tl.store(new_state + offsets, tile, mask=mask)
        y += tl.sum(query[:, None] * tile, 0)
    y *= scale
    if aug is not None:
        y += sigmoid(tl.sum(aug_scores, 0) * value)
    y = tl.where(v_mask, y, 0.0)
    centred = tl.where(v_mask, y - tl.sum(y, 0) * (1 / V), 0.0)
    variance = tl.sum(centred * centred, 0) * (1 / V)
    y = centred * tl.rsqrt(variance + norm_eps)
    if out_gate is not None:
        y *= z * sigmoid(z)
    tl.store(out + program * V + columns, y.to(out.dtype.element_ty), mask=v_mask)


@triton.jit
def convolution_step_kernel(
    x, weight, state, new_state, y, x_b,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Computes one token of BD channels, and shifts x into the state [B, D, W - 1], oldest first.
    `state` may be `None` for zeros. Grid: (B, blocks of channels)."""
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = columns < D
    newest = tl.load(x + batch * x_b + columns, mask=mask, other=0.0)
    past = (batch * D + columns) * (W - 1)
    total = newest.to(tl.float32) * tl.load(
        weight + columns * W + (W - 1), mask=mask, other=0.0
    ).to(tl.float32)
    inputs = ()
    for tap in tl.static_range(W - 1):
        if state is not None:
            row = tl.load(state + past + tap, mask=mask, other=0.0)
        else:
            row = tl.zeros([BD], x.dtype.element_ty)
        inputs = inputs + (row,)
        factor = tl.load(weight + columns * W + tap, mask=mask, other=0.0)
        total += row.to(tl.float32) * factor.to(tl.float32)
    inputs = inputs + (newest,)
    # new_state may be state: every thread must have read before any writes.
    tl.debug_barrier()
    for tap in tl.static_range(W - 1):
        tl.store(new_state + past + tap, inputs[tap + 1], mask=mask)
    if SILU:
        total *= sigmoid(total)
    tl.store(y + batch * D + columns, total.to(y.dtype.element_ty), mask=mask)


def _new_state_for(state: Tensor) -> Tensor:
    """Returns `state` itself if a kernel can write there, or else contiguous memory."""
    if state.is_contiguous():
        return state
    return torch.empty_like(state, memory_format=torch.contiguous_format)


def _batch_head_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(2))


def _attention(
    q, gate_logits, v, aug, out_gate, bias, state, new_state, tau, scale, norm_eps
) -> Tensor:
    batch, _, heads, k = q.shape
    width = v.shape[-1]
    q, gate_logits, v, out_gate = map(last_stride_one, (q, gate_logits, v, out_gate))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_v = triton.next_power_of_2(width)
    block_k = min(triton.next_power_of_2(k), max(1, TILE // block_v))
    with torch.cuda.device_of(q):
        launch(
            attention_step_kernel, (batch * heads,),
            (
                q, gate_logits, v, contiguous(aug), out_gate, contiguous(bias),
                state.contiguous(), new_state, out,
            ),
            (scale, 1.0 / tau, norm_eps, *map(_batch_head_strides, (q, gate_logits, v, out_gate))),
            H=heads, K=k, V=width, BK=block_k, BV=block_v, PRECISION=precision_of(q.dtype),
            num_warps=max(1, block_k * block_v // 2048),
        )  # fmt: skip
    return out


@torch.library.custom_op("metala::attention_step", mutates_args=())
def attention(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    out_gate_bias: Tensor | None,
    state: Tensor | None,
    tau: float,
    scale: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the output [B, 1, H, V] and the new state [B, H, K, V] of one token."""
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    # Zeros are read even without a state: LLVM aborts in some kernels that read none (Triton 3.6,
    # bfloat16, K = 64).
    make = torch.zeros if state is None else torch.empty
    new_state = make(shape, dtype=torch.float32, device=q.device)
    state = new_state if state is None else state
    out = _attention(
        q, gate_logits, v, aug, out_gate, out_gate_bias, state, new_state, tau, scale, norm_eps
    )
    return out, new_state


@attention.register_fake
def _(q, gate_logits, v, aug, out_gate, out_gate_bias, state, tau, scale, norm_eps):
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("metala::attention_step_", mutates_args=("state",))
def attention_(
    q: Tensor,
    gate_logits: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    out_gate_bias: Tensor | None,
    state: Tensor,
    tau: float,
    scale: float,
    norm_eps: float,
) -> Tensor:
    """Returns the output [B, 1, H, V] of one token; writes the new state over `state`."""
    new_state = _new_state_for(state)
    out = _attention(
        q, gate_logits, v, aug, out_gate, out_gate_bias, state, new_state, tau, scale, norm_eps
    )
    if new_state is not state:
        state.copy_(new_state)
    return out


@attention_.register_fake
def _(q, gate_logits, v, aug, out_gate, out_gate_bias, state, tau, scale, norm_eps):
    return v.new_empty(v.shape)


def _convolution(x, weight, state, new_state, silu) -> Tensor:
    x = last_stride_one(x)
    batch, _, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(512, triton.next_power_of_2(channels))
    with torch.cuda.device_of(x):
        launch(
            convolution_step_kernel, (batch, cdiv(channels, block)),
            (x, weight.contiguous(), contiguous(state), new_state, y), (x.stride(0),),
            D=channels, W=weight.shape[-1], BD=block, SILU=silu,
        )  # fmt: skip
    return y


@torch.library.custom_op("metala::convolution_step", mutates_args=())
def convolution(
    x: Tensor, weight: Tensor, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Returns y [B, 1, D] and the new state [B, D, W - 1] of one token."""
    new_state = x.new_empty(x.shape[0], x.shape[2], weight.shape[2] - 1)
    return _convolution(x, weight, state, new_state, silu), new_state


@convolution.register_fake
def _(x, weight, state, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], weight.shape[2] - 1)


@torch.library.custom_op("metala::convolution_step_", mutates_args=("state",))
def convolution_(x: Tensor, weight: Tensor, state: Tensor, silu: bool) -> Tensor:
    """Returns y [B, 1, D] of one token; writes the new state over `state`."""
    new_state = _new_state_for(state)
    y = _convolution(x, weight, state, new_state, silu)
    if new_state is not state:
        state.copy_(new_state)
    return y


@convolution_.register_fake
def _(x, weight, state, silu):
    return x.new_empty(x.shape)
