"""Checks of the settings about 16 bits: what the model computes in, what steps its weights, and
what gradients are summed in.

GPT-NeoX passes some of them on without a look. DeepSpeed then ends the ranks in a traceback, or
trains another way than the settings say.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_patch.architecture import refuse

# DeepSpeed's names of a precision, by GPT-NeoX's.
_DEEPSPEED_NAMES = {"fp16": "fp16", "bfloat16": "bf16"}
# DeepSpeed's keys for what GPT-NeoX has settings for.
_OF_NEOX = (
    "bf16 fp16 amp data_types optimizer scheduler zero_optimization gradient_clipping "
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"
).split()
_ARE_PRECISION = ("bfloat16", "torch_autocast")


def model_precision(args: Any) -> str:
    """Returns `fp32`, `fp16` or `bfloat16`, which `fp16.enabled` and `bf16.enabled` say too."""
    for precision, name in _DEEPSPEED_NAMES.items():
        if args.precision is None and (getattr(args, name) or {}).get("enabled"):
            return precision
    return args.precision or "fp32"


def check_precision(args: Any) -> None:
    """Checks the precision of any program's model. Fills in `fp16`, to which GPT-NeoX would add a
    key that DeepSpeed refuses, and passes `fp32_allreduce` on. Raises a SettingsError."""
    if args.amp is not None:
        refuse("amp", args.amp, "none, but precision: DeepSpeed no longer has amp")
    if args.communication_data_type is not None:  # true or false to GPT-NeoX, a name to DeepSpeed
        refuse("communication_data_type", args.communication_data_type, "none, or fp32_allreduce")
    precision = model_precision(args)
    if precision == "fp16" and not args.fp16:
        args.fp16 = {"enabled": True}
    # GPT-NeoX fills in `enabled` for fp16, and for bf16 only where nothing else stands there.
    if precision == "bfloat16" and args.bf16 and args.bf16.get("enabled") is not True:
        refuse("bf16.enabled", args.bf16.get("enabled"), "true with precision: bfloat16")
    for name in _DEEPSPEED_NAMES.values():
        key = f"{name}_master_weights_and_grads"
        if (getattr(args, name) or {}).get(key):
            refuse(f"{name}.{key}", True, "false: weights in 16 bits lose what is small in a step")
    _check_extra_args(args, precision)
    if args.fp32_allreduce:
        _reduce_in_float32(args)


def _check_extra_args(args: Any, precision: str) -> None:
    """Refuses what GPT-NeoX has settings for in the mapping that goes to DeepSpeed unseen."""
    for key, found in (args.deepspeed_extra_args or {}).items():
        is_neoxs = key == "bf16" and precision == "bfloat16" and found == {"enabled": True}
        setting = "precision" if key in _ARE_PRECISION else key
        if key in (*_OF_NEOX, *_ARE_PRECISION) and not is_neoxs:
            refuse(f"deepspeed_extra_args.{key}", found, f"none, but {setting} beside it")


def _reduce_in_float32(args: Any) -> None:
    """Tells DeepSpeed of `fp32_allreduce`, which it knows by another name. GPT-NeoX itself heeds it
    between tensor-parallel ranks."""
    name, extra = "communication_data_type", args.deepspeed_extra_args or {}
    if (found := extra.get(name, "fp32")) != "fp32":
        refuse(f"deepspeed_extra_args.{name}", found, "fp32 with fp32_allreduce")
    args.deepspeed_extra_args = {**extra, name: "fp32"}


def check_precision_of_training(args: Any, stage: int) -> None:
    """Checks the optimizer and the dtype of the sums of gradients against precision and ZeRO stage.
    Raises a SettingsError."""
    precision = model_precision(args)
    if precision == "fp16" and stage == 0:
        wanted = "1, 2 or 3 with precision: fp16; without ZeRO DeepSpeed does not scale the loss"
        refuse("zero_optimization.stage", stage, wanted)
    _check_data_types(args, stage, _DEEPSPEED_NAMES.get(precision, precision))
    _check_optimizer(args, stage, precision)


def _check_data_types(args: Any, stage: int, model: str) -> None:
    from deepspeed.runtime.config import DtypeEnum

    for name in ("grad_accum_dtype", "param_dtype"):
        key, found = f"data_types.{name}", (args.data_types or {}).get(name)
        if found is None:
            continue
        allowed = [model]
        if name == "grad_accum_dtype" and stage != 0 and model != "fp32":
            allowed.append("fp32")
        try:
            is_allowed = DtypeEnum(found) in map(DtypeEnum, allowed)
        except ValueError:
            is_allowed = False
        if not is_allowed:
            hint = ", the model's, with ZeRO stage 0, or stage 1" if stage == 0 else ""
            refuse(key, found, " or ".join(allowed) + hint)


def _check_optimizer(args: Any, stage: int, precision: str) -> None:
    name, found = "optimizer.type", args.optimizer["type"]
    kind, pipe = found.lower(), args.pipe_parallel_size
    if kind == "onebitadam":
        refuse(name, found, "another: DeepSpeed no longer has it")
    if kind in ("sm3", "madgrad_wd") and stage != 0:
        refuse(name, found, f"adam or lion with ZeRO stage {stage}: DeepSpeed does not know it")
    if kind == "sm3" and precision == "bfloat16" and pipe > 0:
        # DeepSpeed's bfloat16 optimizer lays all weights end to end.
        wanted = f"another in bfloat16 with pipe_parallel_size = {pipe}, where no rows are left"
        refuse(name, found, wanted)
    if kind == "lion" and stage != 0 and not torch.cuda.is_available():
        if args.distributed_backend == "gloo":
            refuse(name, found, f"adam on the CPU with ZeRO stage {stage}: lion's kernel is CUDA's")
