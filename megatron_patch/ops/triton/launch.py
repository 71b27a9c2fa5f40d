"""Host code that the Triton operators share: compiling kernels together, launching them, and
connecting them to autograd."""

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
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from megatron_patch.ops.checks import is_traced, records_gradients

_compiling = contextvars.ContextVar("compiling", default=False)
_lock = threading.Lock()
# Whether a compiled kernel takes all of its parameters, as it does from Triton 3.5 on.
_takes_all_parameters = hasattr(triton, "AsyncCompileMode") and torch.version.hip is None


def is_compiling() -> bool:
    """Returns whether this pass only compiles kernels and launches nothing."""
    return _compiling.get()


def current_stream() -> tuple[int, int]:
    """Returns the current device and the address of its current stream."""
    device = driver.active.get_current_device()
    return device, driver.active.get_current_stream(device)


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple, numbers: tuple = (), **options: Any
) -> None:
    """Launches a kernel on the current device and stream, or in a compile pass only compiles it.

    Triton's own path examines all arguments and asks the driver about every pointer, which takes
    longer than short sequences take the GPU. It serves the first launch of a `launch_key`. The next
    ones call the kernel that it compiled, with addresses in place of tensors, and see no setting of
    Triton that has changed since.

    Args:
        grid: one to three sizes.
        tensors: the kernel's first parameters. `None` stands for a tensor that is not there; a
            tuple for a parameter that is a tuple of tensors.
        numbers: the next parameters: ints, floats and tuples of ints.
        options: the other parameters, all constexpr, and Triton's own options.
    """
    if is_compiling():
        kernel.warmup(*tensors, *numbers, grid=grid, **options)
        return
    if not _may_skip_binder(kernel):
        kernel[grid](*tensors, *numbers, **options)
        return
    device, stream = current_stream()
    key, addresses = launch_key(kernel, device, tensors, numbers, options)
    found = _compiled.get(key)
    if found is None:
        _keep(key, kernel[grid](*tensors, *numbers, **options), kernel, len(tensors + numbers))
        return
    compiled, constants = found
    try:
        compiled.run(
            *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata,
            None, None, None,  # no hooks, and nothing to tell them
            *addresses, *numbers, *constants,
        )  # fmt: skip
    except TypeError:  # this Triton's launcher takes other arguments, and has launched nothing
        global _takes_all_parameters
        _takes_all_parameters = False
        kernel[grid](*tensors, *numbers, **options)


# What launches with a `launch_key` call: the kernel that Triton compiled, and as many `None` as it
# has constexpr parameters, whose values it ignores.
_compiled: dict[tuple, tuple[CompiledKernel, list[None]]] = {}
_LARGEST = 4096  # keys; sequence lengths are in them


def _keep(key: tuple, compiled: Any, kernel: JITFunction, count: int) -> None:
    if isinstance(compiled, CompiledKernel):
        if len(_compiled) >= _LARGEST:
            _compiled.clear()
        _compiled[key] = compiled, [None] * (len(kernel.arg_names) - count)


def _may_skip_binder(kernel: Any) -> bool:
    """Returns whether a compiled kernel may be called: not in the interpreter, on AMD and before
    Triton 3.5, where it takes other arguments, nor while a profiler hooks into launches."""
    if type(kernel) is not JITFunction or not _takes_all_parameters:
        return False
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    # A chain of hooks, or in other versions a hook or `None`.
    return not getattr(enter, "calls", enter) and not getattr(leave, "calls", leave)


def launch_key(
    kernel: Any, device: int, tensors: tuple, numbers: tuple, options: dict[str, Any]
) -> tuple[tuple, list]:
    """Returns what decides which compiled kernel serves a launch, and the tensors' addresses.

    Triton compiles for dtypes, for whether addresses are multiples of 16, for the values of
    constexpr parameters, and for the types of numbers and whether they are 1 or multiples of 16.
    The key holds the numbers themselves, and their types because 1 == 1.0.
    """
    kinds: list = [id(kernel), device, numbers, *map(type, numbers), *options, *options.values()]
    addresses = _addresses(tensors, kinds)
    return tuple(kinds), addresses


def _addresses(tensors: tuple, kinds: list) -> list:
    """Returns the addresses of tensors and appends what Triton tells tensors apart by."""
    addresses: list = []
    for x in tensors:
        if x is None:
            addresses.append(None)
            kinds.append(None)
        elif isinstance(x, tuple):
            kinds.append(len(x))
            addresses.append(tuple(_addresses(x, kinds)))
        else:
            address = x.data_ptr()
            addresses.append(address)
            kinds.append((x.dtype,) if address % 16 else x.dtype)
    return addresses


