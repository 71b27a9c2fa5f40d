"""Building blocks of the chunk kernels: chunk indices, decays and matrix products.

Tiles are [C, BK] or [C, BV]: the C tokens of a chunk times a padded width. Log decays are in base
2, so that one `exp2` instruction applies them. Rows past the end of a sequence hold zeros and zero
log decay.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megatron_patch.ops.triton.launch import launch

# Triton's interpreter has neither inline assembly nor bfloat16 matrix products.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
# A chunk whose total log decay falls below this in any channel takes the fallback path. Above it,
# the scaling factors of `chunk_prepare` stay within 2^+-58, and the scores above the diagonal,
# which are computed and dropped, within 2^116 times q k: in the range of float32 and bfloat16.
FACTOR_LIMIT = tl.constexpr(-116.0)
# 2^-300 is zero in float32. The bound keeps sums of log decays finite for any gate logits.
LOWEST_LOG_DECAY = tl.constexpr(-300.0)


class ChunkIndices(NamedTuple):
    """The chunks and segments of a call, numbered across all its sequences.

    A segment is the run of chunks that one program of the inter-chunk scan walks.

    chunks, segments: number per sequence; 0 for packed sequences.
    chunk_count, segment_count: number in all. For packed sequences an upper bound, because only the
        device knows the lengths; the entries beyond the last have sequence -1.
    chunk_indices, segment_indices: [count, 2] int32, the sequence of each and its index within it.
        This and the offsets are `None` unless sequences are packed.
    chunk_offsets, segment_offsets: [N + 1] int32, the first chunk or segment of each sequence.
    """

    sequences: int
    chunks: int
    segments: int
    chunk_count: int
    segment_count: int
    chunk_indices: torch.Tensor | None = None
    segment_indices: torch.Tensor | None = None
    chunk_offsets: torch.Tensor | None = None
    segment_offsets: torch.Tensor | None = None


def count_chunks(batch: int, time: int, size: int, cu_seqlens: torch.Tensor | None) -> int:
    """Returns the number of chunks of `size` tokens; an upper bound for packed sequences."""
    if cu_seqlens is None:
        return batch * -(-time // size)
    return time // size + cu_seqlens.shape[0] - 1


def prepare_chunk_indices(
    batch: int, time: int, chunk: int, segment: int, cu_seqlens: torch.Tensor | None
) -> ChunkIndices:
    """Returns the indices for B sequences of T tokens, or for packed ones, without waiting for the
    device."""
    chunk_count = count_chunks(batch, time, chunk, cu_seqlens)
    segment_count = count_chunks(batch, time, segment, cu_seqlens)
    if cu_seqlens is None:
        return ChunkIndices(
            batch, chunk_count // batch, segment_count // batch, chunk_count, segment_count
        )
    sequences = len(cu_seqlens) - 1
    counts = (chunk_count, segment_count)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=cu_seqlens.device)

    indices = [new(count, 2) for count in counts]
    offsets = [new(sequences + 1) for _ in counts]
    launch(
        chunk_indices_kernel, (sequences + 1, 2), (cu_seqlens, *indices, *offsets),
        (sequences, *counts), C=chunk, SEGMENT=segment, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return ChunkIndices(sequences, 0, 0, *counts, *indices, *offsets)


@triton.jit(do_not_specialize=["sequences", "chunk_count", "segment_count"])
def chunk_indices_kernel(
    cu_seqlens, chunk_indices, segment_indices, chunk_offsets, segment_offsets, sequences,
    chunk_count, segment_count,
    C: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the four tensors of `ChunkIndices`. Grid: (sequences + 1, 2), for chunks and for
    segments. One kernel, because both passes of every layer need them."""
    if tl.program_id(1) == 0:
        write_indices(cu_seqlens, chunk_indices, chunk_offsets, sequences, chunk_count, C, BLOCK)
    else:
        write_indices(
            cu_seqlens, segment_indices, segment_offsets, sequences, segment_count, SEGMENT, BLOCK
        )


