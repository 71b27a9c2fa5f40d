"""The model in GPT-NeoX's settings: read as an `Architecture`, written from one, and whether the
Hugging Face model has a counterpart of it.

This file imports the standard library alone, so that GPT-NeoX's launcher starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from megatron_patch.architecture import (
    EXPORTED_NORMS,
    LAYERS,
    MAX_WHOLE,
    METALA,
    NORM_EPSILON,
    POSITIVE,
    SOFTMAX_TYPES,
    SWITCH,
    TEXT,
    WHOLE,
    Architecture,
    AttentionLayers,
    Kind,
    MetaLAOptions,
    SettingsError,
    one_of,
    optional,
    refuse,
    shown,
)

# GPT-NeoX's layer types that are not its transformer layer with some attention.
OTHER_BLOCKS = ("gmlp", "amlp", "rwkv", "mamba")
# GPT-NeoX's defaults of the settings that describe a model: those that are off, those that are
# none, and the others.
_OFF = """
    apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion
    bias_gelu_fusion gpt_j_residual gpt_j_tied layernorm_fusion no_weight_tying
    rmsnorm_fusion rope_fusion rotary_save_freqs_buffer scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion sequence_parallel te_columnparallel
    te_fp8_mha te_layernorm_mlp te_mha te_rowparallel use_flashattn_swiglu use_mup
    use_qk_layernorm
""".split()
_UNSET = """
    attention_config expansion_factor intermediate_size num_kv_heads num_unique_layers
    sliding_window_width sparsity_config vocab_file
