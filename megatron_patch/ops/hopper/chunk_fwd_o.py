"""Launches chunk_fwd_o.cu in place of the Triton kernel of the output, where it can."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_patch.ops.hopper import launch as launcher
from megatron_patch.ops.triton.config import ChunkCall

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


def chunk_fwd_o(call: ChunkCall, prepared, scores, h, out, x_hat, rstd, norm_eps: float) -> None:
    """Does what the Triton backend's function of this name does."""
    qg, kg, _, fallback, aug_score = prepared
    launcher.run(
        SOURCE, "chunk_fwd_o", blocks_for(call.k, call.width), call,
        (
            call.v, call.out_gate, call.bias, qg, kg, fallback, scores, aug_score, h, out, x_hat,
            rstd,
        ),
        (*call.v_strides, *call.out_gate_strides),
        (norm_eps,),
        AUG=int(call.aug is not None), GATE=launcher.bytes_of(call.out_gate),
        BIAS=launcher.bytes_of(call.bias), KEEP=int(x_hat is not None),
    )  # fmt: skip
