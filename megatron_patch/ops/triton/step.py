"""A decoding step, T = 1, as one launch each for the mixer core and for the short convolution, with
the state updated where it lies or written anew. Not differentiable: `backend.py` and
`convolution.py` take these kernels where no gradient is recorded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.configuration import precision_of
from megatron_patch.ops.triton.tiles import decays, exp2, key, sigmoid

TILE = 8192  # entries of the state that a program has in registers at a time


@triton.jit
def attention_step(
    q,
    gates,
    v,
    aug,
    out_gate,
    bias,
    state,
    new_state,
    out,
    scale,
    inverse_tau,
    norm_eps,
    q_b,
    q_h,
    gate_b,
    gate_h,
    v_b,
    v_h,
    z_b,
    z_h,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_AUG: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One token of one head: the state K by V passes through in tiles, read once and written once.

    `new_state` may be `state`. Grid: (B * H,).
    """
    unit = tl.program_id(0).to(tl.int64)
    batch = unit // H
    head = unit % H
    columns = tl.arange(0, BV)
    v_mask = columns < V
    value = tl.load(v + batch * v_b + head * v_h + columns, mask=v_mask, other=0.0).to(tl.float32)
    # All that the epilogue reads, too, is asked for before the state comes.
    if HAS_GATE:
        z = tl.load(out_gate + batch * z_b + head * z_h + columns, mask=v_mask, other=0.0)
        z = z.to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + head * V + columns, mask=v_mask, other=0.0).to(tl.float32)
    q += batch * q_b + head * q_h
    gates += batch * gate_b + head * gate_h
    y = tl.zeros([BV], tl.float32)
    similarities = tl.zeros([BK], tl.float32)
    for first in tl.range(0, K, BK, loop_unroll_factor=4):
        rows = first + tl.arange(0, BK)
        k_mask = rows < K
        offsets = unit * (K * V) + rows[:, None] * V + columns[None, :]
        mask = k_mask[:, None] & v_mask[None, :]
        past = tl.load(state + offsets, mask=mask, other=0.0)
        query = tl.load(q + rows, mask=k_mask, other=0.0).to(tl.float32)
        g = decays(gates + rows, k_mask, inverse_tau, PRECISION)
        k = key(g, PRECISION)
        if HAS_AUG:
            weight = tl.load(aug + head * K + rows, mask=k_mask, other=0.0).to(tl.float32)
            similarities += query * weight * k
        tile = exp2(g, PRECISION)[:, None] * past + k[:, None] * value[None, :]
        tl.store(new_state + offsets, tile, mask=mask)
        y += tl.sum(query[:, None] * tile, 0)
    y *= scale
    if HAS_AUG:
        y += sigmoid(tl.sum(similarities, 0) * value)
    y = tl.where(v_mask, y, 0.0)
    centred = tl.where(v_mask, y - tl.sum(y, 0) * (1 / V), 0.0)
    variance = tl.sum(centred * centred, 0) * (1 / V)
    y = centred * tl.rsqrt(variance + norm_eps)
    if HAS_GATE:
        y *= z * sigmoid(z)
    tl.store(out + unit * V + columns, y.to(out.dtype.element_ty), mask=v_mask)


