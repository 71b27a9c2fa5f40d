"""Checks of a MetaLA model's settings. `run_settings.py` checks the settings of a run.

They read the attributes of any settings object and need no GPT-NeoX, so the Hugging Face Trainer
backend uses them too.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_patch.architecture import (
    METALA,
    NORM_EPSILON,
    SOFTMAX_TYPES,
    WHOLE,
    Architecture,
    SettingsError,
    refuse,
)
from megatron_patch.architecture_neox import (
    GPT_NEOX_DEFAULTS,
    OTHER_BLOCKS,
    expand_attention_config,
    from_neox,
    why_not_exportable,
    why_tokenizer_not_exportable,
)
from megatron_patch.ops import BACKENDS

# Settings that can have only one value in a model with MetaLA layers: the value, and why.
ONLY = {
    "activation": ("swiglu", "the MLP of a MetaLA block"),
    "gpt_j_residual": (False, "a metala layer's MLP follows its mixer"),
    "use_mup": (False, "metala layers have no muP initialisation"),
    "moe_num_experts": (1, "metala layers have a dense MLP"),
    "te_columnparallel": (False, "metala layers have no Transformer Engine form"),
    "te_rowparallel": (False, "metala layers have no Transformer Engine form"),
    "te_layernorm_mlp": (False, "metala layers have no Transformer Engine form"),
    "num_unique_layers": (None, "GPT-NeoX shares no layers any more"),
}
# Settings that only attention layers read. Without such layers they would have no effect.
OF_ATTENTION = """
    apply_query_key_layer_scaling attention_dropout attention_softmax_in_fp32
    bias_dropout_fusion bias_gelu_fusion gmlp_attn_dim gpt_j_tied mlp_multiple_of
    opt_pos_emb_offset rope_fusion rotary_emb_base rotary_pct rotary_save_freqs_buffer
    rpe_max_distance rpe_num_buckets scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion sliding_window_width sparsity_config te_fp8_mha
    te_mha use_flashattn_swiglu use_qk_layernorm
