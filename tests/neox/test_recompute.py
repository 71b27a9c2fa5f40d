"""What the backward pass computes again is not kept, and changes no gradient."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.neox.recompute import recomputed


class Weight(torch.autograd.Function):
    """An operation that saves its input by `save_for_backward`, as the kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        return d_y * weight, d_y * x


def run(is_on):
    """Returns the loss, the gradients, and whether the norm's output was alive before backward."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, requires_grad=True)
    weights = [torch.randn(8, requires_grad=True), torch.randn(6, 8, requires_grad=True)]
    normed = F.rms_norm(x, (8,))
    storage = weakref.ref(normed.untyped_storage())
    compute = partial(F.rms_norm, x.detach(), (8,))
    with recomputed(normed, compute, is_on):
        y = Weight.apply(normed, weights[0]).sum() + F.linear(normed, weights[1]).square().sum()
    del normed
    gc.collect()
    is_kept = storage() is not None
    return [y.detach(), *torch.autograd.grad(y, [x, *weights])], is_kept


def test_gradients_are_the_same_and_the_value_is_gone():
    (kept, is_kept), (found, is_still_kept) = run(False), run(True)
    assert all(map(torch.equal, found, kept))
    assert is_kept and not is_still_kept


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_hooked_without_gradients(grad):
    value = torch.ones(2)
    with torch.set_grad_enabled(grad), recomputed(value, lambda: 1 / 0):
        y = value * torch.ones(2, requires_grad=True)
    if grad:
        y.sum().backward()
