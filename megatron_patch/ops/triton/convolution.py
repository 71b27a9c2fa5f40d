"""The short convolution with SiLU as two kernels, forward and backward, and as custom operators of
PyTorch.

A program of one warp walks along a run of tokens, forwards, or backwards for the gradients, with a
few channels per thread and the last W - 1 rows in registers: each row is read once, in words of 16
bytes. Rows of packed sequences before a token's own first are read too, and dropped where they are
used. Beside the runs, one program per sequence writes its final state, or its initial state's
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_patch.ops.triton.differentiable import differentiable
from megatron_patch.ops.triton.tiles import sigmoid

# Tokens per program: longer runs read fewer rows twice, and give fewer shares of the weight's
# gradient; shorter ones fill the GPU.
FORWARD_RUN, BACKWARD_RUN = 32, 64
FORWARD_ROWS, BACKWARD_ROWS = 8, 4  # read at once: as many as registers hold


@triton.jit
def sequence_of(t, bounds, sequences):
    """The packed sequence that token t lies in; the last for tokens behind all of them."""
    low = 0
    high = sequences
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(bounds + middle).to(tl.int32) <= t:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def only_if(condition, mask):
    """mask & condition, a scalar: the interpreter's `&` of the two is no mask."""
    return tl.where(condition, mask, False)


@triton.jit
def rows_of(x, first, T, stride, columns, D: tl.constexpr, COUNT: tl.constexpr):
    """Rows first .. first + COUNT - 1 of x, zeros where there are none."""
    rows = ()
    for row in tl.static_range(COUNT):
        t = first + row
        mask = only_if((t >= 0) & (t < T), columns < D)
        rows = rows + (tl.load(x + t.to(tl.int64) * stride + columns, mask=mask, other=0.0),)
    return rows


