"""A whole decoder's step for one token of one sequence, by the kernel in decoder.cu."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from megatron_patch.ops.token_decoder import LayerTensors

WARPS = 8  # of a block, that compute; one more sends, and one or two copy
ROWS_TOGETHER = 8  # that blocks send each other: so many lie on a line of memory
SMALL_LAYER = 2**18  # bytes of a layer, of a block
SMALLEST_CAPABILITY = (9, 0)  # with bulk copies into shared memory
# For what a block keeps in shared memory beside eight rows of weights at least.
SHARED_BYTES, MULTIPROCESSORS = 227 * 1024, 64
LARGEST_DIM, LARGEST_INNER = 4096, 8192
LARGEST_STATE = 16384  # entries of a head's state
VECTOR = 8  # weights in 16 bytes


class Arguments(ctypes.Structure):
    """Of the kernel: all tensors, then all numbers."""

    _fields_ = [("tensors", ctypes.c_void_p * 7), ("numbers", ctypes.c_float * 4)]


class Decoder:
    """What `megatron_patch.ops.token_decoder` says."""

    def __init__(
        self,
        layers: Sequence[LayerTensors],
        final_norm: Tensor | None,
        head: Tensor,
        scale: float,
        inverse_tau: float,
        norm_eps: float,
        output_norm_eps: float,
    ):
        device, dtype, first = head.device, head.dtype, layers[0]
        (inner, dim), (vocabulary, _) = first.l1.shape, head.shape
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = properties.shared_memory_per_block_optin
        numbers = numbers_of(
            layers=len(layers), dim=dim, heads=first.state.shape[1], inner=inner,
            taps=first.convolution.shape[-1], vocabulary=vocabulary, dtype=dtype,
            multiprocessors=properties.multi_processor_count, shared_bytes=shared_bytes,
        )  # fmt: skip
        self._kernel = _load(device, **numbers)
        # What adds to the warps that compute: one that sends, and those that copy.
        threads = 32 * (WARPS + 1 + numbers["COPIERS"])
        self._launch = (numbers["BLOCKS"], 1, 1, threads, 1, 1, shared_bytes)
        addresses = [[0 if x is None else x.data_ptr() for x in layer] for layer in layers]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.x, self.logits = zeros(dim), zeros(vocabulary, dtype=dtype)
        tensors = [
            torch.tensor(addresses, dtype=torch.int64, device=device), final_norm, head, self.x,
            zeros(4 * (7 * dim + inner)), self.logits, zeros(2, dtype=torch.int32),
        ]  # fmt: skip
        self._tensors = layers, tensors  # kept alive: the kernel has their addresses alone
        self._arguments = Arguments(
            (ctypes.c_void_p * len(tensors))(*(0 if x is None else x.data_ptr() for x in tensors)),
            (ctypes.c_float * 4)(scale, inverse_tau, norm_eps, output_norm_eps),
        )
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))

    def step(self) -> None:
        """From the token's embedding in `x` to `logits`; the states move on."""
        with torch.cuda.device_of(self.x):
            stream = torch.cuda.current_stream().cuda_stream
            parameters = ctypes.addressof(self._parameters)
            # Cooperative: all blocks run at once, since they wait for each other.
            _checked(
                driver.cuLaunchCooperativeKernel(self._kernel, *self._launch, stream, parameters)
            )


def fits(layer: LayerTensors, head: Tensor) -> bool:
    """Whether there is a kernel for such a model on the head's device."""
    inner, dim = layer.l1.shape
    properties = torch.cuda.get_device_properties(head.device)
    return (
        head.dtype in (torch.bfloat16, torch.float16)
        and (properties.major, properties.minor) >= SMALLEST_CAPABILITY
        and _architecture(head.device) in known_architectures()
        and fit(
            dim=dim,
            heads=layer.state.shape[1],
            inner=inner,
            multiprocessors=properties.multi_processor_count,
            shared_bytes=properties.shared_memory_per_block_optin,
        )
    )


def fit(*, dim: int, heads: int, inner: int, multiprocessors: int, shared_bytes: int) -> bool:
    """Whether decoder.cu is made for such widths, and for a GPU that has so much."""
    value_width = dim // heads
    return (
        shared_bytes >= SHARED_BYTES
        and multiprocessors >= MULTIPROCESSORS
        and heads <= multiprocessors <= inner  # each block has rows of the MLP
        and dim <= LARGEST_DIM
        and inner <= LARGEST_INNER
        and not any(width % VECTOR for width in (dim, inner, value_width))
        and value_width * value_width // 2 <= LARGEST_STATE
    )


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=1)
def known_architectures() -> tuple[int, ...]:
    """For which the compiler at hand, if there is one, makes code."""
    try:
        return tuple(_checked(nvrtc.nvrtcGetSupportedArchs()))
    except RuntimeError:  # the library is not found
        return ()


@functools.lru_cache(maxsize=16)
def _load(device: torch.device, **numbers: int) -> driver.CUfunction:
    code = compile_kernel(_architecture(device), **numbers)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # from here on the device's context is this thread's
        library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = _checked(driver.cuLibraryGetKernel(library, b"decode_token"))
        function = _checked(driver.cuKernelGetFunction(kernel))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, numbers["SHARED_BYTES"]))
    return function


def numbers_of(
    *,
    layers: int,
    dim: int,
    heads: int,
    inner: int,
    taps: int,
    vocabulary: int,
    dtype: torch.dtype,
    multiprocessors: int,
    shared_bytes: int,
) -> dict[str, int]:
    """What decoder.cu has to be compiled with, for a model and a GPU."""
    blocks = max(heads, multiprocessors // ROWS_TOGETHER * ROWS_TOGETHER)
    # Where a block's part of a layer about fits the ring, to read it sooner would only delay what
    # blocks send each other.
    is_small = (4 * dim + 3 * inner) * dim * dtype.itemsize <= blocks * SMALL_LAYER
    return dict(
        LAYERS=layers, D=dim, H=heads, F=inner, TAPS=taps, VOCABULARY=vocabulary,
        BFLOAT16=int(dtype == torch.bfloat16), BLOCKS=blocks, WARPS=WARPS,
        COPIERS=1 if is_small else 2, HELD_WORDS=64 if is_small else 32, SHARED_BYTES=shared_bytes,
    )  # fmt: skip


def compile_kernel(architecture: int, **numbers: int) -> bytes:
    """decoder.cu with these numbers for its names in capital letters, as code for GPUs of an
    architecture: 90 is compute capability 9.0."""
    source = Path(__file__).with_suffix(".cu")
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17"]
    options += [f"--include-path={source.parent}"]
    options += [f"--define-macro={name}={number}" for name, number in numbers.items()]
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), b"decoder.cu", 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"decoder.cu does not compile with {numbers}:\n{log.decode()}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the CUDA driver or compiler returns, or an error with its name."""
    result, *values = answer
    if int(result) != 0:
        raise RuntimeError(f"CUDA: {result.name}")
    return values[0] if values else None
