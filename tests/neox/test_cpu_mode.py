"""CPU mode needs gloo and no CUDA device, and changes nothing otherwise."""

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes.cpu_mode import activate_cpu_mode
from tests.neox.training import stand_in


def settings(**changes) -> SimpleNamespace:
    values = dict(
        distributed_backend="gloo",
        precision="fp32",
        fp16=None,
        num_gpus=None,
        model_parallel_size=1,
        pipe_parallel_size=0,
    )
    return stand_in(values, **changes)


@pytest.mark.parametrize(("gpu", "backend"), [(True, "gloo"), (True, "nccl"), (False, "nccl")])
def test_nothing_is_touched(monkeypatch, capsys, gpu, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = (dict(vars(torch.cuda)), torch.Tensor.cuda, torch.nn.Module.cuda)
    activate_cpu_mode(settings(distributed_backend=backend))
    assert (dict(vars(torch.cuda)), torch.Tensor.cuda, torch.nn.Module.cuda) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("half", [{"precision": "fp16"}, {"fp16": {"enabled": True}}])
def test_fp16_is_refused(monkeypatch, half):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="precision: found fp16, wanted fp32 or bfloat16"):
        activate_cpu_mode(settings(**half))
