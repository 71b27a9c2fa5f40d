"""Compiles CUDA C++ at run time with NVRTC, through `cuda-bindings`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc


def architecture_of(device: torch.device) -> int:
    """Returns a GPU's compute capability as NVRTC writes it: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def known_architectures() -> tuple[int, ...]:
    """Returns the architectures that NVRTC compiles for; none where its library is missing."""
    try:
        return tuple(checked(nvrtc.nvrtcGetSupportedArchs()))
    except RuntimeError:
        return ()


@functools.lru_cache(maxsize=64)
def load_kernel(
    device: torch.device, source: Path, name: str, shared_bytes: int, **macros: int
) -> driver.CUfunction:
    """Compiles a file for a device and returns its kernel `name`, which is allowed `shared_bytes`
    of dynamic shared memory."""
    # The suffix "a" allows instructions of this architecture alone, such as wgmma.
    code = compile_code(source, f"sm_{architecture_of(device)}a", **macros)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes the device's context current in this thread
        library = checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = checked(driver.cuLibraryGetKernel(library, name.encode()))
        function = checked(driver.cuKernelGetFunction(kernel))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def compile_code(source: Path, target: str, **macros: int) -> bytes:
    """Compiles a file with these macros into machine code (a cubin) for a target such as "sm_90a".

    Raises:
        RuntimeError: it does not compile; the message has the compiler's log.
    """
    options = [f"--gpu-architecture={target}", "--std=c++17", f"--include-path={source.parent}"]
    options += [f"--define-macro={name}={value}" for name, value in macros.items()]
    program = checked(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{source.name} does not compile with {macros}:\n{log.decode()}")
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def checked(answer: tuple[Any, ...]) -> Any:
    """Returns the value of a CUDA driver or NVRTC call, or raises a RuntimeError that names the
    error code."""
    result, *values = answer
    if int(result) != 0:
        raise RuntimeError(f"CUDA: {result.name}")
    return values[0] if values else None
