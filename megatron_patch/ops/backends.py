"""The one registry of backends: which function serves a call, or the reason why not.

`REGISTRY` lists each operator's backends, fastest first, and where each runs: vendor, compute
capability, dtypes, widths. A public operator calls what `implementation` returns. A backend that
the caller names runs wherever `unsupported_reason` knows nothing against it; otherwise the call
ends with that reason. "auto" takes the first backend that was also checked against float64 on such
a GPU and for such widths, and says once, in one line, why it passed others by.

A backend's module is imported when a call first asks for it. A package that is missing or broken is
a reason, not an error. README.md in this folder says how to add a backend.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from operator import index
from typing import NamedTuple

import torch

from megatron_patch.ops.checks import check_choice, dtype_name

logger = logging.getLogger(__name__)

GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities

# The compute capabilities on which our kernels agreed with float64 in `pytest -m gpu` (an H200).
# "auto" takes them nowhere else, because Triton has miscompiled some tiles on Hopper.
CHECKED_CAPABILITIES = (HOPPER,)
# The same for widths of heads, by dtype: the smallest and the largest K, and V / K.
CHECKED_WIDTHS = {
    torch.bfloat16: (8, 256, (1, 2)),
    torch.float16: (8, 128, (1, 2)),
    torch.float32: (8, 128, (1, 2)),
}


class Backend(NamedTuple):
    """A backend's module, and the GPUs, dtypes and widths that it runs for.

    Attributes:
        module: holds a function of the operator's name. It may hold a function
            `unsupported_reason(dtype, device, **sizes)`, which says why it cannot serve a call, or
            `None`.
        package: what must be installed beside torch; `None` for plain PyTorch, which runs on any
            device.
        vendors: the vendors of the GPUs that it runs on.
        dtypes: the dtypes that it takes.
        smallest, largest: the compute capabilities of NVIDIA's GPUs; `None` for no limit. Triton's
            products take bfloat16 and TensorFloat-32 operands from Ampere on.
        checked: the compute capabilities where "auto" takes it; `None` for all, where another
            project checks its kernels.
        widths: the widths of heads for which "auto" takes it, as `CHECKED_WIDTHS`; `None` for all.
    """

    module: str
    package: str | None = None
    vendors: tuple[str, ...] = ("NVIDIA",)
    dtypes: tuple[torch.dtype, ...] = GPU_DTYPES
    smallest: tuple[int, int] = AMPERE
    largest: tuple[int, int] | None = None
    checked: tuple[tuple[int, int], ...] | None = CHECKED_CAPABILITIES
    widths: dict[torch.dtype, tuple[int, int, tuple[int, ...]]] | None = None


def _external(module: str, package: str) -> Backend:
    """Returns the entry of another project's kernels."""
    return Backend(module, package, vendors=("NVIDIA", "AMD"), checked=None)


_TRITON = Backend("megatron_patch.ops.triton", "triton")
_TORCH = Backend("megatron_patch.ops.torch_ops")
_TRAINING = Backend("megatron_patch.ops.torch_training")
# By operator, fastest first.
REGISTRY: dict[str, dict[str, Backend]] = {
    "meta_linear_attention": {
        "triton": _TRITON._replace(widths=CHECKED_WIDTHS),
        "fla": _external("megatron_patch.ops.fla", "flash-linear-attention"),
        "chunked": _TORCH,
        "reference": Backend("megatron_patch.ops.reference"),
    },
    "short_convolution": {
        "triton": _TRITON,
        "causal_conv1d": _external("megatron_patch.ops.causal_conv1d", "causal-conv1d"),
        "torch": _TORCH,
    },
    "swiglu": {"triton": _TRITON, "torch": _TORCH},
    "swiglu_backward": {"triton": _TRITON, "torch": _TORCH},
    "add_rms_norm": {"triton": _TRITON, "torch": _TORCH},
    "accumulate": {"triton": _TRITON, "torch": _TRAINING},
    "adam_step": {"triton": _TRITON, "torch": _TRAINING},
    "cross_entropy": {"triton": _TRITON, "neox": Backend("")},  # GPT-NeoX's own
    "token_decoder": {
        "cuda": Backend("megatron_patch.ops.decoding.decoder", "cuda-bindings"),
        "layers": Backend(""),  # the model's own
    },
}
# The CUDA C++ kernels for a chunk's output and gradients on Hopper. They are no operator but take
# the place of two launches of the Triton backend.
HOPPER_CHUNKS = Backend(
    "megatron_patch.ops.hopper.launch", "cuda-bindings", dtypes=(torch.bfloat16,),
    smallest=HOPPER, largest=HOPPER,
)  # fmt: skip

