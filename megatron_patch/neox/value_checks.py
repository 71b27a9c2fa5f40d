"""Types, choices and ranges of GPT-NeoX's settings, checked before GPT-NeoX computes with them.

GPT-NeoX checks its settings after it has derived others from them, accepts a choice in any case and
then compares it letter by letter (`lr_decay_style: Cosine` keeps the rate constant), and checks no
range. A setting of a wrong type ends in an error of its own that names no setting.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from megatron_patch.architecture import SettingsError

# GPT-NeoX compares these in lower case.
_ANY_CASE = ("optimizer_type", "tokenizer_type")

# What YAML 1.1 reads as a string, for want of a dot before the exponent or a sign after it.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

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
        "optimizer.params.lr optimizer.params.weight_decay extra_save_iters num_workers iteration "
        "temperature top_k maximum_tokens",
    ),
    (
        "from 0 to below 1",
        lambda x: 0 <= x < 1,
        "hidden_dropout attention_dropout optimizer.params.betas",
    ),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "warmup top_p"),
)
# `null` has a meaning for these alone of the table's settings that have a default.
_DERIVED = ("gradient_accumulation_steps", "steps_per_print")


def check_values(args: Any) -> None:
    """Checks every field of GPT-NeoX's dataclass of settings by its annotation, and those of the
    table above by their range.

    Raises:
        SettingsError: one line that names the setting, what was found and what was wanted.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None or (args.autotuning is not None and value == "auto"):
            continue
        _check_type(field.name, value, field.type)
        if isinstance(value, (dict, list)) and field.name != "config_files":
            for name, leaf in _leaves(field.name, value):
                if isinstance(leaf, str) and _NUMBER.fullmatch(leaf):
                    _refuse(name, leaf, f"a number{_hint(leaf)}")
                _check_finite(name, leaf)
    for wanted, is_inside, names in _RANGES:
        for name in names.split():
            value = _look_up(args, name)
            if value is None and getattr(type(args), name, None) is not None:
                if name not in _DERIVED:
                    _refuse(name, value, wanted)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and not is_inside(number):
                    _refuse(name, value, wanted)


def _check_type(name: str, value: Any, wanted: Any) -> None:
    if name in _ANY_CASE and isinstance(value, str):
        value, wanted = value.lower(), Literal[tuple(c.lower() for c in get_args(wanted))]
    if not _fits(value, wanted):
        _refuse(name, value, _words(wanted) + _hint(value))
    _check_finite(name, value)


def _fits(value: Any, wanted: Any) -> bool:
    origin = get_origin(wanted)
    if wanted is Any:
        return False  # what GPT-NeoX itself puts there, and cannot check
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
    origin = get_origin(wanted)
    if origin is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if origin is Union:
        return " or ".join(_words(one) for one in get_args(wanted) if one is not type(None))
    if origin is list:
        return f"a list, each {_words(get_args(wanted)[0])}"
    return {
        Any: "none",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
    }.get(wanted, str(wanted))


def _hint(value: Any) -> str:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return f", in YAML with a dot and a sign, {float(value):.1e}"
    return ""


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(name, value, "a finite number")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that a mapping or list holds."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(name, item)
    else:
        yield name, value


def _look_up(args: Any, name: str) -> Any:
    first, *rest = name.split(".")
    value = getattr(args, first)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _refuse(name: str, found: Any, wanted: str) -> None:
    raise SettingsError(f"{name}: found {found!r}, wanted {wanted}")
