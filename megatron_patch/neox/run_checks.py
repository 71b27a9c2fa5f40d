"""What GPT-NeoX or DeepSpeed cannot do although a setting for it exists: said in one line by the
launcher, where the ranks would end in a traceback, wait for ever or exit with code 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_patch.architecture import METALA, SettingsError
from megatron_patch.architecture_neox import expand_attention_config, from_neox
from megatron_patch.ops.backends import unsupported_reason


def program(args: Any) -> str:
    """The program that the settings are for: `train.py`, `generate.py` or `eval.py`."""
    return Path(args.user_script or "train.py").name


def check_run(args: Any) -> None:
    """Checks the settings of a run with MetaLA layers against what its program can do.

    Args:
        args: GPT-NeoX's settings, derived values not yet needed.

    Raises:
        SettingsError: one line that names the setting, what was found and what was wanted.
    """
    if not args.deepspeed:
        _refuse(args, "deepspeed", "true: GPT-NeoX trains with DeepSpeed alone")
    if args.seq_length is None:
        _refuse(args, "seq_length", "the number of tokens of a sequence")
    if (args.soft_prompt_tuning or {}).get("enabled"):
        _refuse(args, "soft_prompt_tuning", "none: metala layers train without soft prompts")
    if args.sliding_window_width is not None:
        layers = expand_attention_config(args.attention_config, args.num_layers)
        if others := sorted(set(layers) - {"metala", "flash"}):
            _refuse(
                args,
                "sliding_window_width",
                f"none with layers of type {', '.join(others)}: GPT-NeoX heeds it in a pipeline "
                "alone, and not when it generates",
            )
    if args.user_script:  # else settings of a model alone
        _check_tokenizer(args)
    if program(args) == "train.py":
        _check_training(args)
    elif args.return_logits:
        _refuse(args, "return_logits", "false: GPT-NeoX writes them past the end of their table")


def check_backend(args: Any) -> None:
    """Checks that the operator's backend, where one is asked for by name, can run on this machine:
    on each rank's own, or in the launcher of a run on the CPU.

    Raises:
        SettingsError: it cannot; the line says why.
    """
    if METALA not in args.attention_config:
        return
    model = from_neox(args)
    if model.metala.backend == "auto":
        return
    on_cpu = args.distributed_backend == "gloo" and not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", args.local_rank or 0)
    dtype = {"fp16": torch.float16, "bfloat16": torch.bfloat16}.get(args.precision, torch.float32)
    sizes = {"K": model.key_width, "V": model.value_width}
    reason = unsupported_reason(
        "meta_linear_attention", model.metala.backend, dtype, device, **sizes
    )
    if reason is not None:
        _refuse(args, "metala.backend", f"auto or chunked: {reason}")


def _check_tokenizer(args: Any) -> None:
    kind = args.tokenizer_type.lower()
    if args.vocab_file is None and kind not in ("charleveltokenizer", "hfgpt2tokenizer"):
        _refuse(args, "vocab_file", f"the file that tokenizer_type: {args.tokenizer_type} reads")
    if args.merge_file is None and kind == "gpt2bpetokenizer":
        _refuse(
            args,
            "merge_file",
            "the second file of GPT2BPETokenizer; a tokenizer.json is read by HFTokenizer",
        )


def _check_training(args: Any) -> None:
    if args.optimizer is None:
        _refuse(args, "optimizer", "a mapping of type and params")
    for key, kind in (("type", str), ("params", dict)):
        if not isinstance(args.optimizer.get(key), kind):
            _refuse(args, f"optimizer.{key}", "the name of one" if kind is str else "a mapping")
    _check_optimizer(args)
    if args.train_iters is None and args.train_epochs is None:
        _refuse(args, "train_iters", "the number of steps, or train_epochs")
    for name in ("train_iters", "train_epochs"):
        if (found := getattr(args, name)) is not None and found < 1:
            _refuse(args, name, "at least 1: nothing would be trained")
    if args.train_impl != "normal":
        _refuse(args, "train_impl", "normal: metala layers train on the next token alone")
    if args.dataset_impl != "gpt2":
        _refuse(args, "dataset_impl", "gpt2, the one of train_impl: normal")
    if args.curriculum_learning:
        _refuse(args, "curriculum_learning", "none: DeepSpeed and GPT-NeoX disagree about it")
    _check_zero(args)
    _check_logging(args)


def _check_optimizer(args: Any) -> None:
    from megatron.neox_arguments.neox_args import NeoXArgsOptimizer

    known = NeoXArgsOptimizer.__annotations__["optimizer_type"].__args__
    if args.optimizer["type"].lower() not in known:
        _refuse(args, "optimizer.type", " or ".join(known))
    if args.optimizer["type"].lower() == "sgd":
        _refuse(args, "optimizer.type", "another: GPT-NeoX's is that of muP")


def _check_zero(args: Any) -> None:
    stage = zero_stage(args)
    if stage not in (0, 1, 2, 3) and args.autotuning is None:
        _refuse(args, "zero_optimization.stage", "0, 1, 2 or 3")
    if stage in (2, 3):
        if args.pipe_parallel_size > 0:
            _refuse(
                args,
                "zero_optimization.stage",
                f"0 or 1 with pipe_parallel_size = {args.pipe_parallel_size}; 2 and 3 want 0 there",
            )
        if args.model_parallel_size > 1:
            _refuse(
                args,
                "zero_optimization.stage",
                f"0 or 1 with model_parallel_size = {args.model_parallel_size}",
            )
    _check_sums(args, stage)


def _check_sums(args: Any, stage: int) -> None:
    """DeepSpeed sums gradients in another precision than the model's under ZeRO alone."""
    from deepspeed.runtime.config import DtypeEnum

    sums = (args.data_types or {}).get("grad_accum_dtype")
    if sums is None:
        return
    model = "fp32"
    for name, precision in (("fp16", "fp16"), ("bf16", "bfloat16")):
        if args.precision == precision or (getattr(args, name) or {}).get("enabled"):
            model = name
    try:
        is_models = DtypeEnum(sums).value == DtypeEnum(model).value
    except ValueError:
        _refuse(args, "data_types.grad_accum_dtype", "fp32, fp16 or bf16")
    if stage == 0 and not is_models:
        _refuse(
            args,
            "data_types.grad_accum_dtype",
            f"{model}, the model's, with ZeRO stage 0, or stage 1",
        )


def zero_stage(args: Any) -> Any:
    """The stage that the settings ask for, 0 where they say nothing of ZeRO."""
    return 0 if args.zero_optimization is None else args.zero_optimization.get("stage")


def _check_logging(args: Any) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    if "store_gradients" not in DeepSpeedEngine.__init__.__code__.co_names:
        for name in ("log_gradient_noise_scale", "log_grad_norm", "log_grad_pct_zeros"):
            if getattr(args, name):
                _refuse(args, name, "false: GPT-NeoX reads gradients that only DeeperSpeed stores")
    with_fp16_optimizer = zero_stage(args) == 0 and (
        args.precision == "fp16" or (args.precision == "bfloat16" and args.pipe_parallel_size == 0)
    )
    if args.log_optimizer_states and not with_fp16_optimizer:
        _refuse(
            args,
            "log_optimizer_states",
            "false: GPT-NeoX reads the states of DeepSpeed's optimizer of 16 bits without ZeRO "
            "alone",
        )


def _refuse(args: Any, name: str, wanted: str) -> None:
    first, *rest = name.split(".")
    found = getattr(args, first)
    for key in rest:
        found = found.get(key)
    raise SettingsError(f"{name}: found {found!r}, wanted {wanted}")
