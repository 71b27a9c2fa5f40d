"""The cross entropy that reads its logits once, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing

from megatron_patch.ops.triton.cross_entropy import BLOCK, cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def data(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (4 * torch.randn(rows, columns, generator=generator)).to(dtype)
    target = torch.randint(columns, (rows,), generator=generator)
    return logits, target, torch.rand(rows, generator=generator)


def oracle(logits, target, weights):
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, target, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), logits.grad


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 2 * BLOCK + 37), (3, BLOCK), (2, 7), (1, 1)])
def test_against_float64(rows, columns, dtype):
    logits, target, weights = data(rows, columns, dtype)
    wanted, gradient = oracle(logits, target, weights)
    x = logits.to(DEVICE).requires_grad_()
    losses = cross_entropy(x * 1, target.to(DEVICE))
    (losses * weights.to(DEVICE)).sum().backward()
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=2e-6)
    assert columns == 1 or error(x.grad.cpu(), gradient) < LIMITS[dtype]


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3.0e4, -3.0e4, 2.9e4]], device=DEVICE)
    losses = cross_entropy(logits, torch.tensor([2], device=DEVICE))
    torch.testing.assert_close(losses.cpu(), torch.tensor([1000.0]))


def test_a_second_backward_pass_is_refused():
    logits, target, _ = data(2, 7, torch.float32)
    losses = cross_entropy(logits.to(DEVICE).requires_grad_() * 1, target.to(DEVICE)).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has overwritten the logits"):
        losses.backward()


def one_rank(rank, ranks, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    logits, target, weights = data(5, 2 * 4100, torch.float32)
    share = logits.chunk(ranks, dim=1)[rank].contiguous().to(DEVICE).requires_grad_()
    losses = cross_entropy(share * 1, target.to(DEVICE), distributed.group.WORLD)
    (losses * weights.to(DEVICE)).sum().backward()
    torch.save((losses.detach().cpu(), share.grad.cpu()), f"{folder}/{rank}.pt")


def test_a_vocabulary_split_over_two_ranks(tmp_path):
    multiprocessing.start_processes(one_rank, (2, str(tmp_path)), 2, start_method="spawn")
    wanted, gradient = oracle(*data(5, 2 * 4100, torch.float32))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for losses, _ in found:
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=2e-6)
    assert error(torch.cat([share for _, share in found], dim=1), gradient) < 1e-6
