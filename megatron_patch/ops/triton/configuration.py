"""Which kernels' shapes serve which widths: no autotuning, so that every rank and every length runs
the same configuration, and the first call compiles each kernel once."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Configuration(NamedTuple):
    """Tile sizes are powers of two; the last tile of a width is masked.

    chunk: tokens per chunk. segment: tokens that one program carries a state over.
    full_precision: of products that float32's own units compute as fast as tensor cores do three of
        TensorFloat-32, whose sums are truncated: those of `carry` and `value_gradients`.
    """

    chunk: int
    segment: int
    precision: str
    full_precision: str
    factor_warps: int
    factor_run: int
    carry_k: int
    carry_v: int
    carry_warps: int
    carry_stages: int
    output_k: int
    output_v: int
    output_warps: int
    output_registers: int | None
    backward_rows: int
    backward_warps: int
    value_v: int
    value_stages: int
    value_registers: int
    gradient_k: int
    gradient_v: int
    gradient_warps: int
    gradient_stages: int
    gradient_registers: int | None

    @property
    def dtype(self) -> torch.dtype:
        """Of tensors between kernels: stored as they will be rounded for products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def power_of_two(width: int) -> int:
    """The tile that holds `width`: matrix products need at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """How kernels compute for tensors of this dtype: float16 operands would overflow in factors and
    gradients."""
    return "bf16" if dtype == torch.bfloat16 else "tf32x3"


@cache
def configure(key_width: int, value_width: int, dtype: torch.dtype) -> Configuration:
    """The configuration for these widths. It depends on nothing else."""
    k, v = power_of_two(key_width), power_of_two(value_width)
    half = dtype == torch.bfloat16
    small = k <= 64 and v <= 128
    wide = k > 128 or v > 256
    if half:
        chunk = 32 if wide else 64
    else:
        chunk = 16 if wide else 32
    factor_warps = 8 if k > 64 else 4
    return Configuration(
        chunk=chunk,
        segment=2048,
        precision=precision_of(dtype),
        full_precision="bf16" if half else "ieee",
        factor_warps=factor_warps,
        # Each thread then has a run's tokens in 16 bytes of neighbouring channels.
        factor_run=max(2, chunk * k // (32 * factor_warps * (8 if half else 4))),
        carry_k=min(k, 128 if half else 64),
        carry_v=min(v, 32 if not half else 64 if k <= 64 else 128),
        carry_warps=8 if half else 4,
        carry_stages=3,
        output_k=min(k, 64 if half else 32),
        output_v=v,
        output_warps=4 if half and v <= 256 else 8,
        output_registers=168 if small and half else None,
        backward_rows=min(chunk, 4096 // v),
        backward_warps=4,
        value_v=64 if half else 32,
        value_stages=2,
        value_registers=168 if half else 255,
        # On Hopper with Triton 3.6, tiles of K of 32 and 16 channels gave wrong gradients in
        # bfloat16, or illegal accesses: check every change here on the GPU.
        gradient_k=64 if half else min(k, 64),
        gradient_v=min(v, (32 if small else 64) if half else 16 if wide else 32),
        gradient_warps=4 if half or small else 8,
        gradient_stages=3 if half and small else 2,
        # Left alone, ptxas spills nearly all registers of the float32 kernel.
        gradient_registers=None if half else 255,
    )
