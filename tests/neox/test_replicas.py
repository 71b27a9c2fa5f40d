"""Ranks over gloo: parameters that all have, and the random state, are the same on all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_patch.neox.upstream_fixes.cpu_mode import _redirect_cuda
from megatron_patch.neox.upstream_fixes.generation import share_random_state
from megatron_patch.neox.upstream_fixes.saving import check_replicas
from tests.neox.training import free_port


@pytest.fixture
def run(tmp_path):
    def run_ranks(code: Callable[[int, torch.nn.Module], None], ranks: int = 2):
        """Exit codes and all output of `code`, run by each rank with a model of its own."""
        port, output = free_port(), tmp_path / "output"
        arguments = [(code, rank, ranks, port, output) for rank in range(ranks)]
        processes = [
            multiprocessing.get_context("fork").Process(target=_run_rank, args=a) for a in arguments
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        return [process.exitcode for process in processes], output.read_text()

    return run_ranks


def _run_rank(code: Callable, rank: int, ranks: int, port: int, output: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _redirect_cuda()
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    module = torch.nn.ModuleDict(
        {
            "norm": torch.nn.LayerNorm(3),
            "linear": torch.nn.Linear(3, 2),
            "short": torch.nn.Linear(3, 3, dtype=torch.bfloat16),
        }
    ).requires_grad_(False)
    with output.open("a") as file, contextlib.redirect_stdout(file):
        code(rank, module)


def test_equal_replicas_pass(run):
    """Also where they are NaN, and where split ones differ."""

    def code(rank, module):
        module["norm"].bias[1] = float("nan")
        module["linear"].weight.model_parallel = True
        module["linear"].weight += rank
        check_replicas(module, dist.group.WORLD, 0)

    assert run(code) == ([0, 0], "")


@pytest.mark.parametrize("name", ["norm.weight", "short.bias"])
def test_a_drift_of_one_bit_ends_every_rank(run, name):
    def code(rank, module):
        dict(module.named_parameters())[name].view(torch.int16)[-1] += rank
        check_replicas(module, dist.group.WORLD, 0)

    codes, output = run(code)
    assert codes == [1, 1]
    assert output == (
        f"MetaLA: {name}: found other values on rank 1 than on rank 0, wanted the same on all "
        "tensor-parallel ranks; no checkpoint was written\n"
    )


def test_ranks_of_a_group_that_is_alike_end_too(run):
    """Four ranks in two groups: else those of the other group would wait for ever."""

    def code(rank, module):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        module["norm"].weight[0] += rank == 3
        check_replicas(module, groups[rank // 2], rank // 2 * 2)

    codes, output = run(code, ranks=4)
    assert codes == [1] * 4
    assert output.startswith("MetaLA: norm.weight: found other values on rank 3 than on rank 2")


def test_a_shared_random_state_draws_the_same(run):
    def code(rank, module):
        torch.rand(rank)
        share_random_state(dist.group.WORLD, 0)
        print(torch.rand(4).tolist())

    codes, output = run(code)
    assert codes == [0, 0]
    one, other = output.splitlines()
    assert one == other
