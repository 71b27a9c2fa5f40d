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
def unit_and_head(H: tl.constexpr, TILES: tl.constexpr = 1):
    """This program's chunk or segment, which TILES programs in a row share, and its head as int64:
    heads first, for they are neighbours in memory."""
    program = tl.program_id(0) // TILES
    return program // H, (program % H).to(tl.int64)


@triton.jit
def locate(unit, units, table, bounds, T, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """Where the chunk or segment `unit` lies, as int64: sequence (negative: none), index within it,
    batch entry, first token and the token after the last of the sequence."""
    if PACKED:
        sequence = tl.load(table + unit * 2).to(tl.int64)
        index = tl.load(table + unit * 2 + 1).to(tl.int64)
        known = tl.maximum(sequence, 0)
        start = tl.load(bounds + known).to(tl.int64) + index * SIZE
        end = tl.load(bounds + known + 1).to(tl.int64)
        batch = sequence * 0
    else:
        sequence = (unit // units).to(tl.int64)
        index = (unit % units).to(tl.int64)
        start = index * SIZE
        end = sequence * 0 + T
        batch = sequence
    return sequence, index, batch, start, end


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
def exp2(x, PRECISION: tl.constexpr):
    """2^x. For bfloat16 one instruction, which flushes results below 2^-126 to zero."""
    if INTERPRETED or PRECISION != "bf16":
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x, to one unit in the last place, by one instruction."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    # What `exp2` flushes to zero is lost beside 1 anyhow.
    return reciprocal(1.0 + exp2(x * -LOG2_E, "bf16"))


@triton.jit
def widen(x):
    """x in float32. Of two bfloat16 numbers in a register by two instructions: alone, Triton takes
    three."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def log_decay(logits, inverse_tau, PRECISION: tl.constexpr):
    """logsigmoid(logits) / tau in base 2; zero for infinite logits."""
    x = exp2(tl.abs(logits) * -LOG2_E, PRECISION)
    # log(1 + x) = x p(x) keeps the digits of small x.
    if PRECISION == "bf16":
        # Fitted on [0, 1]; relative error 8.4e-6.
        p = 0.10122223943 - 0.02386915684 * x
        p = -0.21004858613 + x * p
        p = 0.32520660758 + x * p
        p = -0.49936133623 + x * p
        log1p = x * (0.99999159575 + x * p)
    else:
        # As above; relative error 5.2e-9. `log2` of 1 + x would lose digits where x is below 1.
        p = 0.0195425273 - 0.0031760570 * x
        p = -0.0563736128 + x * p
        p = 0.1054362380 + x * p
        p = -0.1526966707 + x * p
        p = 0.1966327426 + x * p
        p = -0.2495161626 + x * p
        p = 0.3332971050 + x * p
        p = -0.4999989265 + x * p
        log1p = x * (1.0 + x * p)
    return (tl.minimum(logits, 0.0) - log1p) * (inverse_tau * LOG2_E)


@triton.jit
def bounded_log_decay(logits, inverse_tau, PRECISION: tl.constexpr):
    """`log_decay`, never below `LOWEST_LOG_DECAY`."""
    g = log_decay(logits, inverse_tau, PRECISION)
    return tl.where(g < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, g)


@triton.jit
def key(g, PRECISION: tl.constexpr):
    """k = 1 - 2^g, with all digits where the decay is close to one."""
    if PRECISION == "bf16":
        # Fitted on [-1 / 32, 0]; relative error 9.8e-6, and 1.1e-5 where `exp2` serves.
        series = g * (-0.69314042222 - 0.23849897567 * g)
        return tl.where(g > -0.03125, series, 1.0 - exp2(g, PRECISION))
    else:
        # Fitted on [-1, 0]; relative error 1.2e-10.
        p = -0.00014889238 - 0.00001130384 * g
        p = -0.00132993988 + g * p
        p = -0.00961695071 + g * p
        p = -0.05550391387 + g * p
        p = -0.24022649483 + g * p
        series = g * (-0.69314718044 + g * p)
        return tl.where(g > -1.0, series, 1.0 - tl.exp2(g))


@triton.jit
def decays(gates, mask, inverse_tau, PRECISION: tl.constexpr):
    """Log decays of the tile behind the pointers `gates`, zero where masked, never below
    `LOWEST_LOG_DECAY`."""
    logits = tl.load(gates, mask=mask, other=float("inf")).to(tl.float32)
    return bounded_log_decay(logits, inverse_tau, PRECISION)


@triton.jit
def beside(x, product):
    """x in float32, held by the threads that hold `product`, the result of a matrix product of its
    shape: what is computed from both is then computed once, and not once where x was loaded too."""
    x = x.to(tl.float32)
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [x, product], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def hi_lo(x):
    """x as the sum of two bfloat16 numbers, to 2^-17."""
    hi = x.to(tl.bfloat16)
    return hi, (x - hi.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def sums_along_time(x, C: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of each row of x [C, ...] and those before it (REVERSE: after it).

    As products with a triangle of ones where products are exact enough: their result lies in
    registers as other products' results do, which a scan's does not.
    """
    if PRECISION == "bf16":
        rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        ones = ((columns >= rows) if REVERSE else (columns <= rows)).to(tl.float32)
        hi, lo = hi_lo(x)
        return matmul(ones, hi, PRECISION) + matmul(ones, lo, PRECISION)
    else:
        return tl.cumsum(x, 0, reverse=REVERSE)