""".split()
# Settings of GPT-NeoX's compiled norms, each with the norm that it computes.
FUSED_NORMS = {"layernorm_fusion": "layernorm", "rmsnorm_fusion": "rmsnorm"}


def check_settings(args: Any) -> Architecture | None:
    """Checks the settings of a model before it is built. They are attributes of any object; derived
    values are not needed. Returns the model, or `None` if no layer is of type `metala`. Raises a
    SettingsError."""
    if not _has_metala_layers(args):
        if args.metala is not None:
            raise SettingsError(
                "metala: found settings, but attention_config has no layer of type metala"
            )
        return None
    for name in ("num_kv_heads", "moe_num_experts", "model_parallel_size"):
        if (found := getattr(args, name)) and not WHOLE.accepts(found):
            refuse(name, found, WHOLE.wanted)
    if args.intermediate_size and args.expansion_factor:
        refuse("expansion_factor", args.expansion_factor, "none, since intermediate_size is set")
    model = from_neox(args)
    if model.metala.backend not in BACKENDS:
        refuse("metala.backend", model.metala.backend, f"one of {', '.join(BACKENDS)}")
    for name, (wanted, why) in ONLY.items():
        if (found := getattr(args, name)) != wanted:
            refuse(name, found, f"{_in_yaml(wanted)}: {why}")
    _check_unread(args, model)
    _check_tensor_parallel(args, model)
    _check_pipeline(args, model)
    _check_documents(args, model)
    return model


def export_warning(args: Any) -> str | None:
    """Returns a line that says why a model that trains cannot be exported, `None` if it can be."""
    reasons = [*why_not_exportable(args), *why_tokenizer_not_exportable(args)]
    if not reasons:
        return None
    line = "; ".join(f"{name}: found {found}, wanted {ok}" for name, found, ok in reasons)
    return f"this model trains, but cannot be exported to Hugging Face: {line}"


def _has_metala_layers(args: Any) -> bool:
    config = args.attention_config
    if args.metala is None and METALA not in str(config):
        return False  # GPT-NeoX checks its own models
    if not WHOLE.accepts(args.num_layers):
        refuse("num_layers", args.num_layers, WHOLE.wanted)
    return METALA in expand_attention_config(config, args.num_layers)


def _in_yaml(value: object) -> str:
    """Formats a value as YAML writes it."""
    return "none" if value is None else str(value).lower()


def _check_unread(args: Any, model: Architecture) -> None:
    """Refuses settings that no layer of this model reads."""

    def unless_default(name: str, why: str) -> None:
        found, default = getattr(args, name), GPT_NEOX_DEFAULTS[name]
        # GPT-NeoX itself sets some that are not given to {}.
        if found != default and (found or default):
            refuse(name, found, f"{_in_yaml(default)}: {why}")

    for name, norm in FUSED_NORMS.items():
        if model.norm != norm:
            unless_default(name, f"norm is {model.norm}")
    for name in sorted(set(NORM_EPSILON.values()) - {NORM_EPSILON[model.norm]}):
        unless_default(name, f"norm is {model.norm}, which takes {NORM_EPSILON[model.norm]}")
    if model.attention:
        return
    if args.pos_emb != "none":
        refuse("pos_emb", args.pos_emb, "none: metala layers know the order of their tokens")
    if args.num_kv_heads and args.num_kv_heads != model.num_heads:
        refuse("num_kv_heads", args.num_kv_heads, "none: no layer has key heads")
    for name in OF_ATTENTION:
        unless_default(name, "no layer is one of attention")
    if model.metala.init == "authors":
        for name in ("init_method", "output_layer_init_method"):
            allowed = {"normal", GPT_NEOX_DEFAULTS[name]}
            if (found := getattr(args, name)) not in allowed:
                refuse(name, found, "normal, or metala.init: neox, by which it counts")


def _check_tensor_parallel(args: Any, model: Architecture) -> None:
    degree = max(args.model_parallel_size, 1)
    wanted = f"a multiple of model_parallel_size = {degree}"
    if model.num_heads % degree:
        refuse("num_attention_heads", model.num_heads, wanted)
    if model.intermediate_size % degree:
        refuse("intermediate_size", model.intermediate_size, wanted)
    of, kinds = model.attention, set(model.layer_types) - {METALA}
    if of is None:
        return
    if kinds - set(OTHER_BLOCKS) and of.intermediate_size % degree:
        refuse(
            "mlp_multiple_of",
            args.mlp_multiple_of,
            f"one that makes the attention layers' MLP, {of.intermediate_size} wide, {wanted}",
        )
    if of.num_kv_heads != model.num_heads:
        if of.num_kv_heads % degree:
            refuse("num_kv_heads", of.num_kv_heads, wanted)
        if ungrouped := sorted(kinds - set(SOFTMAX_TYPES)):
            refuse("num_kv_heads", of.num_kv_heads, f"none with layers of type {ungrouped[0]}")


def _check_pipeline(args: Any, model: Architecture) -> None:
    """Checks `pipe_partition_method`. DeepSpeed balances the layers whose class matches a `type:`
    pattern over the stages, and fails where fewer layers match than there are stages."""
    method = args.pipe_partition_method
    if method in ("uniform", "parameters"):
        return
    if not isinstance(method, str) or not method.startswith("type:"):
        wanted = "uniform, parameters, or type: as in type:transformer|mlp|metala"
        refuse("pipe_partition_method", method, wanted)
    pattern = method.removeprefix("type:")
    try:
        matches = re.compile(pattern, re.IGNORECASE).search
    except re.error as error:
        refuse("pipe_partition_method", method, f"a regular expression after type: ({error})")
    types = model.layer_types or (METALA,) * model.num_layers
    if not matches("ParallelMetaLALayerPipe"):
        refuse("pipe_partition_method", method, "one that matches metala layers, as type:metala")
    found = sum(bool(matches(CLASS_OF.get(kind, "ParallelTransformerLayerPipe"))) for kind in types)
    if found < max(args.pipe_parallel_size, 1):
        refuse(
            "pipe_partition_method",
            method,
            f"one that matches at least pipe_parallel_size = {args.pipe_parallel_size} layers, as "
            f"type:transformer|mlp|metala (it matches {found})",
        )


def _check_documents(args: Any, model: Architecture) -> None:
    """Refuses `reset_at_document` beside layers that would look across documents: only attention of
    type `global`, with the softmax of PyTorch or the general fused one, reads the mask."""
    if not model.metala.reset_at_document:
        return
    name = "metala.reset_at_document"
    if others := sorted(set(model.layer_types) - {METALA, "global"}):
        refuse(
            name,
            True,
            f"false with layers of type {', '.join(others)}: only metala and global layers keep "
            "documents apart",
        )
    for other in ("scaled_upper_triang_masked_softmax_fusion", "te_mha", "te_fp8_mha"):
        if getattr(args, other):
            refuse(name, True, f"false with {other}, which reads no mask")


# The classes of layer types that are not GPT-NeoX's ordinary transformer layer.
CLASS_OF = {
    METALA: "ParallelMetaLALayerPipe",
    "gmlp": "GMLPBlock",
    "amlp": "GMLPBlock",
    "rwkv": "RWKVResidualLayerPipe",
    "mamba": "ParallelMambaResidualLayerPipe",
}
