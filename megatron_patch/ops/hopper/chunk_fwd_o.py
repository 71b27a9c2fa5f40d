"""Launches chunk_fwd_o.cu in place of the Triton kernel of the output, where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.hopper import launch as launcher

SOURCE = Path(__file__).with_suffix(".cu")
LARGEST_V = 256  # of a head


def fits(q: Tensor, v: Tensor, out_gate: Tensor | None, bias: Tensor | None, chunk: int) -> bool:
    """Returns whether the kernel serves these tensors on their device."""
    gates = () if out_gate is None else (out_gate,)
    dtypes = (torch.bfloat16, torch.float32)
    return (
        v.shape[3] <= LARGEST_V
        and (bias is None or bias.dtype in dtypes)
        and launcher.fits(q, chunk, v, *gates)
    )


def blocks_for(k: int, v: int) -> int:
    """Returns how many blocks share a multiprocessor."""
    return 3 if k <= 64 and v <= 128 else 2


def kernel(
    q: Tensor,
    v: Tensor,
    aug: Tensor | None,
    out_gate: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> driver.CUfunction:
    """Returns the kernel compiled for such tensors; with `keep` it also stores what the backward
    pass reads."""
    k = q.shape[3]
    return launcher.load(
        SOURCE, "chunk_fwd_o", blocks_for(k, v.shape[3]), v, k, cu_seqlens,
        AUG=int(aug is not None), GATE=launcher.bytes_of(out_gate), BIAS=launcher.bytes_of(bias),
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
    """Launches it for heads of K, with a block for each chunk and head; see
    `megatron_patch.ops.hopper.launch`."""
    blocks = blocks_for(k, tensors[0].shape[3])
    launcher.launch(function, blocks, grid, tensors, sizes, numbers)