_functions: dict[str, Callable] = {}  # by "operator.backend"
_failures: dict[str, str | None] = {}  # by module, of imports that were tried
_decided: dict[tuple, str] = {}  # by call, because a model asks many times in a step


def names_of(operator: str) -> tuple[str, ...]:
    """Returns the values that an operator's argument `backend` may have."""
    return ("auto", *REGISTRY[operator])


def implementation(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> Callable:
    """Returns the function that serves a call; see `choose`."""
    return function_of(operator, choose(operator, backend, dtype, device, **sizes))


def function_of(operator: str, backend: str) -> Callable:
    """Returns the function behind a backend that `choose` returned."""
    key = f"{operator}.{backend}"
    _load(key)
    return _functions[key]


def _load(key: str) -> None:
    if key not in _functions:
        operator, backend = key.split(".")
        module = import_module(REGISTRY[operator][backend].module)
        _functions[key] = getattr(module, operator)


def choose(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> str:
    """Returns the name of the backend that serves a call.

    Args:
        operator, backend: as in `REGISTRY`; or "auto".
        dtype, device: of the call's tensors. Each GPU of a machine is asked for itself.
        sizes: by the names in the operator's docstring: K and V of heads, W and D of a convolution.

    Raises:
        ValueError: the operator has no such backend, or it cannot run here; the message says why.
    """
    if backend != "auto" and backend not in REGISTRY[operator]:
        check_choice("backend", backend, names_of(operator))
    # No kernel runs here and nobody expects one. Sizes may be symbols.
    if backend == "auto" and (device.type in ("cpu", "meta") or dtype == torch.float64):
        return _plain(operator)
    if backend != "auto" and REGISTRY[operator][backend].package is None:
        return backend
    names, values = tuple(sizes), [index(x) for x in sizes.values()]
    return _choose(operator, backend, dtype, device, names, tuple(values))


def _choose(operator, backend, dtype, device, names, values) -> str:
    call = (operator, backend, dtype, device, names, values, interpreted(dtype))
    if call not in _decided:
        sizes = dict(zip(names, values, strict=True))
        _decided[call] = _decide(operator, backend, dtype, device, sizes)
    return _decided[call]


def _decide(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, sizes: dict[str, int]
) -> str:
    plain = _plain(operator)
    if backend != "auto":
        reason = unsupported_reason(operator, backend, dtype, device, **sizes)
        if reason is not None:
            raise ValueError(f"backend {backend!r}: {reason}; use backend 'auto' or {plain!r}")
        return backend
    passed = []
    for name, entry in REGISTRY[operator].items():
        reason = unsupported_reason(operator, name, dtype, device, **sizes)
        if reason is None:
            reason = _unchecked_reason(operator, entry, dtype, device, sizes)
        if reason is None:
            break
        passed.append(f"{name!r} {reason}")
    if passed:
        say(f"MetaLA: {operator} on {device} by {name!r}, for " + "; ".join(passed))
    return name


# This is what `torch.compiler.assume_constant_result` sets, which would import all of Dynamo. A
# graph is compiled for its dtypes, devices and sizes anyway.
_choose._dynamo_marked_constant = _load._dynamo_marked_constant = True


def unsupported_reason(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> str | None:
    """Returns why a backend cannot serve such a call, or `None` if nothing is known to stop it."""
    may_interpret = backend == "triton" and interpreted(dtype)
    return _unsupported_reason(REGISTRY[operator][backend], dtype, device, sizes, may_interpret)


def hopper_chunks(dtype: torch.dtype, device: torch.device, K: int, V: int) -> bool:
    """Returns whether the CUDA C++ kernels serve the chunks of a call of the Triton backend.

    The kernels look at strides and addresses themselves. Says once if only the package is missing.

    Args:
        dtype, device: of q.
        K, V: the widths of its heads.
    """
    call = ("hopper_chunks", dtype, device, K, V)
    if call not in _decided:
        reason = _unsupported_reason(HOPPER_CHUNKS, dtype, device, {"K": K, "V": V})
        _decided[call] = reason or ""
        if (failure := _failures.get(HOPPER_CHUNKS.module)) is not None:
            say(
                f"MetaLA: the package {HOPPER_CHUNKS.package} {failure}: on Hopper, kernels in "
                "Triton take the place of those in CUDA C++"
            )
    return not _decided[call]


def _unsupported_reason(
    entry: Backend,
    dtype: torch.dtype,
    device: torch.device,
    sizes: dict[str, int],
    may_interpret: bool = False,
) -> str | None:
    if entry.package is None:
        return None
    if dtype not in entry.dtypes:
        *others, last = map(dtype_name, entry.dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        return f"found {dtype_name(dtype)} tensors, wanted {wanted}"
    if not may_interpret:
        if device.type != "cuda":
            return f"found tensors on {device}, wanted cuda"
        if (reason := _unsupported_gpu_reason(entry, device)) is not None:
            return reason
    if (failure := import_failure(entry.module)) is not None:
        return f"the package {entry.package} {failure}"
    own = getattr(import_module(entry.module), "unsupported_reason", None)
    return None if own is None else own(dtype, device, **sizes)


def _unsupported_gpu_reason(entry: Backend, device: torch.device) -> str | None:
    # The vendor comes first: ROCm has capabilities of its own, and an MI250 reads as a H100.
    vendor = "NVIDIA" if torch.version.hip is None else "AMD"
    if vendor not in entry.vendors:
        return f"found an {vendor} GPU, wanted one of {' or '.join(entry.vendors)}"
    if vendor == "AMD":
        return None
    try:
        found = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # a tensor of a GPU that is not there
        return f"cannot ask {device} for its compute capability ({_first_line(error)})"
    if found < entry.smallest:
        return f"found compute capability {_dots(found)}, wanted {_dots(entry.smallest)} or more"
    if entry.largest is not None and found > entry.largest:
        return f"found compute capability {_dots(found)}, wanted {_dots(entry.largest)} or less"
    return None


def _unchecked_reason(
    operator: str, entry: Backend, dtype: torch.dtype, device: torch.device, sizes: dict[str, int]
) -> str | None:
    """Returns why "auto" does not take a backend that could run: nobody checked it so."""
    if entry.package is None or entry.checked is None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability not in entry.checked:
        checked = " or ".join(map(_dots, entry.checked))
        reason = f"found compute capability {_dots(capability)}, checked on {checked}"
    elif entry.widths is not None and not is_checked(sizes["K"], sizes["V"], dtype):
        smallest, largest, ratios = entry.widths[dtype]
        ratios = " or ".join(f"{ratio} K" for ratio in ratios)
        found = f"K = {sizes['K']}, V = {sizes['V']} in {dtype_name(dtype)}"
        reason = f"found {found}, checked for K of {smallest} to {largest} and V = {ratios}"
    else:
        return None
    # Nobody can ask for a token decoder by name.
    return reason if operator == "token_decoder" else f"{reason} (asked for by name it runs)"


def is_checked(key_width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernels of `meta_linear_attention` agreed with float64 for K and V."""
    smallest, largest, ratios = CHECKED_WIDTHS[dtype]
    return smallest <= key_width <= largest and any(value_width == r * key_width for r in ratios)


def import_failure(module: str) -> str | None:
    """Returns why a module cannot be imported, or `None` if it was. Tries once in a process."""
    if module not in _failures:
        try:
            import_module(module)
            _failures[module] = None
        except ModuleNotFoundError as error:
            _failures[module] = f"is not installed ({_first_line(error)})"
        except Exception as error:  # a broken package may raise anything
            _failures[module] = f"cannot be imported ({type(error).__name__}: {_first_line(error)})"
    return _failures[module]


def interpreted(dtype: torch.dtype) -> bool:
    """Returns whether Triton's interpreter runs the kernels on any device: slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and dtype in GPU_DTYPES


def _plain(operator: str) -> str:
    """Returns the first backend that runs everywhere."""
    return next(name for name, entry in REGISTRY[operator].items() if entry.package is None)


@functools.cache
def say(text: str) -> None:
    """Logs a warning, once in a process."""
    logger.warning(text)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _dots(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