""".split()
GPT_NEOX_DEFAULTS = {
    **dict.fromkeys(_OFF, False),
    **dict.fromkeys(_UNSET, None),
    "activation": "gelu",
    "attention_dropout": 0.0,
    "gmlp_attn_dim": 64,
    "init_method": "normal",
    "init_method_std": 0.02,
    "layernorm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 128,
    "mlp_multiple_of": 1,
    "model_parallel_size": 1,
    "moe_num_experts": 1,
    "norm": "layernorm",
    "opt_pos_emb_offset": 0,
    "output_layer_init_method": "scaled_normal",
    "pipe_parallel_size": 0,
    "pipe_partition_method": "type:transformer|mlp",
    "pos_emb": "learned",
    "rms_norm_epsilon": 1e-8,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "rpe_max_distance": 128,
    "rpe_num_buckets": 32,
    "scalenorm_epsilon": 1e-8,
    "tokenizer_type": "GPT2BPETokenizer",
    "train_impl": "normal",
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
}

# The kinds of the settings that `with_defaults` checks.
KINDS = {
    "num_layers": LAYERS,
    "hidden_size": WHOLE,
    "num_attention_heads": WHOLE,
    "model_parallel_size": WHOLE,
    "make_vocab_size_divisible_by": WHOLE,
    "pipe_parallel_size": Kind(
        "a whole number of at least 0", lambda value: value == 0 or WHOLE.accepts(value)
    ),
    "no_weight_tying": SWITCH,
    "tokenizer_type": TEXT,
    "vocab_file": optional(TEXT),
    "num_kv_heads": optional(WHOLE),
}


def with_defaults(settings: Mapping[str, Any]) -> SimpleNamespace:
    """Returns the settings of YAML files as attributes, with GPT-NeoX's defaults filled in. Raises
    a SettingsError if a size that has no default is missing, or a value is not of its kind."""
    values = {METALA: None, **GPT_NEOX_DEFAULTS}
    for key, value in settings.items():
        if value is not None or values.get(key) is None:
            values[key] = value
    for key, kind in KINDS.items():
        if key not in values:
            raise SettingsError(f"{key}: found nothing in the settings, wanted {kind.wanted}")
        if not kind.accepts(values[key]):
            refuse(key, values[key], kind.wanted)
    return SimpleNamespace(**values)


def from_neox(settings: Any, padded_vocab_size: int | None = None) -> Architecture:
    """Returns the model that GPT-NeoX's settings describe, with `padded_vocab_size` rows over all
    tensor-parallel ranks. The settings are attributes: of GPT-NeoX's own object, or of that of
    `with_defaults`. Raises a SettingsError, which names the setting, if they describe no MetaLA
    model."""
    for item in fields(Architecture)[:3]:  # the sizes that have no default
        _check(settings, item.metadata["neox"], item.metadata["kind"])
    layer_types = expand_attention_config(settings.attention_config, settings.num_layers)
    if METALA not in layer_types:
        raise SettingsError("attention_config: found no layer of type metala, wanted one")
    _check(settings, "norm", one_of(*NORM_EPSILON))
    epsilon = NORM_EPSILON[settings.norm]
    _check(settings, epsilon, POSITIVE)
    others = set(layer_types) - {METALA}
    return Architecture(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_heads=settings.num_attention_heads,
        intermediate_size=metala_intermediate_size(settings),
        padded_vocab_size=padded_vocab_size,
        norm=settings.norm,
        norm_eps=getattr(settings, epsilon),
        tied=not settings.no_weight_tying,
        init_std=settings.init_method_std,
        rewards=settings.train_impl == "rm",
        metala=MetaLAOptions.parse(settings.metala),
        layer_types=tuple(layer_types) if others else (),
        attention=_attention_from_neox(settings, others) if others else None,
    )


def _check(settings: Any, name: str, kind: Kind) -> None:
    if not kind.accepts(getattr(settings, name)):
        refuse(name, getattr(settings, name), kind.wanted)


def _attention_from_neox(settings: Any, types: set[str]) -> AttentionLayers:
    # RWKV and Mamba blocks have an MLP of their own, or none.
    has_gated_mlp = bool(types - set(OTHER_BLOCKS))
    width = attention_intermediate_size if has_gated_mlp else metala_intermediate_size
    return AttentionLayers(
        num_kv_heads=settings.num_kv_heads or settings.num_attention_heads,
        intermediate_size=width(settings),
        has_bias=settings.use_bias_in_attn_linear,
        mlp_has_bias=settings.use_bias_in_mlp,
        rope_theta=settings.rotary_emb_base if settings.pos_emb == "rotary" else None,
        partial_rotary_factor=settings.rotary_pct,
    )


def to_neox(model: Architecture) -> dict[str, Any]:
    """Returns GPT-NeoX's settings of a model, without parallelism, data and files. Raises a
    SettingsError if GPT-NeoX has no settings for it. The line uses the names of a Hugging Face
    configuration, which such a model comes from."""
    settings = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "attention_config": list(model.layer_types) or [[[METALA], model.num_layers]],
        METALA: {**model.metala.of_model(), "init": "authors"},
        "norm": model.norm,
        NORM_EPSILON[model.norm]: model.norm_eps,
        "activation": "swiglu",
        "pos_emb": "none",
        "no_weight_tying": not model.tied,
        "init_method": "normal",
        "output_layer_init_method": "normal",
        "init_method_std": model.init_std,
    }
    attention = model.attention
    if attention is None:
        return settings
    if METALA not in model.layer_types:
        raise SettingsError("layer_types: found no linear_attention, wanted at least one")
    settings |= {
        "num_kv_heads": attention.num_kv_heads,
        "use_bias_in_attn_linear": attention.has_bias,
        "use_bias_in_mlp": attention.mlp_has_bias,
        **_mlp_widths_to_neox(model),
    }
    if attention.rope_theta is not None:
        if not float(attention.rope_theta).is_integer():
            refuse("rope_theta", attention.rope_theta, "a whole number")
        settings |= {
            "pos_emb": "rotary",
            "rotary_emb_base": int(attention.rope_theta),
            "rotary_pct": attention.partial_rotary_factor,
        }
    return settings


def _mlp_widths_to_neox(model: Architecture) -> dict[str, Any]:
    """Returns the settings that give the MLPs of MetaLA and attention layers their widths. GPT-NeoX
    rounds a third of `intermediate_size` up to a multiple of `mlp_multiple_of`; without
    `intermediate_size` both have their defaults."""
    wanted = (model.intermediate_size, model.attention.intermediate_size)
    for size in (model.intermediate_size, None):
        settings = {"intermediate_size": size, "mlp_multiple_of": wanted[1]}
        args = SimpleNamespace(hidden_size=model.hidden_size, expansion_factor=None, **settings)
        try:
            if (metala_intermediate_size(args), attention_intermediate_size(args)) == wanted:
                return settings
        except SettingsError:
            continue
    raise SettingsError(
        f"attention_glu_dim: found {wanted[1]}, which no settings of GPT-NeoX give "
        f"beside glu_dim = {wanted[0]}, wanted at least a third of it"
    )


def expand_attention_config(attention_config: Any, num_layers: int) -> list[str]:
    """Returns the type of each layer from GPT-NeoX's shorthand, e.g. `[[["metala", "global"], 8]]`.
    Raises a SettingsError if the shorthand is malformed, or gives another number of layers."""
    if not LAYERS.accepts(num_layers):
        refuse("num_layers", num_layers, LAYERS.wanted)
    if attention_config is None:
        return [SOFTMAX_TYPES[0]] * num_layers
    if not isinstance(attention_config, (list, tuple)):
        refuse("attention_config", attention_config, "a list of layer types")
    if all(isinstance(item, str) for item in attention_config):
        patterns = [(list(attention_config), 1)]
    else:
        patterns = []
        for item in attention_config:
            if not (
                isinstance(item, (list, tuple))
                and len(item) == 2
                and isinstance(item[0], list)
                and item[0]
                and all(isinstance(kind, str) for kind in item[0])
                and (item[1] == "all" or WHOLE.accepts(item[1]))
            ):
                refuse("attention_config", item, "[[layer types], repetitions]")
            pattern, times = item
            patterns.append((pattern, num_layers // len(pattern) if times == "all" else times))
    count = sum(len(pattern) * times for pattern, times in patterns)
    if count != num_layers:
        raise SettingsError(
            f"attention_config: found {shown(count)} layers, wanted num_layers = {num_layers}"
        )
    return [kind for pattern, times in patterns for kind in pattern * times]


def module_layers(num_layers: int, tied: bool) -> list[int]:
    """Returns the indices of the layers that have a file in a layer-file checkpoint: embedding (0),
    blocks (from 2), last norm and head. Layers 1 and n + 2 are functions without tensors, as is
    a tied head; the last norm has a file even if it holds no tensors."""
    return [0, *range(2, num_layers + 2), num_layers + 3, *([] if tied else [num_layers + 4])]


def metala_intermediate_size(settings: Any) -> int:
    """Returns the width of a MetaLA layer's MLP: `intermediate_size`, else `expansion_factor` times
    the hidden size, else 8/3 of the hidden size rounded up to a multiple of 256 (2816 for 1024, as
    in the authors' 0.38B model). Raises a SettingsError if one of the two is no positive number."""
    return _mlp_size(settings) or -(-8 * settings.hidden_size // (3 * 256)) * 256


def attention_intermediate_size(settings: Any) -> int:
    """Returns the width of the gated MLP that GPT-NeoX gives a hybrid's attention layers: a third
    of `intermediate_size` (else of `expansion_factor` times the hidden size, else of four times
    it), rounded up to a multiple of `mlp_multiple_of`. Raises a SettingsError if GPT-NeoX would
    build two matrices that do not fit each other."""
    total = _mlp_size(settings) or 4 * settings.hidden_size
    multiple = settings.mlp_multiple_of
    _check(settings, "mlp_multiple_of", WHOLE)
    gate_and_up = int(total * 2 / 3)
    width = -(-(gate_and_up // 2) // multiple) * multiple
    if 2 * width != -(-gate_and_up // (2 * multiple)) * 2 * multiple:
        raise SettingsError(
            f"mlp_multiple_of: found {multiple} with an MLP of {total}, of which GPT-NeoX cannot "
            "build the attention layers' third, wanted the width that theirs should have"
        )
    return width


def _mlp_size(settings: Any) -> int | None:
    """Returns the size that `intermediate_size` or `expansion_factor` gives, else `None`."""
    for name, kind in (("intermediate_size", WHOLE), ("expansion_factor", POSITIVE)):
        if not optional(kind).accepts(getattr(settings, name)):
            refuse(name, getattr(settings, name), kind.wanted)
    if settings.intermediate_size or not settings.expansion_factor:
        return settings.intermediate_size
    size = settings.expansion_factor * settings.hidden_size
    if not 1 <= size <= MAX_WHOLE:
        refuse("expansion_factor", settings.expansion_factor, "one that gives an MLP of some width")
    return int(size)


# The values with which a setting can be exported: in every model, and where there is attention.
EXPORTED = {
    "norm": EXPORTED_NORMS,
    "gpt_j_residual": (False,),
    "moe_num_experts": (1,),
    "use_mup": (False,),
    "pos_emb": ("none",),
}
EXPORTED_WITH_ATTENTION = {
    "pos_emb": ("none", "rotary"),
    "rotary_save_freqs_buffer": (False,),
    "sliding_window_width": (None,),
    "te_fp8_mha": (False,),
    "te_mha": (False,),
    "use_qk_layernorm": (False,),
}


def why_not_exportable(settings: Any) -> list[tuple[str, str, str]]:
    """Returns why the Hugging Face model has no counterpart of a model that `from_neox` accepts:
    (setting, what was found, what was wanted) of each reason. The converter refuses such a model; a
    training warns at its start."""
    layer_types = expand_attention_config(settings.attention_config, settings.num_layers)
    known = (METALA, *SOFTMAX_TYPES)
    reasons = []
    if others := [f"{i} ({kind})" for i, kind in enumerate(layer_types) if kind not in known]:
        listed = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        reasons.append(("attention_config", f"layers {listed}", ", ".join(known)))
    table = dict(EXPORTED)
    if set(layer_types) != {METALA}:
        table |= EXPORTED_WITH_ATTENTION
    for name, values in table.items():
        if (found := getattr(settings, name)) not in values:
            reasons.append((name, shown(found), " or ".join(map(str, values))))
    return reasons


def why_tokenizer_not_exportable(settings: Any) -> list[tuple[str, str, str]]:
    """Returns the same for the tokenizer. The converter reads the `vocab_file` of two tokenizer
    types; a run with another one has to name a tokenizer.json at export."""
    known = ("HFTokenizer", "HFGPT2Tokenizer")
    if settings.tokenizer_type.lower() in map(str.lower, known) and settings.vocab_file:
        return []
    found = f"{shown(settings.tokenizer_type)} with vocab_file {settings.vocab_file}"
    wanted = f"{known[0]} with a tokenizer.json (else give one by --tokenizer at export)"
    return [("tokenizer_type", found, wanted)]