@triton.jit
def write_indices(
    cu_seqlens, indices, offsets, sequences, count, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes one sequence's offset and indices; behind the last sequence, the number of all and the
    sequence -1."""
    sequence = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for block in range(0, sequence, BLOCK):
        before += pieces_of(cu_seqlens, block + column, block + column < sequence, SIZE)
    first = tl.sum(before)
    tl.store(offsets + sequence, first)
    end = count
    if sequence < sequences:
        end = tl.minimum(end, first + pieces_of(cu_seqlens, sequence, None, SIZE))
    else:
        sequence = -1
    for block in range(first, end, BLOCK):
        at = block + column
        tl.store(indices + at * 2, tl.zeros([BLOCK], tl.int32) + sequence, mask=at < end)
        tl.store(indices + at * 2 + 1, at - first, mask=at < end)


@triton.jit
def pieces_of(cu_seqlens, sequences, mask, SIZE: tl.constexpr):
    """Returns the number of chunks or segments of each of these sequences, zero where masked."""
    start = tl.load(cu_seqlens + sequences, mask=mask)
    end = tl.load(cu_seqlens + sequences + 1, mask=mask)
    pieces = tl.cdiv(tl.maximum(end - start, 0), SIZE).to(tl.int32)
    return pieces if mask is None else tl.where(mask, pieces, 0)


@triton.jit
def chunk_and_head(H: tl.constexpr, TILES: tl.constexpr = 1):
    """Returns this program's chunk (or segment) and its head as int64. TILES neighbouring programs
    share a chunk; heads come next, because they are neighbours in memory."""
    program = tl.program_id(0) // TILES
    return program // H, (program % H).to(tl.int64)


@triton.jit
def locate(chunk, chunks, chunk_indices, cu_seqlens, T, SIZE: tl.constexpr):
    """Returns, as int64, where a chunk (or segment) of SIZE tokens lies: its sequence (negative if
    it has none), its index there, the batch entry, its first token, and the end of the sequence.

    chunks: the number per sequence, used unless sequences are packed.
    """
    if cu_seqlens is not None:
        sequence = tl.load(chunk_indices + chunk * 2).to(tl.int64)
        index = tl.load(chunk_indices + chunk * 2 + 1).to(tl.int64)
        known = tl.maximum(sequence, 0)
        start = tl.load(cu_seqlens + known).to(tl.int64) + index * SIZE
        end = tl.load(cu_seqlens + known + 1).to(tl.int64)
        batch = sequence * 0
    else:
        sequence = (chunk // chunks).to(tl.int64)
        index = (chunk % chunks).to(tl.int64)
        start = index * SIZE
        end = sequence * 0 + T
        batch = sequence
    return sequence, index, batch, start, end


@triton.jit
def chunk_rows(batch, first, end, head, T, H: tl.constexpr, C: tl.constexpr):
    """Returns a chunk's number of tokens, its first token's row in tensors [B, T, H, ...], and the
    indices 0 .. C - 1 of its tokens, as a vector and as a column."""
    length = tl.minimum(end - first, C).to(tl.int32)
    token_at = (batch * T + first) * H + head
    token = tl.arange(0, C)
    return length, token_at, token, token[:, None]


@triton.jit
def offset_of(batch, token, head, strides):
    """Returns the offset of a token's head, with the strides of batch, time and head."""
    return batch * strides[0] + head * strides[2] + token * strides[1]


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """Returns a @ b in float32. The operands are rounded to bfloat16 ("bf16"), split into three
    TensorFloat-32 terms ("tf32x3"), or kept ("ieee")."""
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
    """Returns 2^x. "bf16" takes one instruction, which flushes results below 2^-126 to zero."""
    if INTERPRETED or PRECISION != "bf16":
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """Returns 1 / x by one instruction, accurate to one unit in the last place."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    # The results that this `exp2` flushes to zero would vanish in 1 + x anyway.
    return reciprocal(1.0 + exp2(x * -LOG2_E, "bf16"))


@triton.jit
def to_float32(x):
    """Returns x in float32. Unpacks two bfloat16 numbers with two instructions; Triton takes
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
    """Returns logsigmoid(logits) / tau in base 2; zero for infinite logits."""
    x = exp2(tl.abs(logits) * -LOG2_E, PRECISION)
    # log(1 + x) = x p(x) with a polynomial p fitted on [0, 1] keeps the digits of small x, which
    # log2(1 + x) would lose. Relative error 8.4e-6 for "bf16", else 5.2e-9.
    if PRECISION == "bf16":
        p = 0.10122223943 - 0.02386915684 * x
        p = -0.21004858613 + x * p
        p = 0.32520660758 + x * p
        p = -0.49936133623 + x * p
        log1p = x * (0.99999159575 + x * p)
    else:
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
def load_log_decay(gates, mask, inverse_tau, PRECISION: tl.constexpr):
    """Returns the log decays of the gate logits at the pointers `gates`: zero where masked, never
    below LOWEST_LOG_DECAY."""
    logits = tl.load(gates, mask=mask, other=float("inf")).to(tl.float32)
    g = log_decay(logits, inverse_tau, PRECISION)
    return tl.where(g < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, g)


@triton.jit
def key(g, PRECISION: tl.constexpr):
    """Returns k = 1 - 2^g. A series near g = 0 keeps all digits where the decay is close to one."""
    if PRECISION == "bf16":
        # Fitted on [-1 / 32, 0]: relative error 9.8e-6. The `exp2` branch has 1.1e-5.
        series = g * (-0.69314042222 - 0.23849897567 * g)
        return tl.where(g > -0.03125, series, 1.0 - exp2(g, PRECISION))
    else:
        # Fitted on [-1, 0]: relative error 1.2e-10.
        p = -0.00014889238 - 0.00001130384 * g
        p = -0.00132993988 + g * p
        p = -0.00961695071 + g * p
        p = -0.05550391387 + g * p
        p = -0.24022649483 + g * p
        series = g * (-0.69314718044 + g * p)
        return tl.where(g > -1.0, series, 1.0 - tl.exp2(g))


@triton.jit
def convert_layout_like(x, product):
    """Returns x in float32, in the register layout of `product`, a matrix product of the same
    shape. The assembly makes both operands of one instruction, so Triton converts x once and keeps
    the arithmetic on both in the product's layout."""
    x = x.to(tl.float32)
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f,f", [x, product], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def split_bf16(x):
    """Returns two bfloat16 numbers whose sum is x to 2^-17."""
    hi = x.to(tl.bfloat16)
    return hi, (x - hi.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def cumsum_over_tokens(x, C: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the inclusive cumulative sum of x [C, ...] over rows, from the last row if REVERSE.

    In "bf16" it is a product with a triangle of ones, because a scan's result has another register
    layout than that of the products around it.
    """
    if PRECISION == "bf16":
        rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        ones = ((columns >= rows) if REVERSE else (columns <= rows)).to(tl.float32)
        hi, lo = split_bf16(x)
        return matmul(ones, hi, PRECISION) + matmul(ones, lo, PRECISION)
    else:
        return tl.cumsum(x, 0, reverse=REVERSE)


@triton.jit
def load_v_and_dy(
    v, d_y, v_tile, length, v_t, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Returns a tile [C, BV] of v and of d_y, whose pointers are to the chunk's first row, and the
    tile's columns and mask. v_t is v's stride of time."""
    rows = tl.arange(0, C)[:, None]
    columns = v_tile * BV + tl.arange(0, BV)
    mask = (rows < length) & (columns < V)[None, :]
    values = tl.load(v + (rows * v_t + columns[None, :]), mask=mask, other=0.0)
    dy = tl.load(d_y + (rows * (H * V) + columns[None, :]), mask=mask, other=0.0)
    return values, dy, columns, mask


@triton.jit
def load_aug_score(
    aug_score, token_at, length, H: tl.constexpr, C: tl.constexpr, HAS_AUG: tl.constexpr
):
    """Returns the scores [C] of self-augmentation of a chunk's tokens; zeros without it."""
    scores = tl.zeros([C], tl.float32)
    if HAS_AUG:
        token = tl.arange(0, C)
        scores = tl.load(aug_score + token_at + token * H, mask=token < length, other=0.0)
    return scores


@triton.jit
def load_h(h, chunk_at, k_columns, v_columns, K: tl.constexpr, V: tl.constexpr):
    """Returns a tile [BK, BV] of h [chunks, H, K, V]; chunk_at is chunk * H + head."""
    mask = (k_columns < K)[:, None] & (v_columns < V)[None, :]
    offsets = k_columns[:, None] * V + v_columns[None, :]
    return tl.load(h + chunk_at * (K * V) + offsets, mask=mask, other=0.0)
