"""CPU mode needs gloo and no CUDA device, and changes nothing otherwise."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.upstream_fixes import cpu_mode
from megatron_patch.neox.upstream_fixes.cpu_mode import activate_cpu_mode, runs_on_cpu
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


def test_hidden_gpus_stay_hidden_from_the_ranks(monkeypatch):
    """On a machine with GPUs: DeepSpeed's launcher names devices for its ranks."""
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setattr(os, "environ", environment)
    for name in ("_redirect_cuda", "_avoid_compiled_ops"):
        monkeypatch.setattr(cpu_mode, name, lambda: None)
    is_visible = lambda: environment.get("CUDA_VISIBLE_DEVICES") != ""  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", is_visible)

    activate_cpu_mode(settings())
    CPU_Accelerator().set_visible_devices_envs(environment, [0])
    environment |= {"LOCAL_RANK": "0"}
    assert torch.cuda.is_available()
    activate_cpu_mode(settings())
    assert runs_on_cpu(settings()) and not torch.cuda.is_available()
    assert not runs_on_cpu(settings(distributed_backend="nccl"))


def test_no_gpu_is_available_in_a_run_on_the_cpu():
    """With a PyTorch for CUDA, which asks for the number of devices once DeepSpeed has set its
    variable. That number is the number of ranks."""
    program = """
import torch
from tests.neox.test_cpu_mode import activate_cpu_mode, settings
torch.cuda._is_compiled = lambda: True
activate_cpu_mode(settings())
assert torch.cuda.device_count() == 2
assert not torch.cuda.is_available() and not torch.accelerator.is_available()
"""
    variables = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    variables |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **variables})
