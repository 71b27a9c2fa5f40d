"""Which packages of GPU kernels are installed, and whether Triton's can serve a call."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# Looked up once: a decoding step must not search the file system. Nothing is imported before its
# use.
TRITON_INSTALLED = (
    find_spec("triton") is not None and find_spec("megatron_patch.ops.triton") is not None
)
FLA_INSTALLED = find_spec("fla") is not None
CAUSAL_CONV1D_INSTALLED = find_spec("causal_conv1d") is not None
# NVIDIA's own, by which kernels in CUDA C++ are compiled and launched.
CUDA_BINDINGS_INSTALLED = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def gpu_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no GPU kernel can run on such tensors, or `None` if one may."""
    if dtype == torch.float64:
        return "found float64 tensors, wanted float16, bfloat16 or float32"
    if device.type != "cuda":
        return f"found tensors on {device}, wanted cuda"
    return None


def triton_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on such tensors, or `None` if they can."""
    if not TRITON_INSTALLED:
        return "the package triton or the kernels in megatron_patch.ops.triton are not installed"
    return gpu_obstacle(dtype, device)


def interpreted(dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run anywhere, in Triton's interpreter: slowly, for tests."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return interpreting and TRITON_INSTALLED and dtype != torch.float64
