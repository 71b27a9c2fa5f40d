"""The cross entropy that serves where no kernel runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.neox.loss import _CrossEntropy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradient_equal_pytorchs(dtype, tolerance):
    torch.manual_seed(0)
    logits = 30 * torch.randn(7, 50, dtype=dtype)
    target, weights = torch.randint(50, (7,)), torch.randn(7, dtype=dtype)
    weights[3] = 0  # a token that does not count
    results = []
    for losses_of in (_CrossEntropy.apply, lambda x, y: F.cross_entropy(x, y, reduction="none")):
        x = logits.clone().requires_grad_()
        losses = losses_of(x, target)
        (gradient,) = torch.autograd.grad(losses, x, weights)
        assert torch.equal(x.detach(), logits)
        results.append((losses, gradient))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_a_second_backward_pass_is_refused():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = _CrossEntropy.apply(logits, torch.tensor([0, 1, 2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