def compiled_together(cache_key: Callable[..., Hashable]) -> Callable[[Callable], Callable]:
    """Decorates a function that launches kernels, so that its first call compiles them in parallel.

    Triton compiles a kernel when it is first launched, one after the other. Almost all of that time
    goes to MLIR, LLVM, ptxas and the C compiler, which release Python's lock, so threads are
    enough. The function must launch through `launch`, must have no other side effect, and takes a
    tensor on the kernels' device as its first argument.

    Args:
        cache_key: maps the function's arguments to a value that decides which kernels it launches.
            For a new value the function runs twice; the first run only compiles. That run may call
            other decorated functions, whose kernels then compile too. Variants that the value does
            not tell apart (Triton also specialises on strides) compile when they are launched.
    """

    def decorate(run: Callable) -> Callable:
        # Triton before 3.5 cannot compile in threads.
        if not hasattr(triton, "AsyncCompileMode") or triton.knobs.runtime.interpret:
            return run
        compiled = set()

        @functools.wraps(run)
        def compiling_first(*arguments: Any) -> Any:
            key = cache_key(*arguments)
            if is_compiling():  # called from another decorated function's compile pass
                compiled.add(key)
            elif key not in compiled:
                with _lock:
                    if key not in compiled:
                        # A fresh context, because the caller may use AsyncCompileMode as well.
                        contextvars.Context().run(_compile, run, arguments)
                        compiled.add(key)
            return run(*arguments)

        # torch.library reads the schema from the signature and cannot resolve string annotations.
        compiling_first.__signature__ = inspect.signature(run, eval_str=True)
        return compiling_first

    return decorate


def _compile(run: Callable, arguments: tuple) -> None:
    _compiling.set(True)
    with _Loader(arguments[0]) as loader, triton.AsyncCompileMode(loader):
        run(*arguments)


class _Loader(ThreadPoolExecutor):
    """A thread pool that compiles kernels and loads them on the tensor's device."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def submit(self, compile_kernel: Callable, /) -> Future:
        return super().submit(self._load, compile_kernel)

    def _load(self, compile_kernel: Callable) -> Any:
        with torch.cuda.device_of(self.tensor):
            kernel = compile_kernel()
            # Reading this property loads the kernel and its launcher. Up to Triton 3.6 that runs
            # the C compiler.
            _ = kernel.run
        return kernel


def differentiable(
    operator: torch.library.CustomOpDef,
    run: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[[Any, tuple, tuple], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
    results: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """Returns `operator` with gradients, and with a fast path for eager calls.

    Dispatching a custom operator takes longer than the kernels do on short sequences. So eager
    calls go through a plain `autograd.Function`; the operator serves `torch.compile`, fake tensors
    and `torch.func`, which need to see it.

    Args:
        operator: takes a tensor first.
        run: the function that `operator` wraps.
        setup_context: takes (ctx, inputs, output), as in `register_autograd`.
        gradients: takes (ctx, whether the call is eager, the gradient of each result).
        results: how many results a caller needs. The others, which `setup_context` saves, are
            results only because a custom operator cannot save anything else.
    """

    def traced_gradients(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(ctx, False, *found)

    def traced_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[results:])

    operator.register_autograd(traced_gradients, setup_context=traced_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output[:results]

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
            return gradients(ctx, True, *found)

    def call(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return (operator if is_traced(x) else Eager.apply)(x, *others)

    return call


def without_last(run: Callable) -> Callable:
    """Returns a function without its last parameter, which has a default: custom operators take
    tensors, numbers and strings alone."""

    @functools.wraps(run)
    def call(*arguments: Any) -> Any:
        return run(*arguments)

    signature = inspect.signature(run, eval_str=True)
    call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[:-1])
    return call


def is_decoding_step(x: Tensor, cu_seqlens: Tensor | None, *tensors: Tensor | None) -> bool:
    """Returns whether the one-token kernels can serve a call on x [B, T, ...]."""
    return x.shape[1] == 1 and cu_seqlens is None and not records_gradients(*tensors)


def cdiv(count: int, size: int) -> int:
    """Returns count / size, rounded up, in a tenth of the time of `triton.cdiv`."""
    return -(-count // size)


def last_stride_one(x: Tensor | None) -> Tensor | None:
    """Returns x itself if its last stride is 1, as every kernel assumes, or else a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Returns x in contiguous memory; `None` stays `None`."""
    return None if x is None else x.contiguous()
