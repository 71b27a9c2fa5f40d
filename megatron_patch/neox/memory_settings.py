"""Checks of the settings that save memory: activation checkpointing and offloading.

DeepSpeed ends the ranks in a traceback where it cannot honour them, ignores some, and computes
wrong gradients in one case.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_patch.architecture import refuse

# GPT-NeoX names both the optimizer that DeepSpeed offloads.
_OFFLOADED_OPTIMIZERS = ("cpu_adam", "cpu_torch_adam")


def check_memory_settings(args: Any, zero_stage: int) -> None:
    """Checks these settings of a training. Raises a SettingsError."""
    _check_activation_checkpointing(args)
    _check_offloading(args, zero_stage)


def _check_activation_checkpointing(args: Any) -> None:
    kinds = (
        "partition_activations",
        "contiguous_checkpointing",
        "checkpoint_in_cpu",
        "synchronize_each_layer",
    )
    for name in kinds:
        if getattr(args, name) and not args.checkpoint_activations:
            refuse(name, True, "false without checkpoint_activations")
    if args.contiguous_checkpointing:
        wanted = "false: DeepSpeed's buffers do not outlast a micro-batch"
        refuse("contiguous_checkpointing", True, wanted)
    if args.partition_activations and max(args.model_parallel_size, 1) == 1:
        wanted = "false with model_parallel_size = 1, where DeepSpeed computes wrong gradients"
        refuse("partition_activations", True, wanted)
    if args.checkpoint_in_cpu and not args.partition_activations:
        refuse("checkpoint_in_cpu", True, "false, or partition_activations: true beside it")


def _check_offloading(args: Any, stage: int) -> None:
    zero = args.zero_optimization or {}
    parameters = _offloaded(zero, "offload_param")
    if parameters and stage != 3:
        refuse("zero_optimization.offload_param", parameters, "none without ZeRO stage 3")
    states = _offloaded(zero, "offload_optimizer") or zero.get("cpu_offload")
    if not states:
        return
    name = f"zero_optimization.{'cpu_offload' if states is True else 'offload_optimizer'}"
    if stage == 0:
        refuse(name, states, "none without ZeRO")
    if args.distributed_backend == "gloo" and not torch.cuda.is_available():
        refuse(name, states, "none on the CPU, where nothing can be offloaded")
    kind = args.optimizer["type"]
    if kind.lower() not in _OFFLOADED_OPTIMIZERS:
        refuse("optimizer.type", kind, f"{_OFFLOADED_OPTIMIZERS[0]} with {name}")


def _offloaded(zero: dict[str, Any], name: str) -> Any:
    """Returns the part of ZeRO's settings that offloads something, `None` if it is off."""
    found = zero.get(name)
    is_off = not isinstance(found, dict) or found.get("device", "none") in (None, "none")
    return None if is_off else found
