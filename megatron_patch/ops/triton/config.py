"""Tile sizes for the chunk kernels, and what one call of them needs.

There is no autotuning: every rank and every sequence length runs the same kernels, and the first
call compiles each of them once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_patch.ops.triton.launch import contiguous, last_stride_one
from megatron_patch.ops.triton.tiles import prepare_chunk_indices


class Configuration(NamedTuple):
    """Tile sizes, warps, pipeline stages and register limits, by kernel.

    Tile sizes are powers of two; the last tile of a width is masked.

    chunk: tokens per chunk.
    segment: tokens per program of the inter-chunk scan.
    precision: the precision of matrix products, for `tiles.matmul`.
    full_precision: the precision in `chunk_h` and `chunk_bwd_dv`. In float32 their plain float32
        products are as fast as three TensorFloat-32 ones, whose sums the hardware truncates.
    prepare_*, h_*, o_*, bwd_o_*, dv_*, bwd_*: for the kernels in chunk_prepare.py, chunk_h.py,
        chunk_o.py and chunk_bwd.py; `_k` and `_v` are the tile sizes BK and BV.
    """

    chunk: int
    segment: int
    precision: str
    full_precision: str
    prepare_warps: int
    prepare_run: int
    h_k: int
    h_v: int
    h_warps: int
    h_stages: int
    o_k: int
    o_v: int
    o_warps: int
    o_registers: int | None
    bwd_o_rows: int
    bwd_o_warps: int
    dv_v: int
    dv_stages: int
    dv_registers: int
    bwd_k: int
    bwd_v: int
    bwd_warps: int
    bwd_stages: int
    bwd_registers: int | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of tensors between kernels: what the matrix products round them to anyway."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def power_of_two(width: int) -> int:
    """Returns the tile that holds `width`, at least the 16 that matrix products need."""
    return max(16, 1 << (width - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """Returns the precision of matrix products for inputs of this dtype. float16 is not among them:
    scaled factors and gradients would overflow."""
    return "bf16" if dtype == torch.bfloat16 else "tf32x3"


@cache
def configure(key_width: int, value_width: int, dtype: torch.dtype) -> Configuration:
    """Returns the configuration for these widths. It depends on nothing else."""
    k, v = power_of_two(key_width), power_of_two(value_width)
    half = dtype == torch.bfloat16
    small = k <= 64 and v <= 128
    wide = k > 128 or v > 256
    if half:
        chunk = 32 if wide else 64
    else:
        chunk = 16 if wide else 32
    prepare_warps = 8 if k > 64 else 4
    return Configuration(
        chunk=chunk,
        segment=2048,
        precision=precision_of(dtype),
        full_precision="bf16" if half else "ieee",
        prepare_warps=prepare_warps,
        # Each thread then holds a run's tokens of neighbouring channels that fill 16 bytes.
        prepare_run=max(2, chunk * k // (32 * prepare_warps * (8 if half else 4))),
        h_k=min(k, 128 if half else 64),
        h_v=min(v, 32 if not half else 64 if k <= 64 else 128),
        h_warps=8 if half else 4,
        h_stages=3,
        o_k=min(k, 64 if half else 32),
        o_v=v,
        o_warps=4 if half and v <= 256 else 8,
        o_registers=168 if small and half else None,
        bwd_o_rows=min(chunk, 4096 // v),
        bwd_o_warps=4,
        dv_v=64 if half else 32,
        dv_stages=2,
        dv_registers=168 if half else 255,
        # On Hopper with Triton 3.6, K tiles of 32 and 16 channels gave wrong gradients in bfloat16,
        # or illegal memory accesses: check every change here on the GPU.
        bwd_k=64 if half else min(k, 64),
        bwd_v=min(v, (32 if small else 64) if half else 16 if wide else 32),
        bwd_warps=4 if half or small else 8,
        bwd_stages=3 if half and small else 2,
        # Without the limit, ptxas spills nearly all registers of the float32 kernel.
        bwd_registers=None if half else 255,
    )


class ChunkCall:
    """One call's tensors, sizes and configuration, as the launches of both passes need them.

    Tensors whose last stride is not 1 are copied, because the kernels take the strides of batch,
    time and head only. The four `*_strides` are those three; a missing output gate has zeros.
    """

    def __init__(self, q, gate_logits, v, aug, out_gate, bias, cu_seqlens, tau, scale):
        self.q = q = last_stride_one(q)
        self.gates = gate_logits = last_stride_one(gate_logits)
        self.v = v = last_stride_one(v)
        self.out_gate = out_gate = last_stride_one(out_gate)
        self.aug, self.bias, self.cu_seqlens = contiguous(aug), contiguous(bias), cu_seqlens
        self.inputs = q, gate_logits, v, self.aug
        self.q_strides = q.stride()[:3]
        self.gate_strides = gate_logits.stride()[:3]
        self.v_strides = v.stride()[:3]
        self.out_gate_strides = (0, 0, 0) if out_gate is None else out_gate.stride()[:3]
        self.batch, self.time, self.heads, self.k = q.shape
        self.width = v.shape[-1]
        self.scales = scale, 1.0 / tau
        self.config = config = configure(self.k, self.width, q.dtype)
        self.dtype = config.dtype
        self.indices = indices = prepare_chunk_indices(
            self.batch, self.time, config.chunk, config.segment, cu_seqlens
        )
        self.chunk_tensors = indices.chunk_indices, cu_seqlens
        self.chunk_numbers = self.time, indices.chunks
        self.grid = (indices.chunk_count * self.heads,)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns uninitialised memory."""
        return self.q.new_empty(shape, dtype=dtype)

    def new_output(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns memory for a result, with zeros in rows that no packed sequence covers."""
        make = self.q.new_empty if self.cu_seqlens is None else self.q.new_zeros
        return make(shape, dtype=dtype)

    def new_scores(self) -> Tensor:
        """Returns memory for scores or their gradients, [B, T, H, C]."""
        return self.new(self.batch, self.time, self.heads, self.config.chunk, dtype=self.dtype)


def head_stride(gradient: Tensor) -> int:
    """Returns the distance of heads in a gradient [B, T, H, width]: its width, or that of the
    tensor of which it is a slice. Both have dense memory. 0 for an empty one."""
    return gradient.stride(2) if gradient.dim() == 4 else 0


def compile_key(q: Tensor, gate_logits: Tensor, v: Tensor, *others: object) -> tuple:
    """Returns what decides which kernels a pass launches (see `launch.compiled_together`)."""
    _, time, heads, k = q.shape
    width = v.shape[3]
    many_segments = time > configure(k, width, q.dtype).segment
    kinds = [x if isinstance(x, bool) else x is None for x in others]
    return q.device, q.dtype, heads, k, width, many_segments, *kinds
