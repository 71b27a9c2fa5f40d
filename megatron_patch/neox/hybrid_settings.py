"""Checks that a hybrid's other layers can run here. GPT-NeoX ends in a traceback."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_patch.architecture import refuse
from megatron_patch.neox.packages import is_installed

_SPARSE = ("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")
# What layers of a type import.
_PACKAGES = {
    "flash": ("flash_attn",),
    "mamba": ("mamba_ssm", "causal_conv1d", "einops"),
    **dict.fromkeys(_SPARSE, ("deepspeed.ops.sparse_attention",)),  # which DeepSpeed gave up
}
_BROKEN = ("gmlp", "amlp")  # GPT-NeoX multiplies matrices that do not fit, alone and in hybrids


def check_other_layers(layer_types: Iterable[str]) -> None:
    """Raises a SettingsError if layers of a type cannot run."""
    for kind in sorted(set(layer_types)):
        if kind in _BROKEN:
            refuse("attention_config", kind, "another type: GPT-NeoX's own ends in an error")
        for package in _PACKAGES.get(kind, ()):
            if not is_installed(package):
                wanted = f"another type, or the package {package}, which is not installed"
                refuse("attention_config", kind, wanted)
