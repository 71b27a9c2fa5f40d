"""The short depthwise causal convolution with SiLU: a forward and a backward kernel, custom
operators of PyTorch, and the public function.

A program of one warp walks a run of tokens (backwards for gradients) with a few channels per thread
and the last W - 1 rows in registers, W being the kernel size. So it reads each row once, in words
of 16 bytes. With packed sequences it also reads rows of the neighbouring sequence, and drops them
where they would be used. One extra program per sequence writes its final state, or the gradient of
its initial state.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.torch_ops import give_state
from megatron_patch.ops.triton import fused_recurrent
from megatron_patch.ops.triton.launch import (
    cdiv,
    contiguous,
    differentiable,
    is_decoding_step,
    last_stride_one,
    launch,
)
from megatron_patch.ops.triton.tiles import sigmoid

# Tokens per program. Longer runs read fewer rows twice and leave fewer partial sums of the weight's
# gradient; shorter ones fill the GPU.
FORWARD_RUN, BACKWARD_RUN = 32, 64
FORWARD_ROWS, BACKWARD_ROWS = 8, 4  # rows loaded at once, as many as fit in registers


@triton.jit
def channels_and_runs(
    T, sequences, D: tl.constexpr, RUN: tl.constexpr, BD: tl.constexpr, IS_VARLEN: tl.constexpr
):
    """Returns this program's channels, which of them exist, and the number of runs of a sequence
    and of all; packed sequences count as one."""
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    runs = tl.cdiv(T, RUN)
    all_runs = runs
    if not IS_VARLEN:
        all_runs = runs * sequences
    return columns, columns < D, runs, all_runs


@triton.jit
def bounds_of(n, cu_seqlens, T):
    """Returns the first token of sequence n and the end of its last."""
    start = 0
    end = T
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    return start, end


@triton.jit
def sequence_of(t, n, cu_seqlens, sequences, T):
    """Returns (start, end, index) of the sequence that token t lies in: found by binary search if
    sequences are packed (the last one for tokens behind them all), or else batch entry n."""
    start = 0
    end = T
    n = n.to(tl.int64)
    if cu_seqlens is not None:
        low = 0
        high = sequences
        while low + 1 < high:
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle).to(tl.int32) <= t:
                low = middle
            else:
                high = middle
        n = low.to(tl.int64)
        start = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    return start, end, n


@triton.jit
def step_back(t, start, end, n, cu_seqlens):
    """Returns (start, end, index) of the sequence that token t lies in, from those of a later
    one."""
    if cu_seqlens is not None:
        while (t < start) & (n > 0):
            n -= 1
            end = start
            start = tl.load(cu_seqlens + n).to(tl.int32)
    return start, end, n


@triton.jit
def mask_if(condition, mask):
    """Returns mask & condition for a scalar condition, which the interpreter's `&` cannot do."""
    return tl.where(condition, mask, False)


@triton.jit
def load_rows(x, first, T, stride, columns, D: tl.constexpr, COUNT: tl.constexpr):
    """Returns the rows first .. first + COUNT - 1 of x, zeros outside 0 .. T - 1."""
    rows = ()
    for i in tl.static_range(COUNT):
        t = first + i
        mask = mask_if((t >= 0) & (t < T), columns < D)
        rows = rows + (tl.load(x + t.to(tl.int64) * stride + columns, mask=mask, other=0.0),)
    return rows


@triton.jit
def load_weights(weight, columns, D: tl.constexpr, W: tl.constexpr):
    """Returns the W weights of each channel in float32."""
    weights = ()
    for i in tl.static_range(W):
        value = tl.load(weight + columns * W + i, mask=columns < D, other=0.0)
        weights = weights + (value.to(tl.float32),)
    return weights


@triton.jit
def input_at(
    row, t, start, end, state, n, columns, D: tl.constexpr, W: tl.constexpr, IS_VARLEN: tl.constexpr
):
    """Returns input t of the sequence start .. end - 1 in float32: `row`, or for t < start the
    entry of state n [N, D, W - 1]. Zero from `end` on, where `row` may hold anything."""
    value = row.to(tl.float32)
    if IS_VARLEN or state is not None:
        value = tl.where((t < start) | (t >= end), 0.0, value)
    if state is not None:
        before = state + n * (D * (W - 1)) + columns * (W - 1) + (t - start + W - 1)
        value += tl.load(before, mask=mask_if(t < start, columns < D), other=0.0).to(tl.float32)
    return value


