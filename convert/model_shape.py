"""The sizes and options that decide which tensors a MetaLA model has, from GPT-NeoX's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from convert.command import ConvertError
from megatron_patch.neox.settings import (
    MetaLASettings,
    expand_attention_config,
    metala_intermediate_size,
)

NORMS = ("simplermsnorm", "rmsnorm")

# GPT-NeoX's values for keys that the YAML files leave out.
DEFAULTS = {
    "activation": "gelu",
    "attention_config": None,
    "expansion_factor": None,
    "init_method_std": 0.02,
    "intermediate_size": None,
    "make_vocab_size_divisible_by": 128,
    "metala": None,
    "model_parallel_size": 1,
    "no_weight_tying": False,
    "norm": "layernorm",
    "pipe_parallel_size": 0,
    "pos_emb": "learned",
    "rms_norm_epsilon": 1e-8,
    "tokenizer_type": "GPT2BPETokenizer",
    "use_mup": False,
    "vocab_file": None,
}
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class ModelShape:
    """Sizes and options of a model whose layers are all MetaLA layers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    padded_vocab_size: int
    conv_width: int = 4
    self_augmentation: bool = True
    norm: str = "simplermsnorm"
    tied: bool = False

    @property
    def key_width(self) -> int:
        """K: query and gate columns of one head."""
        return self.hidden_size // (2 * self.num_heads)

    @property
    def value_width(self) -> int:
        """V: value and output-gate columns of one head."""
        return self.hidden_size // self.num_heads


def with_defaults(settings: Mapping[str, Any]) -> SimpleNamespace:
    """Settings as attributes, GPT-NeoX's defaults filled in.

    Raises:
        ConvertError: a size that has no default is missing, or is not a positive whole number.
    """
    values = {
        **DEFAULTS,
        **{
            key: value
            for key, value in settings.items()
            if value is not None or DEFAULTS.get(key) is None
        },
    }
    for key in (*REQUIRED, "model_parallel_size", "make_vocab_size_divisible_by"):
        if key not in values:
            raise ConvertError(f"{key}: not in the checkpoint's settings; give them by --config")
        if not isinstance(values[key], int) or values[key] < 1:
            raise ConvertError(f"{key}: found {values[key]!r}, wanted a whole number of at least 1")
    return SimpleNamespace(**values)


def model_shape(settings: Mapping[str, Any], padded_vocab_size: int) -> ModelShape:
    """The shape that GPT-NeoX's settings describe.

    Args:
        settings: merged YAML settings, '-' in keys already '_'.
        padded_vocab_size: rows of the embedding over all tensor-parallel ranks.

    Raises:
        ConvertError: the settings describe a model that cannot be exported; the line says what.
        SettingsError: `metala:` or `attention_config:` is malformed.
    """
    args = with_defaults(settings)
    layer_types = expand_attention_config(args.attention_config, args.num_layers)
    others = [f"{i} ({kind})" for i, kind in enumerate(layer_types) if kind != "metala"]
    if others:
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        raise ConvertError(
            "models with layers other than metala cannot be exported yet; "
            f"attention_config has {len(others)} of {args.num_layers}: {shown}"
        )
    if args.norm not in NORMS:
        raise ConvertError(
            f"norm: found {args.norm!r}, which cannot be exported, wanted {' or '.join(NORMS)}"
        )
    if args.pos_emb != "none":
        raise ConvertError(
            f"pos_emb: found {args.pos_emb!r}, which cannot be exported, wanted none"
        )
    if args.use_mup:
        raise ConvertError("use_mup: found true, which cannot be exported, wanted false")
    metala = MetaLASettings.parse(args.metala)
    if args.hidden_size % (2 * args.num_attention_heads):
        raise ConvertError(
            f"hidden_size: found {args.hidden_size}, wanted a multiple of 2 * num_attention_heads "
            f"= {2 * args.num_attention_heads}"
        )
    return ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_heads=args.num_attention_heads,
        intermediate_size=metala_intermediate_size(args),
        padded_vocab_size=padded_vocab_size,
        conv_width=metala.conv_width,
        self_augmentation=metala.self_augmentation,
        norm=args.norm,
        tied=not args.no_weight_tying,
    )


def check_tensor_parallel(shape: ModelShape, degree: int) -> None:
    """Raises a ConvertError if the model cannot be split over `degree` ranks."""
    for name, size in (
        ("num_attention_heads", shape.num_heads),
        ("intermediate_size", shape.intermediate_size),
        ("the padded vocabulary", shape.padded_vocab_size),
    ):
        if size % degree:
            raise ConvertError(f"tensor parallel {degree} does not divide {name}, {size}")


def padded_vocabulary(tokens: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows that GPT-NeoX gives the embedding for a tokenizer of `tokens` tokens."""
    multiple = divisible_by * tensor_parallel
    return -(-tokens // multiple) * multiple
