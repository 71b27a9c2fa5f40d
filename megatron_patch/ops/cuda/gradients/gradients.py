"""Launches the kernel in gradients.cu, which takes the place of
`megatron_patch.ops.triton.gradients.gradients` where it can."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.cuda.compilation import (
    architecture_of,
    checked,
    known_architectures,
    load_kernel,
)

CHUNK = 64  # tokens
HOPPER = 90  # which alone has these matrix products
LARGEST_K = 128  # of a head
VECTOR = 8  # numbers in 16 bytes
THREADS, SHARED_BYTES = 256, 14 * 8192 + 1024
SOURCE = Path(__file__).with_suffix(".cu")


class Arguments(ctypes.Structure):
    """Of the kernel: all tensors; strides in numbers, tokens and chunks of a sequence; the rest."""

    _fields_ = [
        ("tensors", ctypes.c_void_p * 18),
        ("sizes", ctypes.c_int64 * 11),
        ("numbers", ctypes.c_float * 2),
    ]


def fits(q: Tensor, gate_logits: Tensor, v: Tensor, aug: Tensor | None, chunk: int) -> bool:
    """Whether there is a kernel for such tensors, on their device."""
    return (
        chunk == CHUNK
        and q.dtype == torch.bfloat16
        and q.shape[3] <= LARGEST_K
        and (aug is None or aug.dtype in (torch.bfloat16, torch.float32))
        and all(_is_in_vectors(x) for x in (q, gate_logits, v))
        and _is_hopper(q.device)
    )


def _is_in_vectors(x: Tensor) -> bool:
    """Whether rows can be copied by 16 bytes."""
    *strides, last = x.stride()
    return (
        last == 1
        and x.shape[3] % VECTOR == 0
        and x.data_ptr() % (2 * VECTOR) == 0
        and not any(stride % VECTOR for stride in strides)
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and architecture_of(device) == HOPPER
        and HOPPER in known_architectures()
    )


def kernel(q: Tensor, v: Tensor, aug: Tensor | None, bounds: Tensor | None) -> driver.CUfunction:
    """The kernel for such tensors; `bounds` is `cu_seqlens`."""
    return load_kernel(
        q.device, SOURCE, "chunk_gradients", SHARED_BYTES, H=q.shape[2], K=q.shape[3], V=v.shape[3],
        AUG=0 if aug is None else aug.itemsize, BOUND=0 if bounds is None else bounds.itemsize,
    )  # fmt: skip


def launch(
    function: driver.CUfunction,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, float],
) -> None:
    """Launches it on the current stream of the current device: all arguments as gradients.cu names
    them, in that order."""
    addresses = tuple(0 if x is None else x.data_ptr() for x in tensors)
    arguments = Arguments(addresses, sizes, numbers)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        driver.cuLaunchKernel(
            function, grid, 1, 1, THREADS, 1, 1, SHARED_BYTES, stream,
            ctypes.addressof(parameters), 0,
        )
    )  # fmt: skip
