"""The first call compiles its kernels side by side, not one before each launch.

Threads serve: nearly all of it is MLIR, LLVM, ptxas and the C compiler, which run without Python's
lock.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

_compiling = contextvars.ContextVar("compiling", default=False)
_lock = threading.Lock()


def is_compiling() -> bool:
    """Whether this is a round that launches nothing, but has kernels compiled."""
    return _compiling.get()


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable:
    """`kernel[grid]`; in the round that compiles, what compiles the same launch."""
    return functools.partial(kernel.warmup, grid=grid) if is_compiling() else kernel[grid]


def compiled_together(kernels: Callable[..., Hashable]) -> Callable[[Callable], Callable]:
    """Decorator of a function that launches kernels by `launcher` alone and changes nothing but by
    them. Its first argument is a tensor on their device.

    Args:
        kernels: of the function's arguments, what decides which kernels it launches. For a new
            value the function runs twice; in the first round it launches nothing, and may call
            others of its kind, whose kernels are then compiled too. What the value does not tell,
            Triton's specialisation to other strides say, is compiled when launched.
    """

    def decorate(run: Callable) -> Callable:
        # Before 3.5, Triton cannot compile in threads.
        if not hasattr(triton, "AsyncCompileMode") or triton.knobs.runtime.interpret:
            return run
        compiled = set()

        @functools.wraps(run)
        def compiling_first(*arguments: Any) -> Any:
            value = kernels(*arguments)
            if is_compiling():  # within the round of another function, which calls this one
                compiled.add(value)
            elif value not in compiled:
                with _lock:
                    if value not in compiled:
                        # In a context of its own: a caller may compile asynchronously himself.
                        contextvars.Context().run(_compile, run, arguments)
                        compiled.add(value)
            return run(*arguments)

        # PyTorch reads an operator's schema from it, and would not find the names of annotations.
        compiling_first.__signature__ = inspect.signature(run, eval_str=True)
        return compiling_first

    return decorate


def _compile(run: Callable, arguments: tuple) -> None:
    _compiling.set(True)
    with _Loader(arguments[0]) as loader, triton.AsyncCompileMode(loader):
        run(*arguments)


class _Loader(ThreadPoolExecutor):
    """Compiles kernels and makes them ready to launch on the tensor's device."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def submit(self, compile_kernel: Callable, /) -> Future:
        return super().submit(self._load, compile_kernel)

    def _load(self, compile_kernel: Callable) -> Any:
        with torch.cuda.device_of(self.tensor):
            kernel = compile_kernel()
            # A property that loads the kernel and its launcher, which takes Triton up to 3.6 a run
            # of the C compiler.
            _ = kernel.run
        return kernel
