"""Types and ranges of a checkpoint's settings, so that an odd value is named and not computed
with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from convert.command import ConvertError

# Smallest whole number; GPT-NeoX takes 0 for "none" where it is allowed. `None` is always allowed.
WHOLE_NUMBERS = {
    "hidden_size": 1,
    "intermediate_size": 0,
    "make_vocab_size_divisible_by": 1,
    "mlp_multiple_of": 1,
    "model_parallel_size": 1,
    "num_attention_heads": 1,
    "num_kv_heads": 0,
    "num_layers": 1,
    "pipe_parallel_size": 0,
}
NUMBERS = (
    "expansion_factor",
    "init_method_std",
    "rms_norm_epsilon",
    "rotary_emb_base",
    "rotary_pct",
)
SWITCHES = ("no_weight_tying", "use_bias_in_attn_linear", "use_bias_in_mlp")
TEXTS = ("tokenizer_type", "vocab_file")


def check_setting_types(settings: Mapping[str, Any]) -> None:
    """Raises a ConvertError that names the first setting of a wrong type or range."""

    def check(key: str, is_right: bool, wanted: str) -> None:
        if not is_right:
            raise ConvertError(f"{key}: found {settings[key]!r}, wanted {wanted}")

    for key, value in settings.items():
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in WHOLE_NUMBERS:
            smallest = WHOLE_NUMBERS[key]
            is_right = is_number and isinstance(value, int) and value >= smallest
            check(key, is_right, f"a whole number of at least {smallest}")
        elif key in NUMBERS:
            wanted = "a number of at least 0"
            if isinstance(value, str):
                wanted += " (YAML reads 1e-6 as text, 1.0e-6 as a number)"
            check(key, is_number and math.isfinite(value) and value >= 0, wanted)
        elif key in SWITCHES:
            check(key, isinstance(value, bool), "true or false")
        elif key in TEXTS:
            check(key, isinstance(value, str), "text")
