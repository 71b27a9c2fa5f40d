"""Launches chunk_bwd.cu in place of the Triton kernel of the same gradients, where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.hopper import launch as launcher

SOURCE = Path(__file__).with_suffix(".cu")
BLOCKS = 2  # per multiprocessor


def fits(q: Tensor, gate_logits: Tensor, v: Tensor, aug: Tensor | None, chunk: int) -> bool:
    """Returns whether the kernel serves these tensors on their device."""
    dtypes = (torch.bfloat16, torch.float32)
    return (aug is None or aug.dtype in dtypes) and launcher.fits(q, chunk, q, gate_logits, v)


def kernel(
    q: Tensor, v: Tensor, aug: Tensor | None, cu_seqlens: Tensor | None
) -> driver.CUfunction:
    """Returns the kernel compiled for such tensors."""
    return launcher.load(
        SOURCE, "chunk_bwd", BLOCKS, v, q.shape[3], cu_seqlens, AUG=launcher.bytes_of(aug)
    )


def launch(
    function: driver.CUfunction,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, float],
) -> None:
    """Launches it, with a block for each chunk and head; see `megatron_patch.ops.hopper.launch`."""
    launcher.launch(function, BLOCKS, grid, tensors, sizes, numbers)
