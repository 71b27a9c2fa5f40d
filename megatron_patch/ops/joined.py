"""Slices of one tensor along its last dimension, whose gradients are joined without a copy where
they were written side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def split_joined(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Returns `x.split(widths, dim=-1)`.

    PyTorch's own `split` concatenates the gradients of the parts. Here they are taken for the
    gradient of x as they are, if an operator wrote them into one tensor (`parts_of_one`).
    """
    return _Split.apply(x, tuple(widths))


def parts_of_one(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Returns the tensor [..., sum of widths] of which `parts` [..., width] are the slices along
    the last dimension, in order; `None` if there is no such tensor."""
    first = parts[0]
    if first is None:
        return None
    offset = first.storage_offset()
    for part in parts:
        if (
            part is None
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.dtype != first.dtype
            or part.shape[:-1] != first.shape[:-1]
            or part.stride() != first.stride()
            or part.stride(-1) != 1
            or part.storage_offset() != offset
        ):
            return None
        offset += part.shape[-1]
    shape = (*first.shape[:-1], offset - first.storage_offset())
    return first.as_strided(shape, first.stride(), first.storage_offset())


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        return x.split(widths, dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = parts_of_one(gradients)
        return torch.cat(gradients, dim=-1) if whole is None else whole, None
