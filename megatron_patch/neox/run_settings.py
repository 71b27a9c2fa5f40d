"""Checks of GPT-NeoX's own settings in a run with MetaLA layers, before GPT-NeoX derives others.

GPT-NeoX accepts a choice in any case and then compares it letter by letter (`lr_decay_style:
Cosine` keeps the rate constant), checks no range, and reports a wrong type in an error that names
no setting. It also has settings that it or DeepSpeed cannot honour: the ranks then end in a
traceback, wait for ever, or exit with code 0. These checks end the launcher with one line instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch

from megatron_patch.architecture import METALA, SettingsError, refuse, yaml_number_hint
from megatron_patch.architecture_neox import expand_attention_config, from_neox
from megatron_patch.neox.context_parallel import check_context_parallel
from megatron_patch.neox.data_settings import check_data, check_data_weights, check_paths
from megatron_patch.neox.hybrid_settings import check_other_layers
from megatron_patch.neox.inference_settings import check_inference
from megatron_patch.neox.mapping_settings import check_mappings, check_optimizer_params
from megatron_patch.neox.memory_settings import check_memory_settings
from megatron_patch.neox.notices import say
from megatron_patch.neox.packages import is_installed
from megatron_patch.neox.post_training import check_micro_batch, check_post_training
from megatron_patch.neox.precision_settings import (
    check_precision,
    check_precision_of_training,
    model_precision,
)
from megatron_patch.neox.sequence_parallel import check_sequence_parallel
from megatron_patch.ops.backends import unsupported_reason

# ---- Types and ranges of every setting

# GPT-NeoX compares these two in lower case.
_ANY_CASE = ("optimizer_type", "tokenizer_type")
_RANGES = (
    (
        "at least 1",
        lambda x: x >= 1,
        "num_layers hidden_size num_attention_heads seq_length max_position_embeddings "
        "make_vocab_size_divisible_by train_batch_size train_micro_batch_size_per_gpu "
        "gradient_accumulation_steps lr_decay_iters eval_interval exit_interval log_interval "
        "steps_per_print checkpoint_num_layers keep_last_n_checkpoints num_gpus num_samples "
        "sliding_window_width seed",
    ),
    (
        "above 0",
        lambda x: x > 0,
        "layernorm_epsilon rms_norm_epsilon scalenorm_epsilon checkpoint_factor "
        "optimizer.params.eps init_method_std lr_decay_fraction",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        "model_parallel_size pipe_parallel_size gradient_clipping weight_decay min_lr eval_iters "
        "optimizer.params.lr extra_save_iters num_workers iteration "
        "temperature top_k maximum_tokens",
    ),
    (
        "from 0 to below 1",
        lambda x: 0 <= x < 1,
        "hidden_dropout attention_dropout optimizer.params.betas",
    ),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "warmup top_p"),
)
# GPT-NeoX derives only these two from `null` among the settings above that have a default.
_DERIVED = ("gradient_accumulation_steps", "steps_per_print")
_WORDS = {
    Any: "none",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def check_values(args: Any) -> None:
    """Checks each field of GPT-NeoX's dataclass of settings by its annotation, and those of the
    table above by their range. Raises a SettingsError."""
    for field in dataclasses.fields(args):
        name, value, wanted = field.name, getattr(args, field.name), field.type
        if value is None or (args.autotuning is not None and value == "auto"):
            continue
        if name in _ANY_CASE and isinstance(value, str):
            value, wanted = value.lower(), Literal[tuple(c.lower() for c in get_args(wanted))]
        if not _fits(value, wanted):
            refuse(name, value, _words(wanted))
        for place, leaf in _leaves(name, value) if name != "config_files" else ():
            if place != name and yaml_number_hint(leaf):
                refuse(place, leaf, "a number")
            if isinstance(leaf, float) and not math.isfinite(leaf):
                refuse(place, leaf, "a finite number")
    for wanted, is_inside, names in _RANGES:
        for name in names.split():
            value = _look_up(args, name)
            if value is None and getattr(type(args), name, None) is not None:
                if name not in _DERIVED:
                    refuse(name, value, wanted)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and not is_inside(number):
                    refuse(name, value, wanted)


def _fits(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if wanted is Any:
        return False  # a setting that GPT-NeoX fills itself and cannot check
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(wanted))
    if origin is Union:
        return any(_fits(value, one) for one in get_args(wanted))
    if origin is list:
        return isinstance(value, list) and all(_fits(v, get_args(wanted)[0]) for v in value)
    if wanted is float:
        return type(value) in (int, float)
    return type(value) is wanted


def _words(wanted: Any) -> str:
    """Describes an annotation in words."""
    origin = get_origin(wanted)
    if origin is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if origin is Union:
        return " or ".join(_words(one) for one in get_args(wanted) if one is not type(None))
    if origin is list:
        return f"a list, each {_words(get_args(wanted)[0])}"
    return _WORDS.get(wanted, str(wanted))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of everything that a mapping or list holds."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(name, item)
    else:
        yield name, value


def _look_up(args: Any, name: str) -> Any:
    """Returns the value of a dotted name, `None` where there is none."""
    first, *rest = name.split(".")
    value = getattr(args, first)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- Settings that GPT-NeoX or DeepSpeed cannot honour

MOST_DATA_SETS = 254  # GPT-NeoX's `BlendableDataset` keeps their numbers in uint8


def program(args: Any) -> str:
    """Returns the program that the settings are for: train.py, generate.py or eval.py."""
    return Path(args.user_script or "train.py").name


def check_run(args: Any) -> None:
    """Checks the settings of a run with MetaLA layers, before GPT-NeoX derives others, against what
    its program can do, and takes away the "/" at the end of `save`, with which GPT-NeoX finds no
    old checkpoints and uploads all runs under one name. Raises a SettingsError."""
    if not args.deepspeed:
        refuse("deepspeed", args.deepspeed, "true: GPT-NeoX trains with DeepSpeed alone")
    if args.seq_length is None:
        refuse("seq_length", None, "the number of tokens of a sequence")
    if (prompts := args.soft_prompt_tuning or {}).get("enabled"):
        refuse("soft_prompt_tuning", prompts, "none: metala layers train without soft prompts")
    if (width := args.sliding_window_width) is not None:
        layers = expand_attention_config(args.attention_config, args.num_layers)
        if others := sorted(set(layers) - {METALA, "flash"}):
            refuse(
                "sliding_window_width",
                width,
                f"none with layers of type {', '.join(others)}: GPT-NeoX heeds it in a pipeline "
                "alone, and not when it generates",
            )
    check_paths(vars(args))
    check_data_weights(args)
    check_mappings(args)
    check_precision(args)
    check_context_parallel(args, program(args))
    check_sequence_parallel(args, program(args))
    check_post_training(args, program(args))
    if args.user_script:  # else these are the settings of a model alone
        _check_tokenizer(args)
    if program(args) == "train.py":
        _check_training(args)
        if args.user_script:
            check_data(args)
    check_inference(args, program(args))
    check_saving(args)
    check_other_layers(expand_attention_config(args.attention_config, args.num_layers))


def check_backend(args: Any) -> None:
    """Checks that this machine can run the operator's backend, where a run names one. Each rank
    calls it, and the launcher of a run on the CPU. Raises a SettingsError if the backend cannot
    run; the line says why."""
    if METALA not in args.attention_config:
        return
    model = from_neox(args)
    if model.metala.backend == "auto":
        return
    on_cpu = args.distributed_backend == "gloo" and not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", args.local_rank or 0)
    dtype = {"fp16": torch.float16, "bfloat16": torch.bfloat16}.get(args.precision, torch.float32)
    sizes = {"K": model.key_width, "V": model.value_width}
    name = model.metala.backend
    reason = unsupported_reason("meta_linear_attention", name, dtype, device, **sizes)
    if reason is not None:
        refuse("metala.backend", name, f"auto or chunked: {reason}")


def check_limits(args: Any) -> None:
    """Checks the settings that GPT-NeoX has expanded. The launcher calls it, and it also warns of a
    warm-up that is too short. Raises a SettingsError if there are more data sets than GPT-NeoX can
    blend, or a micro-batch does not suit `train_impl`."""
    if METALA not in (args.attention_config or ()):
        return
    check_micro_batch(args)
    for prefix in ("", "pos_", "neg_"):
        for split in ("train", "valid", "test"):
            name = f"{prefix}{split}_data_paths"
            if (count := len(getattr(args, name, None) or ())) > MOST_DATA_SETS:
                refuse(name, count, f"at most {MOST_DATA_SETS}: GPT-NeoX can blend no more")
    if program(args) == "train.py" and args.train_iters:
        fraction = 1.0 if args.lr_decay_fraction is None else args.lr_decay_fraction
        warn_of_short_warmup(
            args.warmup, args.lr_decay_iters or max(1, math.floor(args.train_iters * fraction))
        )


def warn_of_short_warmup(warmup: float, iterations: int) -> None:
    """Warns if `warmup`, a share of the schedule's iterations, is less than one step: the first
    learning rate is then larger than `lr`."""
    if 0 < warmup * iterations < 1:
        say(
            f"warmup: {warmup} of {iterations} iterations is less than one, which makes the first "
            f"learning rate {1 / (warmup * iterations):.3g} times lr, as in GPT-NeoX; 0 is no "
            f"warm-up, {1 / iterations:.3g} one iteration"
        )


def _check_tokenizer(args: Any) -> None:
    if args.tokenizer_type is None:
        refuse("tokenizer_type", None, "the name of one, such as HFTokenizer")
    kind = args.tokenizer_type.lower()
    if args.vocab_file is None and kind not in ("charleveltokenizer", "hfgpt2tokenizer"):
        refuse("vocab_file", None, f"the file that tokenizer_type: {args.tokenizer_type} reads")
    if args.merge_file is None and kind == "gpt2bpetokenizer":
        wanted = "the second file of GPT2BPETokenizer; a tokenizer.json is read by HFTokenizer"
        refuse("merge_file", None, wanted)


def _check_training(args: Any) -> None:
    from megatron.neox_arguments.neox_args import NeoXArgsOptimizer

    if args.optimizer is None:
        refuse("optimizer", None, "a mapping of type and params")
    for key, kind in (("type", str), ("params", dict)):
        if not isinstance(found := args.optimizer.get(key), kind):
            refuse(f"optimizer.{key}", found, "the name of one" if kind is str else "a mapping")
    known = NeoXArgsOptimizer.__annotations__["optimizer_type"].__args__
    if (optimizer := args.optimizer["type"]).lower() not in known:
        refuse("optimizer.type", optimizer, " or ".join(known))
    if optimizer.lower() == "sgd":
        refuse("optimizer.type", optimizer, "another: GPT-NeoX's is that of muP")
    if (decay := args.optimizer["params"].get("weight_decay")) is not None:
        refuse("optimizer.params.weight_decay", decay, "none, but weight_decay outside optimizer")
    check_optimizer_params(args.optimizer["params"])
    if args.train_iters is None and args.train_epochs is None:
        refuse("train_iters", None, "the number of steps, or train_epochs")
    if args.train_epochs and args.train_iters:
        wanted = f"none beside train_iters = {args.train_iters} (which null takes away)"
        refuse("train_epochs", args.train_epochs, wanted)
    if args.z_loss and args.train_impl != "rm":
        refuse("z_loss", args.z_loss, "0 without train_impl: rm: GPT-NeoX has no other z-loss")
    for name in ("train_iters", "train_epochs"):
        if (found := getattr(args, name)) is not None and found < 1:
            refuse(name, found, "at least 1: nothing would be trained")
    if found := args.curriculum_learning:
        refuse("curriculum_learning", found, "none: DeepSpeed and GPT-NeoX disagree about it")
    _check_zero(args)
    _check_logging(args)


def zero_stage(args: Any) -> Any:
    """Returns the ZeRO stage that the settings ask for, 0 where they do not mention ZeRO."""
    return 0 if args.zero_optimization is None else args.zero_optimization.get("stage")


def _check_zero(args: Any) -> None:
    stage = zero_stage(args)
    if stage not in (0, 1, 2, 3) and args.autotuning is None:
        refuse("zero_optimization.stage", stage, "0, 1, 2 or 3")
    if stage in (2, 3):
        if (pipe := args.pipe_parallel_size) > 0:
            wanted = f"0 or 1 with pipe_parallel_size = {pipe}; 2 and 3 want 0 there"
            refuse("zero_optimization.stage", stage, wanted)
        if (tensor := args.model_parallel_size) > 1:
            refuse("zero_optimization.stage", stage, f"0 or 1 with model_parallel_size = {tensor}")
    check_precision_of_training(args, stage)
    check_memory_settings(args, stage)


# The package that each of these settings logs with.
_LOG_PACKAGES = {"use_wandb": "wandb", "use_comet": "comet_ml"}


def _check_logging(args: Any) -> None:
    for name, package in _LOG_PACKAGES.items():
        if (found := getattr(args, name)) and not is_installed(package):
            refuse(name, found, f"false without the package {package}, which is not installed")
    on_cpu = args.distributed_backend == "gloo" and not torch.cuda.is_available()
    for name in ("profile", "memory_profiling"):
        if on_cpu and getattr(args, name):
            refuse(name, True, "false on the CPU")
    if args.profile and not args.tensorboard_dir:
        refuse("tensorboard_dir", None, "a folder for the traces of profile: true")
    from deepspeed.runtime.engine import DeepSpeedEngine

    if "store_gradients" not in DeepSpeedEngine.__init__.__code__.co_names:
        for name in ("log_gradient_noise_scale", "log_grad_norm", "log_grad_pct_zeros"):
            if found := getattr(args, name):
                wanted = "false: GPT-NeoX reads gradients that only DeeperSpeed stores"
                refuse(name, found, wanted)
    is_plain_bfloat16 = model_precision(args) == "bfloat16" and args.pipe_parallel_size == 0
    if args.log_optimizer_states and not (is_plain_bfloat16 and zero_stage(args) == 0):
        refuse(
            "log_optimizer_states",
            args.log_optimizer_states,
            "false: GPT-NeoX reads them in bfloat16 without ZeRO and without a pipeline alone",
        )
    is_split = args.model_parallel_size > 1 or zero_stage(args) == 3
    if args.log_param_norm and is_split and not args.wandb_init_all_ranks:
        wanted = (
            "false with tensor parallelism or ZeRO 3: GPT-NeoX logs the norms of a rank's parts"
        )
        refuse("log_param_norm", True, wanted)
    if args.char_level_ppl and (args.model_parallel_size > 1 or args.pipe_parallel_size > 2):
        wanted = (
            "false with model_parallel_size above 1 or pipe_parallel_size above 2: GPT-NeoX counts "
            "characters on ranks that read none"
        )
        refuse("char_level_ppl", True, wanted)


def check_saving(args: Any) -> None:
    """Checks that a run with `save` writes checkpoints, and strips the "/" at the end of `save`."""
    if not args.save:
        return
    args.save = args.save.rstrip("/") or "/"
    factor = args.checkpoint_factor
    if factor is None and args.extra_save_iters is None:
        raise SettingsError(
            "checkpoint_factor: found none, wanted the number of steps from one checkpoint to the "
            "next (or extra_save_iters), since save is set"
        )
    if factor is None:
        return
    is_log = args.checkpoint_scale == "log"
    if not (factor > 1 if is_log else factor >= 1 and float(factor).is_integer()):
        wanted = "more than 1, with checkpoint_scale: log" if is_log else "a whole number >= 1"
        refuse("checkpoint_factor", factor, wanted)
