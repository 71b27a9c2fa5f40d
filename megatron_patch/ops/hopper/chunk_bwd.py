"""Launches chunk_bwd.cu in place of the Triton kernel of the same gradients, where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.ops.hopper import launch as launcher
from megatron_patch.ops.triton.config import ChunkCall, head_stride

SOURCE = Path(__file__).with_suffix(".cu")
BLOCKS = 2  # per multiprocessor


def fits(q: Tensor, gate_logits: Tensor, v: Tensor, aug: Tensor | None, chunk: int) -> bool:
    """Returns whether the kernel serves these tensors on their device."""
    dtypes = (torch.bfloat16, torch.float32)
    return (aug is None or aug.dtype in dtypes) and launcher.fits(q, chunk, q, gate_logits, v)


def chunk_bwd(call: ChunkCall, d_y, prepared, dv_results, h, dh, gradients) -> None:
    """Does what the Triton backend's function of this name does, and needs no `dv_results`."""
    launcher.run(
        SOURCE, "chunk_bwd", BLOCKS, call,
        (*call.inputs, d_y, *prepared, h, dh, *gradients),
        (*call.q_strides, *call.gate_strides, *call.v_strides),
        call.scales,
        AUG=launcher.bytes_of(call.aug), D_K=head_stride(gradients[0]),
        D_V=head_stride(gradients[2]),
    )  # fmt: skip
