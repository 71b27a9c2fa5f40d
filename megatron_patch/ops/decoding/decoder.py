"""Compiles and launches decoder.cu, a whole model's step for one token of one sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from cuda.bindings import driver
from torch import Tensor

from megatron_patch.ops.checks import dtype_name
from megatron_patch.ops.decoding import LayerTensors
from megatron_patch.ops.hopper.nvrtc import (
    architecture_of,
    checked,
    known_architectures,
    load_kernel,
)

CONSUMERS = 8  # warps of a block that multiply, beside a reducer and one or two producer warps
LINE_NUMBERS = 8  # numbers on a cache line of the exchange between blocks
SMALL_LAYER = 2**18  # bytes of a layer's weights that a block reads
SMALLEST_ARCHITECTURE = 90  # the first with bulk copies into shared memory
# Below these a block's vectors and eight rows of weights would not fit its shared memory.
SHARED_BYTES, MULTIPROCESSORS = 227 * 1024, 64
LARGEST_DIM, LARGEST_INNER = 4096, 8192
LARGEST_STATE = 16384  # entries of a head's state
VECTOR = 8  # weights in 16 bytes
SOURCE = Path(__file__).with_suffix(".cu")


class Arguments(ctypes.Structure):
    """The kernel's arguments, as in layout.cuh. The last two change at every step."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "table", "embedding", "head", "final_norm", "exchange", "counters",
        )),
        *((name, ctypes.c_float) for name in (
            "embedding_scale", "scale", "inverse_tau", "norm_eps", "output_norm_eps",
        )),
        ("token", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]  # fmt: skip


class Decoder:
    """A model's step on the GPU; see `token_decoder`."""

    def __init__(
        self,
        layers: Sequence[LayerTensors],
        embedding: Tensor,
        final_norm: Tensor | None,
        head: Tensor,
        *numbers: float,  # from `embedding_scale` on, as in `Arguments`
    ):
        device, dtype, first = head.device, head.dtype, layers[0]
        (inner, dim), (vocabulary, _) = first.l1.shape, head.shape
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = properties.shared_memory_per_block_optin
        macros = macros_for(
            layers=len(layers), dim=dim, heads=first.state.shape[1], inner=inner,
            kernel_size=first.convolution.shape[-1], vocabulary=vocabulary, dtype=dtype,
            multiprocessors=properties.multi_processor_count, shared_bytes=shared_bytes,
        )  # fmt: skip
        self._kernel = load_kernel(device, SOURCE, "decode_token", shared_bytes, **macros)
        threads = 32 * (CONSUMERS + 1 + macros["PRODUCERS"])  # one more warp is the reducer
        self._launch = (macros["BLOCKS"], 1, 1, threads, 1, 1, shared_bytes)
        addresses = [[0 if x is None else x.data_ptr() for x in layer] for layer in layers]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        table = torch.tensor(addresses, dtype=torch.int64, device=device)
        exchange, counters = zeros(4 * (7 * dim + inner)), zeros(2, dtype=torch.int32)
        tensors = [table, embedding, head, final_norm, exchange, counters]
        self._tensors = layers, tensors  # kept alive: the kernel has only their addresses
        self._arguments = Arguments(*(0 if x is None else x.data_ptr() for x in tensors), *numbers)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self._parameters = ctypes.addressof(self._pointers)

    def step(self, token: Tensor, logits: Tensor) -> None:
        """Reads a token and writes logits; see `token_decoder`. The launch copies its arguments."""
        self._arguments.token = token.data_ptr()
        self._arguments.logits = logits.data_ptr()
        with torch.cuda.device_of(logits):
            stream = torch.cuda.current_stream().cuda_stream
            # A cooperative launch, because blocks wait for each other and must all be resident.
            checked(
                driver.cuLaunchCooperativeKernel(
                    self._kernel, *self._launch, stream, self._parameters
                )
            )


def unsupported_reason(dtype: torch.dtype, device: torch.device, **sizes: int) -> str | None:
    """Returns why the kernel does not serve such a model on a device, or `None` if it does. The
    sizes are those of `unsupported_sizes`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"found {dtype_name(dtype)}, wanted bfloat16 or float16"
    architecture = architecture_of(device)
    if architecture < SMALLEST_ARCHITECTURE:
        return f"found an architecture sm_{architecture}, wanted sm_{SMALLEST_ARCHITECTURE} or more"
    if architecture not in known_architectures():
        return f"finds no compiler of NVIDIA's that makes code for sm_{architecture}"
    properties = torch.cuda.get_device_properties(device)
    return unsupported_sizes(
        properties.multi_processor_count, properties.shared_memory_per_block_optin, **sizes
    )


def unsupported_sizes(
    multiprocessors: int, shared_bytes: int, *, D: int, H: int, K: int, V: int, F: int
) -> str | None:
    """Returns which of a GPU's numbers or of a model's widths decoder.cu is not written for, or
    `None`. D channels, H heads with keys K and values V wide, F channels in the MLP."""
    found = f"D = {D}, F = {F}, {H} heads of K = {K} and V = {V}"
    if shared_bytes < SHARED_BYTES or multiprocessors < MULTIPROCESSORS:
        return (
            f"found {multiprocessors} multiprocessors with {shared_bytes >> 10} KB of shared "
            f"memory, wanted {MULTIPROCESSORS} with {SHARED_BYTES >> 10} KB or more"
        )
    if (2 * K, H * V) != (V, D):
        return f"found {found}, wanted V = 2 K = D / heads"
    if not H <= multiprocessors <= F:  # every block computes rows of the MLP
        return f"found {found}, wanted heads ≤ {multiprocessors} multiprocessors ≤ F"
    if D > LARGEST_DIM or F > LARGEST_INNER or K * V > LARGEST_STATE:
        return (
            f"found {found}, wanted D ≤ {LARGEST_DIM}, F ≤ {LARGEST_INNER} and K V ≤ "
            f"{LARGEST_STATE}"
        )
    if any(width % VECTOR for width in (D, F, V)):
        return f"found {found}, wanted D, F and V that are multiples of {VECTOR}"
    return None


def macros_for(
    *,
    layers: int,
    dim: int,
    heads: int,
    inner: int,
    kernel_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    multiprocessors: int,
    shared_bytes: int,
) -> dict[str, int]:
    """Returns the macros that decoder.cu is compiled with for a model and a GPU.

    CONSUMERS and PRODUCERS count a block's warps. PREFETCH_WORDS is how many registers of a lane
    hold weights that are loaded before their vector is there. KERNEL_SIZE is the convolution's.
    """
    blocks = max(heads, multiprocessors // LINE_NUMBERS * LINE_NUMBERS)
    # If a block's part of a layer about fits the pipeline, a second producer has nothing to gain by
    # reading ahead, and its reads delay the exchange between blocks.
    is_small = (4 * dim + 3 * inner) * dim * dtype.itemsize <= blocks * SMALL_LAYER
    return dict(
        LAYERS=layers, D=dim, H=heads, F=inner, KERNEL_SIZE=kernel_size, VOCABULARY=vocabulary,
        BFLOAT16=int(dtype == torch.bfloat16), BLOCKS=blocks,
        CONSUMERS=CONSUMERS, PRODUCERS=1 if is_small else 2,
        PREFETCH_WORDS=64 if is_small else 32, SHARED_BYTES=shared_bytes,
    )  # fmt: skip
