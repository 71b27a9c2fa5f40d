"""Loads and launches the kernels that run one block for each chunk and head, and says which tensors
they take."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.hopper.nvrtc import (
    architecture_of,
    checked,
    known_architectures,
    load_kernel,
)
from megatron_patch.ops.triton.config import ChunkCall
from megatron_patch.ops.triton.launch import current_stream, is_compiling

CHUNK = 64  # tokens
HOPPER = 90  # the only architecture with wgmma
VECTOR = 8  # bfloat16 entries in the 16 bytes of one cp.async
THREADS = 256
LARGEST_K = 128  # of a head


def fits(q: Tensor, chunk: int, *tensors: Tensor) -> bool:
    """Returns whether the kernels serve heads like q's [B, T, H, K] in chunks of this many tokens,
    and can copy `tensors` in vectors of 16 bytes."""
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
    """Returns the size of one entry of x, or 0 for no tensor."""
    return 0 if x is None else x.itemsize


def shared_bytes(blocks: int) -> int:
    """Returns the bytes of shared memory for a block where `blocks` share a multiprocessor. It has
    228 KB, and the driver takes 1 KB for each block."""
    return (228 // blocks - 1) * 1024


def run(
    source: Path,
    name: str,
    blocks: int,
    call: ChunkCall,
    *arguments: tuple,
    **macros: int,
) -> None:
    """Launches a kernel with `blocks` blocks per multiprocessor, or during a compile pass only
    compiles it. The arguments are `launch`'s from `tensors` on."""
    memory = shared_bytes(blocks)
    function = load_kernel(
        call.v.device, source, name, memory, BLOCKS=blocks, SHARED=memory, H=call.heads, K=call.k,
        V=call.width, CU_SEQLENS=bytes_of(call.cu_seqlens), **macros,
    )  # fmt: skip
    if not is_compiling():
        launch(function, blocks, call, *arguments)


def launch(
    function: driver.CUfunction,
    blocks: int,
    call: ChunkCall,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    numbers: tuple[float, ...],
) -> None:
    """Launches a kernel on the current stream of the current device. Tensors, the fields of `struct
    Chunks`, strides and numbers are the source's `struct Arguments`, in its order."""
    tensors, sizes = (*tensors, *call.chunk_tensors), (*call.chunk_numbers, *strides)
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    layout = f"{len(tensors)}Q{len(sizes)}q{len(numbers)}f0q"  # 0q pads the end as C does
    arguments = ctypes.create_string_buffer(struct.pack(layout, *addresses, *sizes, *numbers))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    checked(
        driver.cuLaunchKernel(
            function, call.grid[0], 1, 1, THREADS, 1, 1, shared_bytes(blocks),
            current_stream()[1], ctypes.addressof(parameters), 0,
        )
    )  # fmt: skip
