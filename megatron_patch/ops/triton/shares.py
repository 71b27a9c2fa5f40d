"""Sums over chunks, for the gradients of parameters."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "width"])
def sum_shares(shares, total, rows, width, BLOCK: tl.constexpr = 32, DEPTH: tl.constexpr = 256):
    """total [width] is the sum of shares [rows, width] float32 over its rows, always in the same
    order. Grid: (width / BLOCK,)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (columns < width)[None, :]
    sums = tl.zeros([DEPTH, BLOCK], tl.float32)
    for start in range(0, rows, DEPTH):
        row = start + tl.arange(0, DEPTH)[:, None]
        sums += tl.load(
            shares + row.to(tl.int64) * width + columns[None, :],
            mask=(row < rows) & mask,
            other=0.0,
        )
    tl.store(total + columns, tl.sum(sums, 0).to(total.dtype.element_ty), mask=columns < width)
