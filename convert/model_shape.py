"""The sizes and options that decide which tensors a MetaLA model has, from GPT-NeoX's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from convert.command import ConvertError
from megatron_patch.neox.settings import (
    MetaLASettings,
    attention_intermediate_size,
    expand_attention_config,
    metala_intermediate_size,
)

NORMS = ("simplermsnorm", "rmsnorm")
# GPT-NeoX's types of causal softmax attention, one model by two kernels.
ATTENTION_TYPES = ("global", "flash")

# GPT-NeoX's values for keys that the YAML files leave out.
DEFAULTS = {
    "activation": "gelu",
    "attention_config": None,
    "expansion_factor": None,
    "gpt_j_residual": False,
    "init_method_std": 0.02,
    "intermediate_size": None,
    "make_vocab_size_divisible_by": 128,
    "metala": None,
    "mlp_multiple_of": 1,
    "model_parallel_size": 1,
    "moe_num_experts": 1,
    "no_weight_tying": False,
    "norm": "layernorm",
    "num_kv_heads": None,
    "pipe_parallel_size": 0,
    "pos_emb": "learned",
    "rms_norm_epsilon": 1e-8,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "rotary_save_freqs_buffer": False,
    "sliding_window_width": None,
    "te_fp8_mha": False,
    "te_mha": False,
    "tokenizer_type": "GPT2BPETokenizer",
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
    "use_mup": False,
    "use_qk_layernorm": False,
    "vocab_file": None,
}
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
# Settings of which one value can be exported: of any model, and of one with attention layers.
ONLY = {"gpt_j_residual": False, "moe_num_experts": 1, "use_mup": False}
ONLY_OF_ATTENTION = {
    "rotary_save_freqs_buffer": False,
    "sliding_window_width": None,
    "te_fp8_mha": False,
    "te_mha": False,
    "use_qk_layernorm": False,
}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and options of the attention layers of a hybrid.

    Attributes:
        layers: which of the model's layers they are.
        num_kv_heads: heads of keys and of values.
        intermediate_size: width of their MLP.
        has_bias, mlp_has_bias: whether projections and MLP have biases.
    """

    layers: frozenset[int]
    num_kv_heads: int
    intermediate_size: int
    has_bias: bool
    mlp_has_bias: bool


@dataclass(frozen=True)
class ModelShape:
    """Sizes and options of a model of MetaLA layers, or of a hybrid with attention layers."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    padded_vocab_size: int
    conv_width: int = 4
    self_augmentation: bool = True
    norm: str = "simplermsnorm"
    tied: bool = False
    attention: AttentionShape | None = None

    def is_attention(self, block: int) -> bool:
        """Whether a block is one of softmax attention."""
        return self.attention is not None and block in self.attention.layers

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
    if args.norm not in NORMS:
        raise ConvertError(
            f"norm: found {args.norm!r}, which cannot be exported, wanted {' or '.join(NORMS)}"
        )
    attention = _attention_shape(args, layer_types)
    for key, value in {**ONLY, **(ONLY_OF_ATTENTION if attention else {})}.items():
        if getattr(args, key) != value:
            raise ConvertError(
                f"{key}: found {getattr(args, key)!r}, which cannot be exported, wanted {value!r}"
            )
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
        attention=attention,
    )


def _attention_shape(args: SimpleNamespace, layer_types: list[str]) -> AttentionShape | None:
    """What the settings say of attention layers, `None` where there are none."""
    known = ("metala", *ATTENTION_TYPES)
    if others := [f"{i} ({kind})" for i, kind in enumerate(layer_types) if kind not in known]:
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        raise ConvertError(
            f"attention_config: found layers that cannot be exported: {shown}; wanted "
            f"{', '.join(known)}"
        )
    if "metala" not in layer_types:
        raise ConvertError("attention_config: found no layer of type metala, wanted at least one")
    layers = frozenset(i for i, kind in enumerate(layer_types) if kind in ATTENTION_TYPES)
    positions = ("none", "rotary") if layers else ("none",)
    if args.pos_emb not in positions:
        raise ConvertError(
            f"pos_emb: found {args.pos_emb!r}, which cannot be exported, wanted "
            f"{' or '.join(positions)}"
        )
    if not layers:
        return None
    heads, kv_heads = args.num_attention_heads, args.num_kv_heads or args.num_attention_heads
    if heads % kv_heads:
        raise ConvertError(
            f"num_kv_heads: found {kv_heads}, wanted a divisor of num_attention_heads = {heads}"
        )
    return AttentionShape(
        layers=layers,
        num_kv_heads=kv_heads,
        intermediate_size=attention_intermediate_size(args),
        has_bias=args.use_bias_in_attn_linear,
        mlp_has_bias=args.use_bias_in_mlp,
    )


def check_tensor_parallel(shape: ModelShape, degree: int) -> None:
    """Raises a ConvertError if the model cannot be split over `degree` ranks."""
    sizes = [
        ("num_attention_heads", shape.num_heads),
        ("intermediate_size", shape.intermediate_size),
        ("the padded vocabulary", shape.padded_vocab_size),
    ]
    if shape.attention:
        sizes.append(("num_kv_heads", shape.attention.num_kv_heads))
        sizes.append(("the MLP of attention layers", shape.attention.intermediate_size))
    for name, size in sizes:
        if size % degree:
            raise ConvertError(f"tensor parallel {degree} does not divide {name}, {size}")


def padded_vocabulary(tokens: int, divisible_by: int, tensor_parallel: int) -> int:
    """Rows that GPT-NeoX gives the embedding for a tokenizer of `tokens` tokens."""
    multiple = divisible_by * tensor_parallel
    return -(-tokens // multiple) * multiple
