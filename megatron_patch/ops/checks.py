"""The operators' argument checks. Every message names the argument, what was found and what was
wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    layout: str,
    sizes: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raises unless `tensor` has the wanted shape, dtype and device.

    Args:
        layout: the names of the dimensions, such as "B, T, H, K".
        sizes: the size of each dimension; `None` for any size of at least one.
        dtypes: the dtypes accepted.
        device: the device, or `None` for any.

    Raises:
        ValueError: on the first mismatch.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: found {type(tensor).__name__}, wanted a tensor [{layout}]")
    fits = tensor.dim() == len(sizes) and all(
        found == wanted if wanted is not None else found > 0
        for found, wanted in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join("≥ 1" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{name}: found shape {list(tensor.shape)}, wanted [{layout}] = [{wanted}]"
        )
    if tensor.dtype not in dtypes:
        found, wanted = dtype_name(tensor.dtype), " or ".join(map(dtype_name, dtypes))
        raise ValueError(f"{name} {list(tensor.shape)}: found dtype {found}, wanted {wanted}")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{name} {list(tensor.shape)}: found on device {tensor.device}, wanted {device}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`, listing them."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: found {value!r}, the known ones are {known}")


def check_number(name: str, value: object, *, positive: bool) -> None:
    """Raises ValueError unless `value` is a finite Python number (> 0 if `positive`)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # `0 * value == 0` is false for infinities and NaN alone.
    if not is_number or not (value > 0 or not positive) or 0 * value != 0:
        wanted = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"{name}: found {value!r}, wanted {wanted}")


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """Returns whether autograd records an operation on these tensors; any may be `None`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_traced(*tensors: torch.Tensor | None) -> bool:
    """Returns whether something traces a call on these tensors: `torch.compile`, fake tensors,
    `make_fx` or `torch.func`. It cannot see into an `autograd.Function` that launches kernels."""
    return (
        torch.compiler.is_compiling()
        or any(x is not None and type(x) is not torch.Tensor for x in tensors)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def check_inplace_final_state(
    initial_state: torch.Tensor | None, *others: torch.Tensor | None
) -> None:
    """Raises unless the final state may be written over `initial_state`.

    Raises:
        ValueError: there is no initial state, or autograd needs it, or several of its entries share
            memory.
    """
    if initial_state is None:
        raise ValueError(
            "inplace_final_state: found without initial_state, wanted with the state to write over"
        )
    if records_gradients(initial_state, *others):
        raise ValueError(
            "inplace_final_state: found while gradients are recorded, which need the state that "
            "would be overwritten, wanted under torch.no_grad() or inplace_final_state=False"
        )
    strides = zip(initial_state.stride(), initial_state.shape, strict=True)
    if initial_state.numel() and 0 in (stride for stride, size in strides if size > 1):
        raise ValueError(
            f"initial_state {list(initial_state.shape)}: found an expanded tensor, wanted memory "
            "for every entry to write the final state to"
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, time: int, device: torch.device) -> None:
    """Checks the boundaries of packed sequences: sequence n is tokens
    cu_seqlens[n] .. cu_seqlens[n + 1] - 1.

    Always checks shape, dtype, device and batch. Checks the values only on the CPU and outside
    `torch.compile`, where reading them is free: on a GPU every call would wait for the device.

    Raises:
        ValueError: batch is not 1, or `cu_seqlens` is no int32 or int64 tensor [N + 1] with N >= 1
            on `device`, or its values do not rise from 0 to `time`.
    """
    check_tensor("cu_seqlens", cu_seqlens, "N + 1", [None], (torch.int32, torch.int64), device)
    if len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: found shape {list(cu_seqlens.shape)}, wanted [N + 1], N ≥ 1")
    if batch != 1:
        raise ValueError(
            f"cu_seqlens {list(cu_seqlens.shape)}: found a batch of B = {batch}, "
            "wanted the sequences packed along time with B = 1"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != time:
        raise ValueError(
            f"cu_seqlens {list(cu_seqlens.shape)}: found values from {first} to {last}, "
            f"wanted from 0 to T = {time}"
        )
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens {list(cu_seqlens.shape)}: found falling values, "
            "wanted each to be at least the one before"
        )
