"""Launches the kernel in gradients.cu, which takes the place of
`megatron_patch.ops.triton.gradients.gradients` where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.hopper import launching

SOURCE = Path(__file__).with_suffix(".cu")
BLOCKS = 2  # on a multiprocessor


def fits(q: Tensor, gate_logits: Tensor, v: Tensor, aug: Tensor | None, chunk: int) -> bool:
    """Whether there is a kernel for such tensors, on their device."""
    kinds = (torch.bfloat16, torch.float32)
    return (aug is None or aug.dtype in kinds) and launching.fits(q, chunk, q, gate_logits, v)


def kernel(q: Tensor, v: Tensor, aug: Tensor | None, bounds: Tensor | None) -> driver.CUfunction:
    """The kernel for such tensors; `bounds` is `cu_seqlens`."""
    return launching.load(
        SOURCE, "chunk_gradients", BLOCKS, v, q.shape[3], bounds, AUG=launching.bytes_of(aug)
    )


def launch(
    function: driver.CUfunction,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, float],
) -> None:
    """Launches it on the current stream of the current device: all arguments as gradients.cu names
    them, in that order."""
    launching.launch(function, BLOCKS, grid, tensors, sizes, numbers)
