"""The attention layers of a hybrid, in GPT-NeoX's settings and in a Hugging Face configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from convert.command import ConvertError
from convert.mlp_widths import hybrid_mlp_settings
from convert.model_shape import AttentionShape, ModelShape


def to_hf(shape: ModelShape, args: SimpleNamespace) -> dict[str, Any]:
    """Keys of `MetaLAConfig`, none for a model without attention layers.

    Args:
        shape: the model's.
        args: GPT-NeoX's settings with its defaults.
    """
    of = shape.attention
    if of is None:
        return {}
    layers = range(shape.num_layers)
    return {
        "layer_types": ["full_attention" if i in of.layers else "linear_attention" for i in layers],
        "num_key_value_heads": of.num_kv_heads,
        "attention_bias": of.has_bias,
        "attention_glu_dim": of.intermediate_size,
        "attention_glu_bias": of.mlp_has_bias,
        "rope_theta": float(args.rotary_emb_base) if args.pos_emb == "rotary" else None,
        "partial_rotary_factor": float(args.rotary_pct),
    }


def from_hf(config: Any) -> AttentionShape | None:
    """The attention layers that a `MetaLAConfig` describes, `None` where there are none."""
    layers = frozenset(i for i in range(config.decoder_layers) if config.is_attention(i))
    if not layers:
        return None
    return AttentionShape(
        layers=layers,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.attention_glu_dim,
        has_bias=config.attention_bias,
        mlp_has_bias=config.attention_glu_bias,
    )


def to_neox(config: Any) -> dict[str, Any]:
    """GPT-NeoX's settings of which layer is what, and of the attention layers of a `MetaLAConfig`.

    Raises:
        ConvertError: GPT-NeoX has no settings for it.
    """
    of = from_hf(config)
    types = ["global" if config.is_attention(i) else "metala" for i in range(config.decoder_layers)]
    if of is None:
        return {"attention_config": [[["metala"], config.decoder_layers]], "pos_emb": "none"}
    if "metala" not in types:
        raise ConvertError("layer_types: found no linear_attention, wanted at least one")
    settings: dict[str, Any] = {
        "attention_config": types,
        "num_kv_heads": of.num_kv_heads,
        "use_bias_in_attn_linear": of.has_bias,
        "use_bias_in_mlp": of.mlp_has_bias,
        "pos_emb": "none",
    }
    if config.rope_theta is not None:
        if not float(config.rope_theta).is_integer():
            raise ConvertError(f"rope_theta: found {config.rope_theta}, wanted a whole number")
        settings |= {
            "pos_emb": "rotary",
            "rotary_emb_base": int(config.rope_theta),
            "rotary_pct": config.partial_rotary_factor,
        }
    return settings | hybrid_mlp_settings(config)
