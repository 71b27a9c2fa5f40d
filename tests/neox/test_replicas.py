"""Two ranks over gloo: parameters that both have, and the random state, are the same on both."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.neox.training import free_port

SETUP = """
import torch, torch.distributed as dist
from megatron_patch.neox.cpu_mode import _redirect_cuda
from megatron_patch.neox.replicas import check_replicas, share_random_state
_redirect_cuda()
dist.init_process_group("gloo")
rank, group = dist.get_rank(), dist.group.WORLD
torch.manual_seed(0)
module = torch.nn.ModuleDict({
    "norm": torch.nn.LayerNorm(3), "linear": torch.nn.Linear(3, 2), "short": torch.nn.Linear(3, 3),
}).requires_grad_(False)
module["short"].bfloat16()
"""


def run(code: str, ranks: int = 2) -> tuple[list[int], str]:
    """Exit codes and all output of `code`, run by each rank."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SETUP + code],
            env={**os.environ, **rendezvous, "RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], "".join(outputs)


def test_equal_replicas_pass():
    """Also where they are NaN, and where split ones differ."""
    code = """
module["norm"].bias[1] = float("nan")
module["linear"].weight.model_parallel = True
module["linear"].weight += rank
check_replicas(module, group, 0)
    """
    assert run(code) == ([0, 0], "")


@pytest.mark.parametrize("name", ["norm.weight", "short.bias"])
def test_a_drift_of_one_bit_ends_every_rank(name):
    code = f"""
bits = dict(module.named_parameters())["{name}"].view(torch.int16)
bits[-1] += rank
check_replicas(module, group, 0)
    """
    codes, output = run(code)
    assert codes == [1, 1]
    assert output == (
        f"MetaLA: {name}: found other values on rank 1 than on rank 0, wanted the same on all "
        "tensor-parallel ranks; no checkpoint was written\n"
    )


def test_ranks_of_a_group_that_is_alike_end_too():
    """Four ranks in two groups: else those of the other group would wait for ever."""
    code = """
groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
module["norm"].weight[0] += rank == 3
check_replicas(module, groups[rank // 2], rank // 2 * 2)
    """
    codes, output = run(code, ranks=4)
    assert codes == [1] * 4
    assert output.startswith("MetaLA: norm.weight: found other values on rank 3 than on rank 2")


def test_a_shared_random_state_draws_the_same():
    code = """
torch.rand(rank)
share_random_state(group, 0)
print(torch.rand(4).tolist())
    """
    codes, output = run(code)
    assert codes == [0, 0]
    one, other = output.splitlines()
    assert one == other
