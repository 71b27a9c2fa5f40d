"""In runs with MetaLA layers `type: Adam` is PyTorch's, on a GPU too and beside apex."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_patch.neox.pytorch_adam import take_pytorchs_adam


@pytest.fixture
def get_optimizer(monkeypatch):
    """Stands for GPT-NeoX's function, which prefers apex's Adam to DeepSpeed's."""
    adam = pytest.importorskip("deepspeed.ops.adam")
    apex, training = ModuleType("apex.optimizers"), ModuleType("megatron.training")
    apex.FusedAdam = lambda parameters, **options: "apex"

    def original(model, neox_args):
        try:
            from apex.optimizers import FusedAdam as Adam
        except ImportError:
            from deepspeed.ops.adam import FusedAdam as Adam
        return Adam(model.parameters(), weight_decay=0.1, **neox_args.optimizer["params"])

    training.get_optimizer = original
    for module in (ModuleType("apex"), apex, ModuleType("megatron"), training):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = adam.FusedAdam
    take_pytorchs_adam()
    yield lambda args: training.get_optimizer(model=torch.nn.Linear(2, 2), neox_args=args)
    assert sys.modules["apex.optimizers"] is apex and adam.FusedAdam is before


def args(**changes) -> SimpleNamespace:
    params = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}
    run = dict(attention_config=["metala"], precision="bfloat16", zero_stage=1)
    return SimpleNamespace(**run | {"optimizer": {"params": params}} | changes)


def test_adam_is_pytorchs(get_optimizer):
    found = get_optimizer(args())
    assert type(found) is torch.optim.AdamW
    (group,) = found.param_groups
    assert group["fused"] and group["weight_decay"] == 0.1 and list(group["betas"]) == [0.9, 0.95]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_config": ["global"]},
        {"precision": "fp16", "zero_stage": 0},
        {"optimizer": {"params": {"lr": 1e-3, "adam_w_mode": False}}},
    ],
)
def test_other_runs_keep_gpt_neoxs(get_optimizer, changes):
    assert get_optimizer(args(**changes)) == "apex"
