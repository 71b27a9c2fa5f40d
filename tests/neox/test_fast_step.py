"""When layers are captured, and what the fused parts of DeepSpeed's optimizer compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.neox.fast_step import why_no_graphs

RUN = dict(
    metala={},
    model_parallel_size=1,
    pipe_parallel_size=0,
    checkpoint_activations=False,
    hidden_dropout=0.0,
    zero_optimization={"stage": 1},
    log_gradient_noise_scale=False,
)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"metala": {"cuda_graphs": "never"}}, "metala.cuda_graphs"),
        ({"model_parallel_size": 2}, "model_parallel_size"),
        ({"metala": {"context_parallel_size": 2}}, "metala.context_parallel_size"),
        ({"pipe_parallel_size": 2}, "pipe_parallel_size"),
        ({"checkpoint_activations": True}, "checkpoint_activations"),
        ({"hidden_dropout": 0.1}, "hidden_dropout"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization offloads"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization offloads",
        ),
        ({"log_gradient_noise_scale": True}, "log_gradient_noise_scale"),
    ],
)
def test_the_setting_that_prevents_graphs_is_named(changes, key):
    assert why_no_graphs(SimpleNamespace(**RUN | changes)).startswith(key)


@pytest.mark.parametrize(
    "changes",
    [{}, {"pipe_parallel_size": 1}, {"zero_optimization": {"stage": 2}}, {"metala": None}],
)
def test_layers_are_captured_otherwise(changes):
    assert why_no_graphs(SimpleNamespace(**RUN | changes)) is None


@pytest.fixture
def fused(monkeypatch):
    """Returns the modules with DeepSpeed's norm and clipping, and with ours."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import bf16_optimizer, utils

    from megatron_patch.neox import fast_step

    for name in ("get_global_norm_of_tensors", "clip_tensors_by_global_norm"):
        monkeypatch.setattr(bf16_optimizer, name, getattr(utils, name))
    fast_step._fuse_norm_and_clipping()
    return utils, bf16_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_clipping_are_deepspeeds(fused, dtype, max_norm):
    torch.manual_seed(0)
    tensors = [torch.randn(n).to(dtype) for n in (3, 1000, 1, 77)]
    results = []
    for module in fused:
        copies = [tensor.clone() for tensor in tensors]
        norm = module.get_global_norm_of_tensors(copies)
        module.clip_tensors_by_global_norm(copies, max_norm, norm)
        results.append([norm.reshape(1), *copies])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_without_a_norm_is_told_as_deepspeed_tells_it(fused, value):
    theirs, ours = (
        module.get_global_norm_of_tensors([torch.ones(3), torch.tensor([1.0, value])])
        for module in fused
    )
    assert theirs == ours == -1
