"""Compiles CUDA C++ where it runs, by NVIDIA's runtime compiler through `cuda-bindings`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc


def architecture_of(device: torch.device) -> int:
    """A GPU's: 90 is compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=1)
def known_architectures() -> tuple[int, ...]:
    """For which the compiler at hand, if there is one, makes code."""
    try:
        return tuple(checked(nvrtc.nvrtcGetSupportedArchs()))
    except RuntimeError:  # the library is not found
        return ()


@functools.lru_cache(maxsize=64)
def load_kernel(
    device: torch.device, source: Path, name: str, shared_bytes: int, **numbers: int
) -> driver.CUfunction:
    """The kernel `name` of a file, compiled for a device, with so much dynamic shared memory."""
    # "a": with what later architectures do not have.
    code = compile_code(source, f"sm_{architecture_of(device)}a", **numbers)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # from here on the device's context is this thread's
        library = checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = checked(driver.cuLibraryGetKernel(library, name.encode()))
        function = checked(driver.cuKernelGetFunction(kernel))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def compile_code(source: Path, target: str, **numbers: int) -> bytes:
    """A file with these numbers for its names in capital letters, as code for a target: "sm_90a"
    is compute capability 9.0."""
    options = [f"--gpu-architecture={target}", "--std=c++17", f"--include-path={source.parent}"]
    options += [f"--define-macro={name}={number}" for name, number in numbers.items()]
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
            raise RuntimeError(f"{source.name} does not compile with {numbers}:\n{log.decode()}")
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the CUDA driver or compiler returns, or an error with its name."""
    result, *values = answer
    if int(result) != 0:
        raise RuntimeError(f"CUDA: {result.name}")
    return values[0] if values else None
