"""What kernels with a block for each chunk and head need of their tensors, and their launch."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.hopper.compilation import (
    architecture_of,
    checked,
    known_architectures,
    load_kernel,
)

CHUNK = 64  # tokens
HOPPER = 90  # which alone has these matrix products
VECTOR = 8  # numbers in 16 bytes
THREADS = 256
LARGEST_K = 128  # of a head


def fits(q: Tensor, chunk: int, *tensors: Tensor) -> bool:
    """Whether there are kernels for heads and chunks like these, on their device, where `tensors`
    are copied by 16 bytes, as rows of K are which other kernels wrote."""
    return (
        chunk == CHUNK
        and q.dtype == torch.bfloat16
        and q.shape[3] <= LARGEST_K
        and q.shape[3] % VECTOR == 0
        and all(_is_in_vectors(x) for x in tensors)
        and _is_hopper(q.device)
    )


def _is_in_vectors(x: Tensor) -> bool:
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


def bytes_of(x: Tensor | None) -> int:
    """Of a number of x; zero where it is not given."""
    return 0 if x is None else x.itemsize


def shared_bytes(blocks: int) -> int:
    """Of shared memory for each of so many blocks on a multiprocessor: of 228 KB, 1 KB for each is
    the driver's."""
    return (228 // blocks - 1) * 1024


def load(
    source: Path, name: str, blocks: int, v: Tensor, k: int, bounds: Tensor | None, **numbers: int
) -> driver.CUfunction:
    """The kernel of a file, `blocks` on a multiprocessor, for heads of K and V as in v
    [B, T, H, V]; `bounds` is `cu_seqlens`."""
    memory = shared_bytes(blocks)
    return load_kernel(
        v.device, source, name, memory, BLOCKS=blocks, SHARED=memory, H=v.shape[2], K=k,
        V=v.shape[3], BOUND=bytes_of(bounds), **numbers,
    )  # fmt: skip


def launch(
    function: driver.CUfunction,
    blocks: int,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
) -> None:
    """Launches it on the current stream of the current device: all its arguments as the file names
    them, in that order."""
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    form = f"{len(tensors)}Q{len(sizes)}q{len(numbers)}f0q"  # as long as C makes the structure
    arguments = ctypes.create_string_buffer(struct.pack(form, *addresses, *sizes, *numbers))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = torch.cuda.current_stream().cuda_stream
    checked(
        driver.cuLaunchKernel(
            function, grid, 1, 1, THREADS, 1, 1, shared_bytes(blocks), stream,
            ctypes.addressof(parameters), 0,
        )
    )  # fmt: skip
