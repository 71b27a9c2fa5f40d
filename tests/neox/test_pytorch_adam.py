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
            print("WARNING: APEX not installed - defaulting to deepspeed's fused adam")
            from deepspeed.ops.adam import FusedAdam as Adam
        if neox_args.optimizer is None:
            neox_args.optimizer = {"params": {"lr": 1e-3}}
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
    run = dict(
        attention_config=["metala"], precision="bfloat16", zero_stage=1, is_pipe_parallel=False
    )
    return SimpleNamespace(**run | {"optimizer": {"params": params}} | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "fp16"}, {"precision": "bfloat16", "zero_stage": 0}, {"precision": "fp32"}],
)
@pytest.mark.parametrize("has_apex", [True, False])
def test_adam_is_pytorchs(get_optimizer, monkeypatch, capsys, has_apex, changes):
    with monkeypatch.context() as patch:
        for name in () if has_apex else ("apex", "apex.optimizers"):
            patch.delitem(sys.modules, name)
        found = get_optimizer(args(**changes))
    assert "APEX" not in capsys.readouterr().out
    assert type(found) is torch.optim.AdamW
    (group,) = found.param_groups
    assert group["fused"] and group["weight_decay"] == 0.1 and list(group["betas"]) == [0.9, 0.95]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_config": ["global"]},
        {"optimizer": {"params": {"lr": 1e-3, "adam_w_mode": False}}},
    ],
)
def test_other_runs_keep_gpt_neoxs(get_optimizer, changes):
    assert get_optimizer(args(**changes)) == "apex"


def test_a_run_without_an_optimizer_gets_the_default(get_optimizer):
    """As generate.py, which GPT-NeoX gives an optimizer only in the function itself."""
    assert type(get_optimizer(args(optimizer=None))) is torch.optim.AdamW


@pytest.mark.parametrize("kept_by", ["group", "state"])
def test_states_of_other_adams_go_on(get_optimizer, kept_by):
    """apex keeps the step in the group, DeepSpeed in the state, both without `fused`."""
    adam = get_optimizer(args())
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0, 1]}
    saved = {"param_groups": [group], "state": {}}
    (group if kept_by == "group" else {})["step"] = 7
    parameters = adam.param_groups[0]["params"]
    for place, p in enumerate(parameters):
        moments = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        saved["state"][place] = moments if kept_by == "group" else {"step": 7, **moments}
    adam.load_state_dict(saved)
    for p in parameters:
        p.grad = torch.ones_like(p)
    adam.step()
    assert adam.param_groups[0]["fused"]
    assert {int(adam.state[p]["step"]) for p in parameters} == {8}