@triton.jit
def convolution_step(
    x,
    weight,
    state,
    new_state,
    y,
    x_b,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """One token of BD channels: y, and the state moved on by x. Grid: (B, blocks of channels)."""
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
        if HAS_STATE:
            row = tl.load(state + past + tap, mask=mask, other=0.0)
        else:
            row = tl.zeros([BD], x.dtype.element_ty)
        inputs = inputs + (row,)
        factor = tl.load(weight + columns * W + tap, mask=mask, other=0.0)
        total += row.to(tl.float32) * factor.to(tl.float32)
    inputs = inputs + (newest,)
    # Every thread has read before any writes over the state.
    tl.debug_barrier()
    for tap in tl.static_range(W - 1):
        tl.store(new_state + past + tap, inputs[tap + 1], mask=mask)
    if SILU:
        total *= sigmoid(total)
    tl.store(y + batch * D + columns, total.to(y.dtype.element_ty), mask=mask)


def _side_by_side(x: Tensor | None) -> Tensor | None:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _launch_attention(
    q, gate_logits, v, aug, out_gate, bias, state, new_state, tau, scale, norm_eps
) -> Tensor:
    batch, _, heads, k = q.shape
    width = v.shape[-1]
    q, gate_logits, v, out_gate = map(_side_by_side, (q, gate_logits, v, out_gate))
    aug, bias = (None if x is None else x.contiguous() for x in (aug, bias))
    state = state.contiguous()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_v = triton.next_power_of_2(width)
    block_k = min(triton.next_power_of_2(k), max(1, TILE // block_v))
    gate_strides = (0, 0) if out_gate is None else (out_gate.stride(0), out_gate.stride(2))
    with torch.cuda.device_of(q):
        attention_step[(batch * heads,)](
            q, gate_logits, v, aug, out_gate, bias, state, new_state, out,
            scale, 1.0 / tau, norm_eps, q.stride(0), q.stride(2),
            gate_logits.stride(0), gate_logits.stride(2), v.stride(0), v.stride(2), *gate_strides,
            H=heads, K=k, V=width, BK=block_k, BV=block_v,
            HAS_AUG=aug is not None, HAS_GATE=out_gate is not None, HAS_BIAS=bias is not None,
            PRECISION=precision_of(q.dtype),
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
    """Output [B, 1, H, V] and new state [B, H, K, V] of one token."""
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    # LLVM aborts in some of the kernels that have no state to read (Triton 3.6, bfloat16, K 64).
    make = torch.zeros if state is None else torch.empty
    new_state = make(shape, dtype=torch.float32, device=q.device)
    state = new_state if state is None else state
    out = _launch_attention(
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
    """Output [B, 1, H, V] of one token; the new state is written over `state`."""
    new_state = state if state.is_contiguous() else torch.empty_like(
        state, memory_format=torch.contiguous_format
    )  # fmt: skip
    out = _launch_attention(
        q, gate_logits, v, aug, out_gate, out_gate_bias, state, new_state, tau, scale, norm_eps
    )
    if new_state is not state:
        state.copy_(new_state)
    return out


@attention_.register_fake
def _(q, gate_logits, v, aug, out_gate, out_gate_bias, state, tau, scale, norm_eps):
    return v.new_empty(v.shape)


def _launch_convolution(x, weight, state, new_state, silu) -> Tensor:
    x = _side_by_side(x)
    batch, _, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(512, triton.next_power_of_2(channels))
    with torch.cuda.device_of(x):
        convolution_step[(batch, triton.cdiv(channels, block))](
            x, weight.contiguous(), None if state is None else state.contiguous(), new_state, y,
            x.stride(0), D=channels, W=weight.shape[-1], BD=block, SILU=silu,
            HAS_STATE=state is not None,
        )  # fmt: skip
    return y


@torch.library.custom_op("metala::convolution_step", mutates_args=())
def convolution(
    x: Tensor, weight: Tensor, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y [B, 1, D] and new state [B, D, W - 1] of one token."""
    new_state = x.new_empty(x.shape[0], x.shape[2], weight.shape[2] - 1)
    return _launch_convolution(x, weight, state, new_state, silu), new_state


@convolution.register_fake
def _(x, weight, state, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], weight.shape[2] - 1)


@torch.library.custom_op("metala::convolution_step_", mutates_args=("state",))
def convolution_(x: Tensor, weight: Tensor, state: Tensor, silu: bool) -> Tensor:
    """y [B, 1, D] of one token; the new state is written over `state`."""
    new_state = state if state.is_contiguous() else torch.empty_like(
        state, memory_format=torch.contiguous_format
    )  # fmt: skip
    y = _launch_convolution(x, weight, state, new_state, silu)
    if new_state is not state:
        state.copy_(new_state)
    return y


@convolution_.register_fake
def _(x, weight, state, silu):
    return x.new_empty(x.shape)