@triton.jit
def inputs_of(
    rows, t, start, end, state, n, columns, D: tl.constexpr, W: tl.constexpr,
    FIRST: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Returns the W inputs of token t, of which the first is rows[FIRST]."""
    inputs = ()
    for i in tl.static_range(W):
        # The last input is the token itself, which is never in the state.
        inputs = inputs + (
            input_at(
                rows[FIRST + i], t - (W - 1) + i, start, end, state if i < W - 1 else None, n,
                columns, D, W, IS_VARLEN,
            ),
        )  # fmt: skip
    return inputs


@triton.jit(do_not_specialize=["T", "sequences"])
def convolution_fwd_kernel(
    x, weight, state, y, final_state, cu_seqlens, T, sequences, x_strides, y_strides,
    D: tl.constexpr, W: tl.constexpr, RUN: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """y = silu(convolution of x). Grid: (runs, plus sequences to write final states; channels).

    state [N, D, W - 1] and cu_seqlens [N + 1] may be `None`. Strides are those of (batch, time).
    """
    IS_VARLEN: tl.constexpr = cu_seqlens is not None
    x_b, x_t = x_strides
    y_b, y_t = y_strides
    program = tl.program_id(0)
    columns, inside, runs, all_runs = channels_and_runs(T, sequences, D, RUN, BD, IS_VARLEN)

    if program >= all_runs:
        n = (program - all_runs).to(tl.int64)
        start, end = bounds_of(n, cu_seqlens, T)
        if not IS_VARLEN:
            x += n * x_b
        final_state += n * (D * (W - 1))
        first = end - (W - 1)
        rows = load_rows(x, first, T, x_t, columns, D, W - 1)
        for i in tl.static_range(W - 1):
            value = input_at(rows[i], first + i, start, end, state, n, columns, D, W, IS_VARLEN)
            at = final_state + columns * (W - 1) + i
            tl.store(at, value.to(final_state.dtype.element_ty), mask=inside)
        return

    first = (program % runs) * RUN
    start, end, n = sequence_of(first, program // runs, cu_seqlens, sequences, T)
    if not IS_VARLEN:
        x += n * x_b
        y += n * y_b
    weights = load_weights(weight, columns, D, W)
    before = load_rows(x, first - (W - 1), T, x_t, columns, D, W - 1)
    for block in range(first, tl.minimum(first + RUN, T), R):
        rows = before + load_rows(x, block, T, x_t, columns, D, R)
        for row in tl.static_range(R):
            t = block + row
            if IS_VARLEN:
                while (t >= end) & (n + 1 < sequences):
                    n += 1
                    start = end
                    end = tl.load(cu_seqlens + n + 1).to(tl.int32)
            total = tl.zeros([BD], tl.float32)
            for i in tl.static_range(W):
                total += weights[i] * input_at(
                    rows[row + i], t - (W - 1) + i, start, end, state if i < W - 1 else None, n,
                    columns, D, W, IS_VARLEN,
                )  # fmt: skip
            if SILU:
                total *= sigmoid(total)
            if IS_VARLEN:
                total = tl.where(t < end, total, 0.0)
            at = y + t.to(tl.int64) * y_t + columns
            tl.store(at, total.to(y.dtype.element_ty), mask=mask_if(t < T, inside))
        before = rows[R : R + W - 1]


@triton.jit
def sum_gradient(d_y, inputs, weights, alive, W: tl.constexpr, SILU: tl.constexpr):
    """Returns the gradient of a token's weighted sum of its inputs from that of y; zero unless
    alive."""
    gradient = d_y.to(tl.float32)
    if SILU:
        total = weights[0] * inputs[0]
        for i in tl.static_range(1, W):
            total += weights[i] * inputs[i]
        s = sigmoid(total)
        gradient *= s * (1.0 + total * (1.0 - s))
    return tl.where(alive, gradient, 0.0)


@triton.jit
def zero_if(condition, x, IS_VARLEN: tl.constexpr):
    """Returns x, or with packed sequences zeros where the condition holds."""
    if IS_VARLEN:
        x = tl.where(condition, 0.0, x)
    return x


@triton.jit(do_not_specialize=["T", "sequences"])
def convolution_bwd_kernel(
    x, weight, state, d_y, d_final_state, d_x, d_weight, d_state, cu_seqlens, T, sequences,
    x_strides, d_y_strides, d_x_strides,
    D: tl.constexpr, W: tl.constexpr, RUN: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of x and of the initial state, and the partial sum of the weight's
    gradient of each run, d_weight [runs, W, D] float32. d_final_state may be `None`.

    Grid: (runs, plus sequences if there is an initial state; channels).
    """
    IS_VARLEN: tl.constexpr = cu_seqlens is not None
    x_b, x_t = x_strides
    d_y_b, d_y_t = d_y_strides
    d_x_b, d_x_t = d_x_strides
    program = tl.program_id(0)
    columns, inside, runs, all_runs = channels_and_runs(T, sequences, D, RUN, BD, IS_VARLEN)
    weights = load_weights(weight, columns, D, W)

    if program >= all_runs:
        n = (program - all_runs).to(tl.int64)
        start, end = bounds_of(n, cu_seqlens, T)
        if not IS_VARLEN:
            x += n * x_b
            d_y += n * d_y_b
        own = n * (D * (W - 1)) + columns * (W - 1)
        # Entry i of the state is read by the tokens start .. start + i.
        rows = load_rows(x, start - (W - 1), T, x_t, columns, D, 2 * (W - 1))
        d_rows = load_rows(d_y, start, T, d_y_t, columns, D, W - 1)
        gradients = ()
        for row in tl.static_range(W - 1):
            t = start + row
            inputs = inputs_of(rows, t, start, end, state, n, columns, D, W, row, IS_VARLEN)
            gradients = gradients + (sum_gradient(d_rows[row], inputs, weights, t < end, W, SILU),)
        for i in tl.static_range(W - 1):
            total = tl.zeros([BD], tl.float32)
            for row in tl.static_range(i + 1):
                total += weights[i - row] * gradients[row]
            if d_final_state is not None:
                kept = i - (end - start)  # where a short sequence leaves it in its final state
                mask = mask_if(kept >= 0, inside)
                total += tl.load(d_final_state + own + kept, mask=mask, other=0.0).to(tl.float32)
            tl.store(d_state + own + i, total.to(d_state.dtype.element_ty), mask=inside)
        return

    first = (program % runs) * RUN
    last = first + tl.cdiv(tl.minimum(RUN, T - first), R) * R  # tokens from T on count as zeros
    behind = tl.minimum(last + W - 2, T - 1)
    start, end, n = sequence_of(behind, program // runs, cu_seqlens, sequences, T)
    if not IS_VARLEN:
        x += n * x_b
        d_y += n * d_y_b
        d_x += n * d_x_b

    # The gradients of the W - 1 tokens behind the run, which its last tokens also reach.
    halo = load_rows(x, last - (W - 1), T, x_t, columns, D, 2 * (W - 1))
    d_halo = load_rows(d_y, last, T, d_y_t, columns, D, W - 1)
    later = ()
    d_weights = (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W - 1):
        later = later + (tl.zeros([BD], tl.float32),)
        d_weights = d_weights + (tl.zeros([BD], tl.float32),)
    for back in tl.static_range(W - 1):
        t = last + (W - 2 - back)
        start, end, n = step_back(t, start, end, n, cu_seqlens)
        inputs = inputs_of(halo, t, start, end, state, n, columns, D, W, W - 2 - back, IS_VARLEN)
        gradient = sum_gradient(d_halo[W - 2 - back], inputs, weights, t < end, W, SILU)
        reaching = ()
        for i in tl.static_range(W - 2):
            reaching = reaching + (zero_if(t == end - 1, later[i], IS_VARLEN),)
        later = (gradient,) + reaching
    after = halo[: W - 1]

    for step in range(0, last - first, R):
        block = last - R - step
        rows = load_rows(x, block - (W - 1), T, x_t, columns, D, R) + after
        d_rows = load_rows(d_y, block, T, d_y_t, columns, D, R)
        for back in tl.static_range(R):
            t = block + (R - 1 - back)
            start, end, n = step_back(t, start, end, n, cu_seqlens)
            inputs = inputs_of(
                rows, t, start, end, state, n, columns, D, W, R - 1 - back, IS_VARLEN
            )
            gradient = sum_gradient(d_rows[R - 1 - back], inputs, weights, t < end, W, SILU)
            total = weights[W - 1] * gradient
            kept = ()
            for i in tl.static_range(W - 1):
                # No token of the next sequence reads this one.
                kept = kept + (zero_if(t == end - 1, later[i], IS_VARLEN),)
                total += weights[W - 2 - i] * kept[i]
            sums = ()
            for i in tl.static_range(W):
                sums = sums + (d_weights[i] + gradient * inputs[i],)
            if d_final_state is not None:
                past = W - 1 - (end - t)
                own = d_final_state + n * (D * (W - 1)) + columns * (W - 1) + past
                mask = mask_if((past >= 0) & (t < end), inside)
                total += tl.load(own, mask=mask, other=0.0).to(tl.float32)
            at = d_x + t.to(tl.int64) * d_x_t + columns
            tl.store(at, total.to(d_x.dtype.element_ty), mask=mask_if(t < T, inside))
            d_weights = sums
            later = ((gradient,) + kept)[: W - 1]
        after = rows[: W - 1]
    for i in tl.static_range(W):
        at = d_weight + program.to(tl.int64) * (W * D) + i * D + columns
        tl.store(at, d_weights[i], mask=inside)


class _Call:
    """Sizes, grid and options that the launches of both passes share."""

    def __init__(
        self, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, silu: bool, run: int, rows: int
    ):
        batch, time, self.channels = x.shape
        self.width = weight.shape[-1]
        self.sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.runs = batch * cdiv(time, run)
        block = min(512 // x.element_size(), triton.next_power_of_2(self.channels))
        self.blocks = cdiv(self.channels, block)
        self.numbers = time, self.sequences
        self.options = dict(
            D=self.channels, W=self.width, RUN=run, R=rows, BD=block, SILU=silu, num_warps=1
        )

    def grid(self, with_states: bool) -> tuple[int, int]:
        return self.runs + (self.sequences if with_states else 0), self.blocks

    def new_state(self, x: Tensor) -> Tensor:
        return x.new_empty(self.sequences, self.channels, self.width - 1)


def convolution_fwd(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """Returns y, contiguous, and the final state, empty if not wanted. Sums are float32."""
    call = _Call(x, weight, cu_seqlens, silu, FORWARD_RUN, FORWARD_ROWS)
    x = last_stride_one(x)
    y = x.new_empty(x.shape)
    final_state = call.new_state(x) if output_final_state else x.new_empty(0)
    with torch.cuda.device_of(x):
        launch(
            convolution_fwd_kernel, call.grid(output_final_state),
            (x, weight.contiguous(), contiguous(initial_state), y, final_state, cu_seqlens),
            (*call.numbers, x.stride()[:2], y.stride()[:2]), **call.options,
        )  # fmt: skip
    return y, final_state


def convolution_bwd(
    d_y: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x (with its strides), of the weight, and of the initial state, empty
    if there was none."""
    call = _Call(x, weight, cu_seqlens, silu, BACKWARD_RUN, BACKWARD_ROWS)
    x, d_y = last_stride_one(x), last_stride_one(d_y)
    d_x = torch.empty_like(x)
    shape = (call.runs, call.width, call.channels)
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    has_state = initial_state is not None
    d_state = call.new_state(x) if has_state else x.new_empty(0)
    with torch.cuda.device_of(x):
        launch(
            convolution_bwd_kernel, call.grid(has_state),
            (
                x, weight.contiguous(), contiguous(initial_state), d_y, contiguous(d_final_state),
                d_x, partials, d_state, cu_seqlens,
            ),
            (*call.numbers, x.stride()[:2], d_y.stride()[:2], d_x.stride()[:2]), **call.options,
        )  # fmt: skip
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    d_weight[:, 0] = partials.sum(0).t()
    return d_x, d_weight, d_state


_forward = torch.library.custom_op("metala::short_convolution", convolution_fwd, mutates_args=())
_backward = torch.library.custom_op(
    "metala::short_convolution_backward", convolution_bwd, mutates_args=()
)


@_forward.register_fake
def _(x, weight, initial_state, cu_seqlens, silu, output_final_state):
    y = x.new_empty(x.shape)
    if not output_final_state:
        return y, x.new_empty(0)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return y, x.new_empty(sequences, x.shape[2], weight.shape[2] - 1)


@_backward.register_fake
def _(d_y, d_final_state, x, weight, initial_state, cu_seqlens, silu):
    d_state = x.new_empty(0 if initial_state is None else initial_state.shape)
    return torch.empty_like(last_stride_one(x)), weight.new_empty(weight.shape), d_state


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, eager: bool, d_y: Tensor | None, d_final_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, initial_state, cu_seqlens = ctx.saved_tensors
    if d_final_state is not None and d_final_state.numel() == 0:
        d_final_state = None
    if d_y is None:
        if d_final_state is None:
            return (None,) * 6
        d_y = torch.zeros_like(x)
    run = convolution_bwd if eager else _backward
    d_x, d_weight, d_state = run(d_y, d_final_state, x, weight, initial_state, cu_seqlens, ctx.silu)
    return d_x, d_weight, d_state if initial_state is not None else None, None, None, None


_with_gradients = differentiable(_forward, convolution_fwd, _setup_context, _gradients, 2)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    activation: str | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    inplace_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Computes `megatron_patch.ops.short_convolution` on arguments that it has checked."""
    silu = activation == "silu"
    if is_decoding_step(x, cu_seqlens, x, weight, initial_state):
        if inplace_final_state:
            return fused_recurrent.convolution_(x, weight, initial_state, silu), initial_state
        y, final_state = fused_recurrent.convolution(x, weight, initial_state, silu)
        return y, final_state if output_final_state else None
    y, final_state = _with_gradients(
        x, weight, initial_state, cu_seqlens, silu, output_final_state or inplace_final_state
    )
    return y, give_state(final_state, initial_state, output_final_state, inplace_final_state)
