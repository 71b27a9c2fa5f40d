"""Which backend serves a call: the one place that knows where each of them runs, and says why not.

Public operators call `choose`. A backend that is asked for by name runs wherever nothing is known
to stop it (`obstacle`), or the call ends with the reason. "auto" takes the first, fastest first,
that was also checked against float64 on such a GPU and for such widths, and says once, in a line,
why it passed others by.

Only what a call could take is imported, when it is called: a package that is missing or broken, or
another module of its name, is a reason and no error.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from operator import index
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Triton's products take bfloat16 and TensorFloat-32 operands from Ampere on.
SMALLEST_CAPABILITY = (8, 0)

# Where our kernels agreed with float64: on an H200, by `scripts/benchmarks/benchmark_*.py` and tests/ops.
# "auto" takes them nowhere else, for Triton has miscompiled some tiles on Hopper.
CHECKED_CAPABILITIES = ((9, 0),)
# Of heads, by dtype: the smallest and the largest K, and V / K.
CHECKED_WIDTHS = {
    torch.bfloat16: (32, 256, (1, 2)),
    torch.float16: (40, 128, (1, 2)),
    torch.float32: (40, 128, (1, 2)),
}


class Backend(NamedTuple):
    """Where a backend runs.

    Attributes:
        module: holds it, and imports what it needs. A function in it, `unsupported_reason(dtype,
            device, **sizes)`, says why it cannot serve such a call, or `None`.
        package: what has to be installed.
        ours: our kernels hold NVIDIA's PTX, and were checked on the GPUs above. Other projects
            check theirs.
        widths: that it was checked for certain widths of heads alone.
    """

    module: str
    package: str
    ours: bool = True
    widths: bool = False


# By operator, fastest first; `None` for what runs on PyTorch alone, everywhere.
REGISTRY: dict[str, dict[str, Backend | None]] = {
    "meta_linear_attention": {
        "triton": Backend("megatron_patch.ops.triton", "triton", widths=True),
        "fla": Backend("megatron_patch.ops.fla", "flash-linear-attention", ours=False),
        "chunked": None,
        "reference": None,
    },
    "short_convolution": {
        "triton": Backend("megatron_patch.ops.triton", "triton"),
        "causal_conv1d": Backend("megatron_patch.ops.causal_conv1d", "causal-conv1d", ours=False),
        "torch": None,
    },
    "swiglu": {
        "triton": Backend("megatron_patch.ops.triton", "triton"),
        "torch": None,
    },
    "token_decoder": {
        "cuda": Backend("megatron_patch.ops.decoding.decoder", "cuda-bindings"),
        "layers": None,  # the model's own
    },
}

_failures: dict[str, str | None] = {}  # by module, of imports that were tried
_decided: dict[tuple, str] = {}  # by call, for a model asks many times in a step
_said: set[str] = set()


def names_of(operator: str) -> tuple[str, ...]:
    """What an operator's argument `backend` may be."""
    return ("auto", *REGISTRY[operator])


def choose(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> str:
    """The backend that serves a call.

    Args:
        operator, backend: as in `REGISTRY`; or "auto".
        dtype, device: of the call's tensors. Each GPU of a machine is asked for itself.
        sizes: by the names in the operator's docstring: K and V of heads, W and D of a convolution.

    Raises:
        ValueError: the backend asked for by name cannot run here; the message says why.
    """
    # Where no kernel ever runs, and nobody expects one. Here sizes may stay symbols.
    if backend == "auto" and (device.type in ("cpu", "meta") or dtype == torch.float64):
        return _plain(operator)
    if backend != "auto" and REGISTRY[operator][backend] is None:
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
        if (reason := obstacle(operator, backend, dtype, device, **sizes)) is not None:
            raise ValueError(f"backend {backend!r}: {reason}; use backend 'auto' or {plain!r}")
        return backend
    passed = []
    for name in REGISTRY[operator]:
        reason = obstacle(operator, name, dtype, device, **sizes)
        if reason is None and (doubt := _doubt(operator, name, dtype, device, sizes)):
            reason = doubt
        if reason is None:
            break
        passed.append(f"{name!r} {reason}")
    if passed:
        say(f"MetaLA: {operator} on {device} by {name!r}, for " + "; ".join(passed))
    return name


# What `torch.compiler.assume_constant_result` does, which would import all of Dynamo: a graph is
# compiled for its dtypes, devices and sizes anyway.
_choose._dynamo_marked_constant = True


def obstacle(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> str | None:
    """Why a backend cannot serve such a call, or `None` if nothing is known to stop it."""
    kind = REGISTRY[operator][backend]
    if kind is None:
        return None
    if dtype not in GPU_DTYPES:
        return f"found {_name(dtype)} tensors, wanted float16, bfloat16 or float32"
    if not (backend == "triton" and interpreted(dtype)):
        if device.type != "cuda":
            return f"found tensors on {device}, wanted cuda"
        if (reason := _gpu_obstacle(kind, device)) is not None:
            return reason
    if (failure := import_failure(kind.module)) is not None:
        return f"the package {kind.package} {failure}"
    own = getattr(import_module(kind.module), "unsupported_reason", None)
    return None if own is None else own(dtype, device, **sizes)


def _gpu_obstacle(kind: Backend, device: torch.device) -> str | None:
    # First the vendor: ROCm has capabilities of its own, and an MI250's reads as a H100's.
    if torch.version.hip is not None:
        return "found an AMD GPU, wanted one of NVIDIA" if kind.ours else None
    try:
        found = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:  # a tensor of a GPU that is not there
        return f"cannot ask {device} for its compute capability ({_first_line(error)})"
    if found < SMALLEST_CAPABILITY:
        return (
            f"found compute capability {_dots(found)}, wanted {_dots(SMALLEST_CAPABILITY)} or more"
        )
    return None


def _doubt(
    operator: str, backend: str, dtype: torch.dtype, device: torch.device, sizes: dict[str, int]
) -> str | None:
    """Why "auto" does not take a backend that could run: it was not checked so."""
    kind = REGISTRY[operator][backend]
    if kind is None or not kind.ours:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability not in CHECKED_CAPABILITIES:
        checked = " or ".join(map(_dots, CHECKED_CAPABILITIES))
        reason = f"found compute capability {_dots(capability)}, checked on {checked}"
    elif kind.widths and not is_checked(sizes["K"], sizes["V"], dtype):
        smallest, largest, ratios = CHECKED_WIDTHS[dtype]
        ratios = " or ".join(f"{ratio} K" for ratio in ratios)
        reason = f"found K = {sizes['K']}, V = {sizes['V']} in {_name(dtype)}, checked for K of "
        reason += f"{smallest} to {largest} and V = {ratios}"
    else:
        return None
    # What decodes whole tokens cannot be asked for by name.
    return reason if operator == "token_decoder" else f"{reason} (asked for by name it runs)"


def is_checked(key_width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether `meta_linear_attention`'s kernels agreed with float64 for heads of K and V."""
    smallest, largest, ratios = CHECKED_WIDTHS[dtype]
    return smallest <= key_width <= largest and any(value_width == r * key_width for r in ratios)


def import_failure(module: str) -> str | None:
    """Why a module cannot be imported, or `None` if it was. It is tried once."""
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
    """Whether the Triton kernels run anywhere, in Triton's interpreter: slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and dtype in GPU_DTYPES


def _plain(operator: str) -> str:
    """The first that runs everywhere."""
    return next(name for name, kind in REGISTRY[operator].items() if kind is None)


def say(text: str) -> None:
    """A line of warning, once in a process."""
    if text not in _said:
        _said.add(text)
        logger.warning(text)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dots(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
