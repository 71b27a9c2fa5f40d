"""PyTorch's fused AdamW in the place of Adams that are compiled.

GPT-NeoX takes NVIDIA apex's Adam for `type: Adam`, or DeepSpeed's, which nvcc compiles at the first
start. PyTorch's makes the same passes over memory and is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from megatron_patch.neox.patching import has_metala_layers, replaces

_SETTINGS = {"lr", "betas", "eps", "weight_decay"}  # under optimizer.params, that PyTorch's takes


class FusedAdamW(torch.optim.AdamW):
    """Makes PyTorch's AdamW that updates a tensor in one pass. The optimizer is no subclass, which
    DeepSpeed's ZeRO would refuse. It loads what DeepSpeed's and apex's Adam have saved."""

    def __new__(cls, params, **options):
        adam = torch.optim.AdamW(params, fused=True, **options)
        adam.register_load_state_dict_pre_hook(_complete)
        return adam


def _complete(adam: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns saved states in which each has its step, which apex keeps in the group, and each
    group asks for the fused update."""
    groups, states = saved["param_groups"], dict(saved["state"])
    for group in groups:
        for place in set(group["params"]) & set(states):
            states[place] = {"step": group.get("step", 0), **states[place]}
    return {"state": states, "param_groups": [{**group, "fused": True} for group in groups]}


def take_pytorchs_adam() -> None:
    """Hooks this module into GPT-NeoX's choice of an optimizer."""
    from megatron.training import get_optimizer

    @replaces(get_optimizer)
    def get_pytorchs(get_optimizer, model, neox_args, *args, **kwargs):
        suits = has_metala_layers(neox_args) and suits_pytorchs_adam(neox_args)
        with _in_place_of_others() if suits else nullcontext():
            return get_optimizer(model, neox_args, *args, **kwargs)


def suits_pytorchs_adam(neox_args: Any) -> bool:
    """Returns whether PyTorch's AdamW does what a run asks of Adam. A run without an optimizer,
    which generates or evaluates, gets GPT-NeoX's default."""
    return set((neox_args.optimizer or {}).get("params", {})) <= _SETTINGS


@contextmanager
def _in_place_of_others() -> Iterator[None]:
    """Gives out PyTorch's AdamW as apex's, which GPT-NeoX looks for first. It would warn of an apex
    that is missing."""
    name = "apex.optimizers"
    hidden = sys.modules.get(name)
    sys.modules[name] = stand_in = ModuleType(name)
    stand_in.FusedAdam = FusedAdamW
    try:
        yield
    finally:
        del sys.modules[name]
        if hidden is not None:
            sys.modules[name] = hidden
