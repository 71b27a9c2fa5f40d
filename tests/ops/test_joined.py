"""Slices of one tensor, and the gradient that joins theirs."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.ops.joined import parts_of_one, split_joined

WIDTHS = [2, 2, 5]


def test_gradients_are_those_of_split():
    """Of parts that are used several times, never and once."""
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    found = []
    for parts in (split_joined(x, WIDTHS), x.split(WIDTHS, dim=-1)):
        loss = (parts[0] * parts[0]).sum() + parts[2].exp().sum()
        found.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*found)
    assert torch.autograd.gradcheck(lambda x: split_joined(x, WIDTHS), x)


class SideBySide(torch.autograd.Function):
    """Writes the gradients of its arguments into one tensor."""

    @staticmethod
    def forward(ctx, *parts):
        ctx.save_for_backward(*parts)
        return sum(part.square().sum() for part in parts)

    @staticmethod
    def backward(ctx, d_y):
        whole = 2 * d_y * torch.cat(ctx.saved_tensors, dim=-1)
        SideBySide.address = whole.data_ptr()
        return whole.split(WIDTHS, dim=-1)


def test_what_was_written_side_by_side_is_not_copied():
    x = torch.randn(3, 4, 9, requires_grad=True)
    (d_x,) = torch.autograd.grad(SideBySide.apply(*split_joined(x, WIDTHS)), x)
    assert torch.equal(d_x, 2 * x) and d_x.data_ptr() == SideBySide.address


def test_parts_of_one():
    x = torch.randn(3, 4, 12)[:, 1:, 1:10]
    assert torch.equal(parts_of_one(x.split(WIDTHS, dim=-1)), x)


@pytest.mark.parametrize("case", ["order", "gap", "copy", "None", "strides", "transposed"])
def test_not_parts_of_one(case):
    a, b, c = torch.randn(4, 4, 9).split(WIDTHS, dim=-1)
    others = {
        "order": (b, a, c),
        "gap": (a, c),
        "copy": (a, b.clone(), c),
        "None": (a, b, None),
        "strides": (a, b.transpose(0, 1), c),
        "transposed": (a.mT, b.mT),
    }
    assert parts_of_one(others[case]) is None
