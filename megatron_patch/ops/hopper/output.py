"""Launches the kernel in output.cu, which takes the place of
`megatron_patch.ops.triton.output.output` where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.hopper import launching

SOURCE = Path(__file__).with_suffix(".cu")
LARGEST_V = 256  # of a head


def fits(q: Tensor, v: Tensor, out_gate: Tensor | None, bias: Tensor | None, chunk: int) -> bool:
    """Whether there is a kernel for such tensors, on their device."""
    gates = () if out_gate is None else (out_gate,)
    kinds = (torch.bfloat16, torch.float32)
    return (
        v.shape[3] <= LARGEST_V
        and (bias is None or bias.dtype in kinds)
        and launching.fits(q, chunk, v, *gates)
    )


def blocks_for(k: int, v: int) -> int:
    """How many share a multiprocessor."""
    return 3 if k <= 64 and v <= 128 else 2


def kernel(
    q: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    bias: Tensor | None,
    bounds: Tensor | None,
    keep: bool,
) -> driver.CUfunction:
    """The kernel for such tensors; `bounds` is `cu_seqlens`."""
    k = q.shape[3]
    return launching.load(
        SOURCE, "chunk_output", blocks_for(k, v.shape[3]), v, k, bounds,
        AUG=int(aug is not None), GATE=launching.bytes_of(out_gate), BIAS=launching.bytes_of(bias),
        KEEP=int(keep),
    )  # fmt: skip


def launch(
    function: driver.CUfunction,
    k: int,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float],
) -> None:
    """Launches it on the current stream of the current device, for heads of K: all arguments as
    output.cu names them, in that order."""
    blocks = blocks_for(k, tensors[0].shape[3])
    launching.launch(function, blocks, grid, tensors, sizes, numbers)
