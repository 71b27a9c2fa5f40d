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

WARPS, COPIERS = 8, 3  # of a block: warps that compute, and those that copy
SMALLEST_CAPABILITY = (9, 0)  # with bulk copies into shared memory
LARGEST_ROW = 32768  # bytes of a weight's row, which a slot of the ring has to hold
LARGEST_STATE = 16384  # entries of a head's state
VECTOR = 16  # bytes
BLOCKS = 0
EXCHANGES = 16


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
        heads = first.state.shape[1]
        (inner, dim), (vocabulary, _) = first.l1.shape, head.shape
        properties = torch.cuda.get_device_properties(device)
        self._kernel = _compile(
            device.index,
            LAYERS=len(layers), D=dim, H=heads, F=inner, TAPS=first.convolution.shape[-1],
            VOCABULARY=vocabulary, BFLOAT16=int(dtype == torch.bfloat16),
            WARPS=WARPS, COPIERS=COPIERS, BLOCKS=BLOCKS or properties.multi_processor_count,
            SHARED_BYTES=properties.shared_memory_per_block_optin,
        )  # fmt: skip
        self._grid = BLOCKS or properties.multi_processor_count
        self._shared_bytes = properties.shared_memory_per_block_optin
        addresses = [[0 if x is None else x.data_ptr() for x in layer] for layer in layers]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.x, self.logits = zeros(dim), zeros(vocabulary, dtype=dtype)
        tensors = [
            torch.tensor(addresses, dtype=torch.int64, device=device), final_norm, head, self.x,
            zeros(EXCHANGES * 4 * (7 * dim + inner + 32)), self.logits, zeros(2, dtype=torch.int32),
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
            # Cooperative: all blocks run at once, since they wait for each other.
            _checked(
                driver.cuLaunchCooperativeKernel(
                    self._kernel, self._grid, 1, 1, 32 * (WARPS + 1 + COPIERS), 1, 1, self._shared_bytes, stream,
                    ctypes.addressof(self._parameters),
                )  # fmt: skip
            )


def fits(layer: LayerTensors, head: Tensor) -> bool:
    """Whether there is a kernel for such a model on the head's device."""
    _, heads, key_width, value_width = layer.state.shape
    inner, dim = layer.l1.shape
    size = head.element_size()
    properties = torch.cuda.get_device_properties(head.device)
    return (
        (properties.major, properties.minor) >= SMALLEST_CAPABILITY
        and head.dtype in (torch.bfloat16, torch.float16)
        and heads <= properties.multi_processor_count
        and not any(width * size % VECTOR for width in (dim, inner, value_width))
        and max(dim, inner) * size <= LARGEST_ROW
        and key_width * value_width <= LARGEST_STATE
    )


@functools.lru_cache(maxsize=16)
def _compile(device: int, **numbers: int) -> driver.CUfunction:
    """decoder.cu with these numbers in place of its names in capital letters."""
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
    options += [f"--define-macro={name}={number}" for name, number in numbers.items()]
    source = Path(__file__).with_suffix(".cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"decoder.cu", 0, [], []))
    try:
        options = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"decoder.cu does not compile with {numbers}:\n{log.decode()}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the device's context exists from here on
        library = _checked(driver.cuLibraryLoadData(bytes(code), [], [], 0, [], [], 0))
        kernel = _checked(driver.cuLibraryGetKernel(library, b"decode_token"))
        function = _checked(driver.cuKernelGetFunction(kernel))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, numbers["SHARED_BYTES"]))
    return function


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the CUDA driver or compiler returns, or an error with its name."""
    result, *values = answer
    if int(result) != 0:
        raise RuntimeError(f"CUDA: {result.name}")
    return values[0] if values else None
