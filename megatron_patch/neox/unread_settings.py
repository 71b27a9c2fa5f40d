"""Settings that GPT-NeoX knows and never reads, or writes over with another setting's value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.architecture import refuse

# Each with the setting that counts, "" for none.
INSTEAD = {
    "batch_size": "train_micro_batch_size_per_gpu",
    "clip_grad": "gradient_clipping",
    "deepscale": "",
    "do_test": "eval_iters",
    "do_train": "train_iters",
    "do_valid": "eval_iters",
    "dynamic_loss_scale": "fp16.loss_scale",
    "hysteresis": "fp16.hysteresis",
    "loss_scale": "fp16.loss_scale",
    "loss_scale_window": "fp16.loss_scale_window",
    "lr": "optimizer.params.lr",
    "min_scale": "fp16.min_loss_scale",
    "no_save_optim": "",
    "optimizer_type": "optimizer.type",
    "padded_vocab_size": "make_vocab_size_divisible_by",
    "param_sharing_style": "",
    "scheduler": "lr_decay_style, lr_decay_iters, warmup and min_lr",
    "short_seq_prob": "",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_stage": "zero_optimization.stage",
}


def check_unread(settings: Mapping[str, Any], defaults: type) -> None:
    """Checks what the YAML files give, in the launcher: the ranks get the values that GPT-NeoX has
    derived. `defaults` is GPT-NeoX's dataclass. Raises a SettingsError that names the setting that
    counts."""
    for name, instead in INSTEAD.items():
        found = settings.get(name)
        if found is not None and found != getattr(defaults, name):
            refuse(name, found, f"none, but {instead}" if instead else "none: nothing reads it")
    if settings.get("use_bias_in_norms") is False and settings.get("norm") in (None, "layernorm"):
        refuse("use_bias_in_norms", False, "true with norm: layernorm, which has a bias")
