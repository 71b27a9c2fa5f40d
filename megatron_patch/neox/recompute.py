"""Activations that the backward pass computes again because that is cheaper than keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def recomputed(
    value: Tensor, compute: Callable[[], Tensor], is_on: bool = True
) -> AbstractContextManager:
    """Returns a context in which no operation saves `value` for its backward pass.

    An operation that would save it computes it again in the backward pass. Other tensors are saved
    as always.

    Args:
        value: contiguous.
        compute: returns the same numbers. It must not keep `value` alive.
        is_on: without it, everything is saved.
    """
    if not (is_on and value.requires_grad):
        return nullcontext()
    address, size, dtype = value.data_ptr(), value.numel(), value.dtype

    def pack(saved: Tensor) -> Any:
        is_value = (saved.data_ptr(), saved.numel(), saved.dtype) == (address, size, dtype)
        return (saved.shape, saved.stride()) if is_value else saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return compute().as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
