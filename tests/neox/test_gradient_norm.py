"""A pipeline clips its gradients by the norm of the whole model, and never waits for ever."""

from __future__ import annotations

import pytest
import torch

from tests.neox.training import neox, settings

# The stock train.py, but each rank writes its gradients before they are clipped, and the norm that
# DeepSpeed found.
SCRIPT = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from megatron.neox_arguments import NeoXArgs
from megatron.training import pretrain

take_step = DeepSpeedEngine._take_model_step

def take_and_write(self, *args, **kwargs):
    gradients = {}
    for name, p in self.module.named_parameters():
        gradient = getattr(p, "_hp_grad", p.grad)
        gradient = safe_get_full_grad(p) if gradient is None else gradient
        gradients[name] = gradient.view(p.shape).clone()
    clipped, step = {}, self.optimizer.step
    def step_and_look(*args, **kwargs):
        clipped.update({n: p.grad.clone() for n, p in self.module.named_parameters()
                        if p.grad is not None})
        return step(*args, **kwargs)
    if isinstance(self.optimizer, torch.optim.Optimizer):  # clipped by the engine
        self.optimizer.step = step_and_look
    take_step(self, *args, **kwargs)
    self.optimizer.step = step
    norm = self.get_global_grad_norm()
    norm = norm if norm is None else float(norm)
    torch.save([norm, gradients, clipped], os.path.join(os.environ["NORMS"], os.environ["RANK"]))

DeepSpeedEngine._take_model_step = take_and_write
neox_args = NeoXArgs.consume_neox_args()
neox_args.configure_distributed_args()
neox_args.build_tokenizer()
pretrain(neox_args=neox_args)
"""

HYBRID = {
    "num_layers": 4,
    "attention_config": ["metala", "metala", "global", "global"],
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "train_iters": 2,
    "gradient_clipping": 0.01,
}


def norm_of(ranks: list[dict[str, torch.Tensor]]) -> float:
    """The norm in float64 of all ranks' gradients: those of one name and equal values are of one
    parameter that ranks hold in common."""
    parts: dict[str, list[torch.Tensor]] = {}
    for gradients in ranks:
        for name, gradient in gradients.items():
            known = parts.setdefault(name, [])
            if not any(torch.equal(gradient, other) for other in known):
                known.append(gradient)
    return sum(g.double().square().sum().item() for k in parts.values() for g in k) ** 0.5


@pytest.mark.parametrize(
    "changes",
    [
        # Without ZeRO, tied embeddings, weights of norms on both stages, tensor parallelism.
        {
            "model_parallel_size": 2,
            "pipe_parallel_size": 2,
            "num_gpus": 4,
            "norm": "layernorm",
            "rms_norm_epsilon": 1e-8,  # GPT-NeoX's, since this norm does not read it
            "no_weight_tying": False,
        },
        # The second stage has no parameter without weight decay.
        {"pipe_parallel_size": 2, "num_gpus": 2, "zero_optimization": {"stage": 1}},
        # Nothing but tied embeddings on the second stage.
        {
            "pipe_parallel_size": 2,
            "num_gpus": 2,
            "no_weight_tying": False,
            "precision": "bfloat16",
            "num_layers": 2,
            "attention_config": ["metala"] * 2,
            "pipe_partition_method": "uniform",
        },
    ],
    ids=["no ZeRO", "ZeRO 1", "bfloat16"],
)
def test_each_parameter_counts_once(neox_checkout, token_data, tokenizer_file, tmp_path, changes):
    config = settings(token_data, tokenizer_file) | HYBRID | changes
    script, norms = tmp_path / "train.py", tmp_path / "norms"
    script.write_text(SCRIPT)
    norms.mkdir()
    run = neox(neox_checkout, str(script), config, tmp_path, NORMS=str(norms))
    assert run.returncode == 0, run.output[-6000:]
    found, gradients, clipped = zip(*(torch.load(file) for file in norms.iterdir()), strict=True)
    if any(clipped):
        assert norm_of(clipped) == pytest.approx(config["gradient_clipping"], rel=1e-4)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(norm_of(gradients), rel=1e-5)
