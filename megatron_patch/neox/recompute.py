"""Activations that the backward pass computes again because that is cheaper than keeping them.

`metala.recompute` says which. Of a layer's forward pass are kept, d being the hidden size, f the
MLP's width and K the key width of H heads (see `tests/neox/test_recompute.py` for the bytes):

- `nothing` (is computed again): all that PyTorch keeps.
- `cheap`: all but the two norms (2 d numbers a token) and SwiGLU (f).
- `most`: what matrix products and residual sums wrote, and nothing else: the layer's input (d), the
  sum after the mixer (d), the two joined projections (2 H (K + V) and 2 f). The convolution's
  output and all that the operator keeps are computed again, without a matrix product of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Compute = Callable[[], Tensor]


def recomputed(
    value: Tensor, compute: Compute | None, weight: Tensor | None = None
) -> AbstractContextManager:
    """Returns a context in which no operation saves `value` for its backward pass.

    An operation that would save it computes it again in the backward pass. Other tensors are saved
    as always.

    Args:
        value: contiguous, or a view of a contiguous tensor with its dimensions in another order.
        compute: returns the same numbers, in the same order in memory. It must not keep `value`
            alive. Without it, everything is saved.
        weight: a parameter that the operations save. ZeRO 3 takes its memory away in between.
    """
    if compute is None or not value.requires_grad:
        return nullcontext()
    address, size, dtype = value.data_ptr(), value.numel(), value.dtype

    def pack(saved: Tensor) -> Any:
        if weight is not None and saved.data_ptr() == weight.data_ptr():
            # DeepSpeed's products save the parameter, PyTorch's own save it transposed.
            is_whole = saved.shape == weight.shape and saved.is_contiguous()
            return weight if is_whole else saved
        is_value = (saved.data_ptr(), saved.numel(), saved.dtype) == (address, size, dtype)
        return (saved.shape, saved.stride()) if is_value else saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return compute().as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


class ForTwo:
    """Computes a tensor for two who ask for it one after the other, and keeps it only between."""

    def __init__(self, compute: Compute):
        self.compute, self.value = compute, None

    def __call__(self) -> Tensor:
        value, self.value = self.value, None
        if value is None:
            value = self.value = self.compute()
        return value


class Rerun:
    """A call of which nothing is kept but the arguments: the backward pass runs it again.

    It is activation checkpointing (arXiv 1604.06174) of one function, as by
    `torch.utils.checkpoint` without reentrance. That gives the result of the second run to nobody;
    here the operation that follows takes it, so that it need not keep it either.

    Args:
        function: returns a tuple whose first entry is a tensor. It draws no random numbers.
        arguments: tensors or `None`.
        is_on: without it, all is kept and nothing is run again.
    """

    def __init__(
        self,
        function: Callable[..., tuple],
        arguments: Sequence[Tensor | None],
        is_on: bool = True,
    ):
        self.function, self.arguments, self.is_on = function, arguments, is_on
        self.saved: list[Tensor | None] = []  # by the second run, until the backward pass takes it

    def first(self) -> tuple:
        """Returns the function's result."""
        numbers = itertools.count()
        hooks = saved_tensors_hooks(lambda _: next(numbers), self._take)
        with hooks if self.is_on else nullcontext():
            return self.function(*self.arguments)

    def again(self) -> Tensor:
        """Returns the first entry of the result, computed again."""
        # Parameters are detached no earlier: ZeRO 3 has gathered them anew.
        arguments = [
            x if x is None else x.detach().requires_grad_(x.requires_grad) for x in self.arguments
        ]
        saved = self.saved = []
        hooks = saved_tensors_hooks(lambda x: saved.append(x.detach()), lambda _: None)
        with torch.enable_grad(), hooks:
            return self.function(*arguments)[0].detach()

    def _take(self, number: int) -> Tensor:
        if not self.saved or self.saved[number] is None:
            self.again()
        taken, self.saved[number] = self.saved[number], None
        return taken
