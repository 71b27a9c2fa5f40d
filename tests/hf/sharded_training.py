"""Trains models with their weights sharded over processes, for `test_hf_sharded.py`.

    torchrun --nproc-per-node 2 sharded_training.py METHOD:FOLDER...

trains the model of each FOLDER on its `input_ids.pt`, whose rows are split over the ranks, and
writes FOLDER/METHOD.pt: the losses of each rank, and the full weights after the last step.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

import megatron_patch.hf  # noqa: F401  registers the model

STEPS = 3


def load(folder: Path, **how) -> nn.Module:
    """Loads a model with gradient checkpointing, which runs blocks again in the backward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_ids: torch.Tensor,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> list[float]:
    """Trains a few steps on all rows; returns the loss of each step."""
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        losses.append(loss.item())
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


def accelerate_plugin(model: nn.Module, **how):
    """Returns accelerate's FSDP settings for a model. accelerate itself shards only on GPUs."""
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap", **how)
    plugin.set_auto_wrap_policy(model)
    return plugin


def fsdp1(folder: Path, input_ids: torch.Tensor):
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    model = load(folder)
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=accelerate_plugin(model).auto_wrap_policy,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    units = FullyShardedDataParallel.fsdp_modules(wrapped)
    assert [unit.module for unit in units] == [model, *(x.module for x in model.model.layers)]
    losses = train(wrapped, sgd(wrapped), input_ids)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        return losses, wrapped.state_dict()


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


def fsdp2(folder: Path, input_ids: torch.Tensor):
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp import fully_shard

    model = load(folder)
    chosen = fsdp2_prepare_auto_wrap_policy(accelerate_plugin(model, fsdp_version=2), model)
    units = [module for module in model.modules() if chosen(module)]
    assert units == list(model.model.layers)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*units, model]:
        fully_shard(module, mesh=mesh)
    losses = train(model, sgd(model), input_ids)
    return losses, full_state(model)


def transformers_fsdp(folder: Path, input_ids: torch.Tensor):
    """transformers 5 shards while loading, by the FSDP plan of the model and its configuration."""
    from transformers.distributed import DistributedConfig

    model = load(folder, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()))
    for rule in model.fsdp_plan:
        assert model.get_submodule(rule.replace("*", "0"))
    losses = train(model, sgd(model), input_ids)
    return losses, full_state(model)


@functools.cache  # one per process
def deepspeed_accelerator(rows: int):
    from accelerate import Accelerator, DeepSpeedPlugin

    # DeepSpeed would compile an all-reduce for a minute.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(
            hf_ds_config={
                "train_micro_batch_size_per_gpu": rows,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": 3,
                    "stage3_param_persistence_threshold": 0,  # shard even the smallest
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
            }
        )
    )


def zero3(folder: Path, input_ids: torch.Tensor):
    # Made before the model, so that transformers loads the model in shards.
    accelerator = deepspeed_accelerator(len(input_ids))
    model = load(folder)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    engine, optimizer = accelerator.prepare(model, sgd(model))
    losses = train(engine, optimizer, input_ids, accelerator.backward)
    state = accelerator.get_state_dict(engine)
    accelerator.free_memory()
    return losses, state


def main(runs: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for run in runs:
        method, _, folder = run.partition(":")
        rows = torch.load(Path(folder, "input_ids.pt")).chunk(world_size)[rank]
        losses, state = globals()[method](Path(folder), rows)
        everywhere = [None] * world_size
        dist.all_gather_object(everywhere, losses)
        if rank == 0:
            torch.save((everywhere, state), Path(folder, f"{method}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
    # Skip the interpreter's shutdown, in which PyTorch's threads sometimes abort the process
    # ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
