"""Checks of the keys inside settings that are mappings.

GPT-NeoX hands these on. An unknown key has no effect there (`data_types: {grad_acum_dtype: fp32}`),
or ends the ranks in a traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_patch.architecture import SettingsError, refuse
from megatron_patch.neox.this_process import is_first_here

_KEYS = {
    "activation_checkpointing": """
        partition_activations number_checkpoints contiguous_memory_optimization cpu_checkpointing
        synchronize_checkpoint_boundary profile
    """,
    "checkpoint": """
        tag_validation load_universal use_node_local_storage parallel_write writer
        checkpoint_serialization
    """,
    "data_types": "grad_accum_dtype param_dtype",
    "flops_profiler": """
        enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file
    """,
    "optimizer": "type params",
}
_OF_ADAM = """
    lr betas eps weight_decay bias_correction adam_w_mode adamw_mode amsgrad set_grad_none
    fp32_optimizer_states
"""
# Those of optimizers that share few with Adam and Lion.
_OF_OPTIMIZER = {"sm3": "lr eps momentum beta", "madgrad_wd": "lr eps momentum weight_decay"}


def check_mappings(args: Any) -> None:
    """Raises a SettingsError that names a key which nothing reads, and one like it."""
    for name, keys in _KEYS.items():
        _check_keys(name, getattr(args, name), keys.split())
    optimizer = args.optimizer or {}
    if not args.use_bnb_optimizer:  # bitsandbytes' Adam has many more
        known = _OF_OPTIMIZER.get(str(optimizer.get("type")).lower(), _OF_ADAM)
        _check_keys("optimizer.params", optimizer.get("params"), known.split())
    for name, model in _models().items():
        names = [n for key, item in model.model_fields.items() for n in (key, item.alias) if n]
        _check_keys(name, getattr(args, name), names)
    if args.deepspeed_extra_args and is_first_here():  # which reads 8 MB of code
        _check_keys("deepspeed_extra_args", args.deepspeed_extra_args, _names_in_deepspeed())


def _names_in_deepspeed() -> set[str]:
    """Returns the strings and fields in DeepSpeed's code that may be keys of its configuration,
    which is described nowhere as a whole."""
    spec = find_spec("deepspeed")
    files = Path(spec.origin).parent.rglob("*.py")
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    found = re.findall(r"""["']([a-z]\w+)["']|^    ([a-z]\w+)\s*:""", text, re.MULTILINE)
    return {string or field for string, field in found}


def _models() -> dict[str, Any]:
    """Returns DeepSpeed's descriptions of mappings, which allow no other key; none of an older
    DeepSpeed, such as DeeperSpeed, which takes GPT-NeoX's `fp16: {fp16: true}`."""
    try:
        from deepspeed.comm.config import CommsLoggerConfig
        from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError:
        return {}

    return {
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }


def _check_keys(name: str, found: Any, known: Collection[str]) -> None:
    for key in found if isinstance(found, dict) else ():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            few = f", or one of {', '.join(sorted(known))}" if len(known) < 100 else ""
            wanted = close[0] if close else f"none{few}"
            raise SettingsError(f"{name}.{key}: found a key that nothing reads, wanted {wanted}")


def check_optimizer_params(params: dict[str, Any]) -> None:
    """Checks learning rate and betas. Without `lr` GPT-NeoX takes 0.001. Raises a SettingsError."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float)

    if not is_number(params.get("lr")):
        refuse("optimizer.params.lr", params.get("lr"), "a number")
    betas = params.get("betas", [0.9, 0.999])
    if not (isinstance(betas, list) and len(betas) == 2 and all(map(is_number, betas))):
        refuse("optimizer.params.betas", betas, "two numbers")