@triton.jit
def input_at(
    row,
    t,
    start,
    end,
    state,
    n,
    columns,
    D: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """Input t of the sequence start .. end - 1, in float32: `row`, or for t < start what stands in
    state n of [N, D, W - 1]. Zero behind the end, where `row` may be anything."""
    value = row.to(tl.float32)
    if PACKED or HAS_STATE:
        value = tl.where((t < start) | (t >= end), 0.0, value)
    if HAS_STATE:
        before = state + n * (D * (W - 1)) + columns * (W - 1) + (t - start + W - 1)
        value += tl.load(before, mask=only_if(t < start, columns < D), other=0.0).to(tl.float32)
    return value


@triton.jit
def weights_of(weight, columns, D: tl.constexpr, W: tl.constexpr):
    """The taps [D] of weight [D, W], in float32."""
    taps = ()
    for tap in tl.static_range(W):
        value = tl.load(weight + columns * W + tap, mask=columns < D, other=0.0)
        taps = taps + (value.to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=["T", "sequences"])
def forward(
    x,
    weight,
    state,
    y,
    final_state,
    bounds,
    T,
    sequences,
    x_b,
    x_t,
    y_b,
    y_t,
    D: tl.constexpr,
    W: tl.constexpr,
    RUN: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """y = silu(convolution of x). Grid: (runs, then sequences if there is a final state; channels).

    bounds: [N + 1], or unused with one sequence per batch entry.
    """
    unit = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    runs = tl.cdiv(T, RUN)
    units = runs
    if not PACKED:
        units = runs * sequences

    if unit >= units:
        n = (unit - units).to(tl.int64)
        start = 0
        end = T
        if PACKED:
            start = tl.load(bounds + n).to(tl.int32)
            end = tl.load(bounds + n + 1).to(tl.int32)
        else:
            x += n * x_b
        final_state += n * (D * (W - 1))
        first = end - (W - 1)
        rows = rows_of(x, first, T, x_t, columns, D, W - 1)
        for past in tl.static_range(W - 1):
            value = input_at(
                rows[past], first + past, start, end, state, n, columns, D, W, PACKED, HAS_STATE
            )
            at = final_state + columns * (W - 1) + past
            tl.store(at, value.to(final_state.dtype.element_ty), mask=inside)
        return

    first = (unit % runs) * RUN
    start = 0
    end = T
    n = (unit // runs).to(tl.int64)
    if PACKED:
        n = sequence_of(first, bounds, sequences).to(tl.int64)
        start = tl.load(bounds + n).to(tl.int32)
        end = tl.load(bounds + n + 1).to(tl.int32)
    else:
        x += n * x_b
        y += n * y_b
    taps = weights_of(weight, columns, D, W)
    before = rows_of(x, first - (W - 1), T, x_t, columns, D, W - 1)
    for chunk in range(first, tl.minimum(first + RUN, T), R):
        rows = before + rows_of(x, chunk, T, x_t, columns, D, R)
        for row in tl.static_range(R):
            t = chunk + row
            if PACKED:
                while (t >= end) & (n + 1 < sequences):
                    n += 1
                    start = end
                    end = tl.load(bounds + n + 1).to(tl.int32)
            total = tl.zeros([BD], tl.float32)
            for tap in tl.static_range(W):
                total += taps[tap] * input_at(
                    rows[row + tap], t - (W - 1) + tap, start, end, state, n,
                    columns, D, W, PACKED, HAS_STATE and tap < W - 1,
                )  # fmt: skip
            if SILU:
                total *= sigmoid(total)
            if PACKED:
                total = tl.where(t < end, total, 0.0)
            at = y + t.to(tl.int64) * y_t + columns
            tl.store(at, total.to(y.dtype.element_ty), mask=only_if(t < T, inside))
        before = rows[R : R + W - 1]


@triton.jit
def sum_gradient(
    d_y,
    inputs,
    taps,
    alive,
    W: tl.constexpr,
    SILU: tl.constexpr,
):
    """The gradient of a token's weighted sum of its W inputs, from that of y; zero if not alive."""
    gradient = d_y.to(tl.float32)
    if SILU:
        total = taps[0] * inputs[0]
        for tap in tl.static_range(1, W):
            total += taps[tap] * inputs[tap]
        s = sigmoid(total)
        gradient *= s * (1.0 + total * (1.0 - s))
    return tl.where(alive, gradient, 0.0)


@triton.jit
def inputs_of(
    rows,
    t,
    start,
    end,
    state,
    n,
    columns,
    D: tl.constexpr,
    W: tl.constexpr,
    FROM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """The W inputs of token t, of which the first lies in rows[FROM]."""
    inputs = ()
    for tap in tl.static_range(W):
        inputs = inputs + (
            input_at(
                rows[FROM + tap], t - (W - 1) + tap, start, end, state, n, columns, D, W,
                PACKED, HAS_STATE and tap < W - 1,
            ),
        )  # fmt: skip
    return inputs


@triton.jit
def unless(condition, x, PACKED: tl.constexpr):
    """x, or zeros where packed sequences meet."""
    if PACKED:
        x = tl.where(condition, 0.0, x)
    return x


@triton.jit(do_not_specialize=["T", "sequences"])
def backward(
    x,
    weight,
    state,
    d_y,
    d_final_state,
    d_x,
    d_weight,
    d_state,
    bounds,
    T,
    sequences,
    x_b,
    x_t,
    d_y_b,
    d_y_t,
    d_x_b,
    d_x_t,
    D: tl.constexpr,
    W: tl.constexpr,
    RUN: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):
    """Gradients of x, of the initial state, and each run's share of the weight's, d_weight
    [runs, W, D] float32. Grid: (runs, then sequences if there is an initial state; channels)."""
    unit = tl.program_id(0)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = columns < D
    runs = tl.cdiv(T, RUN)
    units = runs
    if not PACKED:
        units = runs * sequences
    taps = weights_of(weight, columns, D, W)

    if unit >= units:
        n = (unit - units).to(tl.int64)
        start = 0
        end = T
        if PACKED:
            start = tl.load(bounds + n).to(tl.int32)
            end = tl.load(bounds + n + 1).to(tl.int32)
        else:
            x += n * x_b
            d_y += n * d_y_b
        own = n * (D * (W - 1)) + columns * (W - 1)
        # State `past` is read by the tokens start .. start + past.
        rows = rows_of(x, start - (W - 1), T, x_t, columns, D, 2 * (W - 1))
        d_rows = rows_of(d_y, start, T, d_y_t, columns, D, W - 1)
        gradients = ()
        for row in tl.static_range(W - 1):
            t = start + row
            inputs = inputs_of(
                rows,
                t,
                start,
                end,
                state,
                n,
                columns,
                D,
                W,
                row,
                PACKED,
                HAS_STATE,
            )
            gradients = gradients + (sum_gradient(d_rows[row], inputs, taps, t < end, W, SILU),)
        for past in tl.static_range(W - 1):
            total = tl.zeros([BD], tl.float32)
            for row in tl.static_range(past + 1):
                total += taps[past - row] * gradients[row]
            if HAS_FINAL:
                kept = past - (end - start)  # where a short sequence leaves it in its final state
                mask = only_if(kept >= 0, inside)
                total += tl.load(d_final_state + own + kept, mask=mask, other=0.0).to(tl.float32)
            tl.store(d_state + own + past, total.to(d_state.dtype.element_ty), mask=inside)
        return

    first = (unit % runs) * RUN
    last = first + tl.cdiv(tl.minimum(RUN, T - first), R) * R  # tokens from T on count as zeros
    start = 0
    end = T
    n = (unit // runs).to(tl.int64)
    if PACKED:
        n = sequence_of(tl.minimum(last + W - 2, T - 1), bounds, sequences).to(tl.int64)
        start = tl.load(bounds + n).to(tl.int32)
        end = tl.load(bounds + n + 1).to(tl.int32)
    else:
        x += n * x_b
        d_y += n * d_y_b
        d_x += n * d_x_b

    # The gradients of the W - 1 tokens behind the run, which its last tokens also reach.
    halo = rows_of(x, last - (W - 1), T, x_t, columns, D, 2 * (W - 1))
    d_halo = rows_of(d_y, last, T, d_y_t, columns, D, W - 1)
    later = ()
    shares = (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W - 1):
        later = later + (tl.zeros([BD], tl.float32),)
        shares = shares + (tl.zeros([BD], tl.float32),)
    for back in tl.static_range(W - 1):
        t = last + (W - 2 - back)
        if PACKED:
            while (t < start) & (n > 0):
                n -= 1
                end = start
                start = tl.load(bounds + n).to(tl.int32)
        inputs = inputs_of(
            halo, t, start, end, state, n, columns, D, W, W - 2 - back,
            PACKED, HAS_STATE,
        )  # fmt: skip
        gradient = sum_gradient(d_halo[W - 2 - back], inputs, taps, t < end, W, SILU)
        behind = ()
        for tap in tl.static_range(W - 2):
            behind = behind + (unless(t == end - 1, later[tap], PACKED),)
        later = (gradient,) + behind
    after = halo[: W - 1]

    for step in range(0, last - first, R):
        chunk = last - R - step
        rows = rows_of(x, chunk - (W - 1), T, x_t, columns, D, R) + after
        d_rows = rows_of(d_y, chunk, T, d_y_t, columns, D, R)
        for back in tl.static_range(R):
            t = chunk + (R - 1 - back)
            if PACKED:
                while (t < start) & (n > 0):
                    n -= 1
                    end = start
                    start = tl.load(bounds + n).to(tl.int32)
            inputs = inputs_of(
                rows,
                t,
                start,
                end,
                state,
                n,
                columns,
                D,
                W,
                R - 1 - back,
                PACKED,
                HAS_STATE,
            )
            gradient = sum_gradient(d_rows[R - 1 - back], inputs, taps, t < end, W, SILU)
            total = taps[W - 1] * gradient
            kept = ()
            for tap in tl.static_range(W - 1):
                # No token reads one of the next sequence.
                kept = kept + (unless(t == end - 1, later[tap], PACKED),)
                total += taps[W - 2 - tap] * kept[tap]
            sums = ()
            for tap in tl.static_range(W):
                sums = sums + (shares[tap] + gradient * inputs[tap],)
            if HAS_FINAL:
                past = W - 1 - (end - t)
                own = d_final_state + n * (D * (W - 1)) + columns * (W - 1) + past
                mask = only_if((past >= 0) & (t < end), inside)
                total += tl.load(own, mask=mask, other=0.0).to(tl.float32)
            at = d_x + t.to(tl.int64) * d_x_t + columns
            tl.store(at, total.to(d_x.dtype.element_ty), mask=only_if(t < T, inside))
            shares = sums
            later = ((gradient,) + kept)[: W - 1]
        after = rows[: W - 1]
    for tap in tl.static_range(W):
        at = d_weight + unit.to(tl.int64) * (W * D) + tap * D + columns
        tl.store(at, shares[tap], mask=inside)


class _Call:
    """What the launches of both passes share."""

    def __init__(
        self, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, silu: bool, run: int, rows: int
    ):
        self.batch, self.time, self.channels = x.shape
        self.width = weight.shape[-1]
        self.packed = cu_seqlens is not None
        self.sequences = len(cu_seqlens) - 1 if self.packed else self.batch
        self.units = self.batch * triton.cdiv(self.time, run)
        block = min(512 // x.element_size(), triton.next_power_of_2(self.channels))
        self.blocks = triton.cdiv(self.channels, block)
        self.numbers = self.time, self.sequences
        self.options = dict(
            D=self.channels,
            W=self.width,
            RUN=run,
            R=rows,
            BD=block,
            SILU=silu,
            PACKED=self.packed,
            num_warps=1,
        )

    def state_like(self, x: Tensor) -> Tensor:
        return x.new_empty(self.sequences, self.channels, self.width - 1)


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side in memory, as the kernels read it."""
    return x if x.stride(2) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _run_forward(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y, contiguous, and the final state, empty if not wanted. Sums are float32."""
    call = _Call(x, weight, cu_seqlens, silu, FORWARD_RUN, FORWARD_ROWS)
    x = _rows(x)
    y = x.new_empty(x.shape)
    final_state = call.state_like(x) if output_final_state else x.new_empty(0)
    states = call.sequences if output_final_state else 0
    with torch.cuda.device_of(x):
        forward[(call.units + states, call.blocks)](
            x, weight.contiguous(), _contiguous(initial_state), y, final_state, cu_seqlens,
            *call.numbers, *x.stride()[:2], *y.stride()[:2],
            HAS_STATE=initial_state is not None, **call.options,
        )  # fmt: skip
    return y, final_state


def _run_backward(
    d_y: Tensor,
    d_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, with its strides, of the weight and of the initial state, empty if there was
    none."""
    call = _Call(x, weight, cu_seqlens, silu, BACKWARD_RUN, BACKWARD_ROWS)
    x, d_y = _rows(x), _rows(d_y)
    d_x = torch.empty_like(x)
    shape = (call.units, call.width, call.channels)
    shares = torch.empty(shape, dtype=torch.float32, device=x.device)
    has_state = initial_state is not None
    d_state = call.state_like(x) if has_state else x.new_empty(0)
    states = call.sequences if has_state else 0
    with torch.cuda.device_of(x):
        backward[(call.units + states, call.blocks)](
            x, weight.contiguous(), _contiguous(initial_state), d_y, _contiguous(d_final_state),
            d_x, shares, d_state, cu_seqlens, *call.numbers,
            *x.stride()[:2], *d_y.stride()[:2], *d_x.stride()[:2],
            HAS_STATE=has_state, HAS_FINAL=d_final_state is not None, **call.options,
        )  # fmt: skip
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    d_weight[:, 0] = shares.sum(0).t()
    return d_x, d_weight, d_state


_forward = torch.library.custom_op("metala::short_convolution", _run_forward, mutates_args=())
_backward = torch.library.custom_op(
    "metala::short_convolution_backward", _run_backward, mutates_args=()
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
    return torch.empty_like(_rows(x)), weight.new_empty(weight.shape), d_state


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
    run = _run_backward if eager else _backward
    d_x, d_weight, d_state = run(d_y, d_final_state, x, weight, initial_state, cu_seqlens, ctx.silu)
    return d_x, d_weight, d_state if initial_state is not None else None, None, None, None


short_convolution = differentiable(_forward, _run_forward, _setup_context, _gradients)
