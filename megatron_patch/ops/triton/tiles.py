"""What the kernels share: where chunks lie, and the arithmetic of decays, scores and products.

Tiles are [C, BK] or [C, BV]: C tokens of a chunk by a padded width. Log decays are in base 2, so
that `exp2` is one instruction. Rows past the sequence's end hold zeros, and zero log decay.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter has neither assembly nor products of bfloat16 matrices.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
# Where a chunk's whole log decay is below this in any channel, its scores do not factor
# (`factors`). With m half of the log decay, factors stay within 2^+-58, and the scores above the
# diagonal, which are dropped, within 2^116 times q k: inside the range of float32 and bfloat16.
FACTOR_LIMIT = tl.constexpr(-116.0)
# 2^-300 is zero in float32. The bound keeps sums of log decays finite for any gate logits.
LOWEST_LOG_DECAY = tl.constexpr(-300.0)


@triton.jit
def locate(unit, units, table, bounds, T, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Where the chunk or segment `unit` lies, as int64: sequence (negative: none), index within it,
    the table's link, batch entry, first token and the token after the last of the sequence."""
    if PACKED:
        sequence = tl.load(table + unit * 3).to(tl.int64)
        index = tl.load(table + unit * 3 + 1).to(tl.int64)
        link = tl.load(table + unit * 3 + 2).to(tl.int64)
        known = tl.maximum(sequence, 0)
        start = tl.load(bounds + known).to(tl.int64) + index * SIZE
        end = tl.load(bounds + known + 1).to(tl.int64)
        batch = sequence * 0
    else:
        sequence = (unit // units).to(tl.int64)
        index = (unit % units).to(tl.int64)
        link = sequence * 0
        start = index * SIZE
        end = link + T
        batch = sequence
    return sequence, index, link, batch, start, end


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a @ b in float32, with operands in bfloat16, or split in TensorFloat-32."""
    if PRECISION == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        if INTERPRETED:
            return tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            return tl.dot(a, b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    x = 1.0 + tl.exp2(x * -LOG2_E)
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log2(x, PRECISION: tl.constexpr):
    if INTERPRETED or PRECISION != "bf16":
        return tl.log2(x)
    else:
        # One instruction instead of thirty, with an error of 2^-22.
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log_decay(logits, inverse_tau, PRECISION: tl.constexpr):
    """logsigmoid(logits) / tau in base 2, never below `LOWEST_LOG_DECAY`."""
    x = tl.exp2(tl.abs(logits) * -LOG2_E)
    # log(1 + x) loses the digits of small x: a series keeps them.
    if PRECISION == "bf16":
        series = x * (1 - x * (0.5 - x * (1 / 3)))
        log1p = tl.where(x < 0.02, series * LOG2_E, log2(1.0 + x, PRECISION))
    else:
        series = x * (1 - x * (0.5 - x * (1 / 3 - x * (0.25 - x * (0.2 - x * (1 / 6))))))
        log1p = tl.where(x < 0.0625, series * LOG2_E, log2(1.0 + x, PRECISION))
    g = (tl.minimum(logits, 0.0) * LOG2_E - log1p) * inverse_tau
    return tl.where(g < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, g)


@triton.jit
def key(g, PRECISION: tl.constexpr):
    """k = 1 - 2^g, with all digits where the decay is close to one."""
    x = g / LOG2_E
    if PRECISION == "bf16":
        series = -x * (1 + x * (0.5 + x * (1 / 6)))
        return tl.where(x > -0.03, series, 1.0 - tl.exp2(g))
    else:
        series = 1 + x * (1 / 5) * (1 + x * (1 / 6))
        series = -x * (1 + x * 0.5 * (1 + x * (1 / 3) * (1 + x * 0.25 * series)))
        return tl.where(x > -0.125, series, 1.0 - tl.exp2(g))


@triton.jit
def decays(gates, mask, inverse_tau, PRECISION: tl.constexpr):
    """Log decays of the tile behind the pointers `gates`, zero where masked."""
    g = log_decay(tl.load(gates, mask=mask, other=0.0).to(tl.float32), inverse_tau, PRECISION)
    return tl.where(mask, g, 0.0)


@triton.jit
def sums_to_end(x, PRECISION: tl.constexpr):
    """Sums of each row of x and those after it."""
    if PRECISION == "bf16":
        # A forward scan takes two thirds of a reverse scan's instructions.
        return x + (tl.sum(x, 0)[None, :] - tl.cumsum(x, 0))
    else:
        return tl.cumsum(x, 0, reverse=True)


@triton.jit
def until_end(gates, stride, rows, length, k_mask, inverse_tau, PRECISION: tl.constexpr):
    """Log decay after each token to the chunk's end, by summing the later tokens themselves: a
    difference of large sums has no digits left. `gates` point to the tile, rows `stride` apart."""
    later = decays(gates + stride, (rows + 1 < length) & k_mask, inverse_tau, PRECISION)
    return tl.cumsum(later, 0, reverse=True)


@triton.jit
def exact_scores(
    q_row,
    gate_row,
    q_stride,
    gate_stride,
    q_step,
    gate_step,
    length,
    inverse_tau,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores [C, C] of unscaled q for decays of any strength; zeros above the diagonal.

    Token by token: only non-positive numbers are exponentiated, sums are never subtracted. By
    narrow tiles, so that this rare path takes no registers from the usual one.
    q_row, gate_row: the chunk's first row; strides: between rows; steps: between channels.
    """
    rows = tl.arange(0, C)
    scores = tl.zeros([C, C], tl.float32)
    for narrow in range(0, (K + 15) // 16):
        columns = narrow * 16 + tl.arange(0, 16)
        tile = gate_row + rows[:, None] * gate_stride + columns[None, :] * gate_step
        mask = (rows[:, None] < length) & (columns < K)[None, :]
        k = key(decays(tile, mask, inverse_tau, PRECISION), PRECISION)
        between = tl.zeros([C, 16], tl.float32)  # log decay after token j up to token i
        for i in range(0, length):
            q = tl.load(q_row + i * q_stride + columns * q_step, mask=columns < K, other=0.0)
            g = decays(gate_row + i * gate_stride + columns * gate_step, columns < K, inverse_tau,
                       PRECISION)  # fmt: skip
            between = tl.where(rows[:, None] < i, between + g[None, :], 0.0)
            score = tl.sum(k * tl.exp2(between) * q.to(tl.float32)[None, :], 1)
            score = tl.where(rows <= i, score, 0.0)
            scores += tl.where(rows[:, None] == i, score[None, :], 0.0)
    return scores


@triton.jit
def exact_score_gradients(
    d_scores,
    k,
    q_row,
    gate_row,
    q_stride,
    gate_stride,
    q_step,
    gate_step,
    columns,
    length,
    inverse_tau,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients [C, BK] of unscaled q, of k and of log decays, for the channels `columns`, from
    those of `exact_scores`."""
    rows = tl.arange(0, C)
    between = tl.zeros([C, BK], tl.float32)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    dg = tl.zeros([C, BK], tl.float32)
    for i in range(0, length):
        q = tl.load(q_row + i * q_stride + columns * q_step, mask=columns < K, other=0.0)
        q = q.to(tl.float32)[None, :]
        g = decays(gate_row + i * gate_stride + columns * gate_step, columns < K, inverse_tau,
                   PRECISION)  # fmt: skip
        between = tl.where(rows[:, None] < i, between + g[None, :], 0.0)
        d_row = tl.sum(tl.where(rows[:, None] == i, d_scores, 0.0), 0)  # over j
        weight = tl.exp2(between) * tl.where(rows <= i, d_row, 0.0)[:, None]
        dq = tl.where(rows[:, None] == i, tl.sum(weight * k, 0)[None, :], dq)
        weight *= q
        dk += weight
        # The pair (i, j) depends on the decays j + 1 .. i.
        weight = tl.where(rows[:, None] < i, weight * k, 0.0)
        dg += tl.where(rows[:, None] <= i, tl.cumsum(weight, 0) - weight, 0.0)
    return dq, dk, dg
