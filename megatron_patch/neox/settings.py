"""The settings under the YAML key `metala:` and the checks a MetaLA run must pass before it starts.

Importable without GPT-NeoX: the checks read plain attributes of any settings object.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_patch.ops import BACKENDS


class SettingsError(ValueError):
    """A setting, or a combination of settings, with which a MetaLA run makes no sense."""


class MetaLASettings(BaseModel):
    """The mapping under `metala:` in a GPT-NeoX YAML file; every key is optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    tau: float = Field(
        16.0, gt=0, description="Divides the log decay: logsigmoid(gate_logits) / tau."
    )
    conv_width: int = Field(4, ge=1, description="Taps of the causal depthwise convolution.")
    self_augmentation: bool = Field(True, description="Learn w of sigmoid((q . (w * k)) v).")
    output_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of each head's LayerNorm.")
    init: Literal["neox", "authors"] = Field(
        "neox",
        description="'neox': GPT-NeoX's init_method and output_layer_init_method. 'authors': "
        "normal with init_method_std for all linears, Xavier-uniform with gain 2**-2.5 for q and "
        "gate logits.",
    )
    backend: Literal[BACKENDS] = Field("auto", description="Implementation of the operator.")

    @classmethod
    def parse(cls, mapping: dict | None) -> MetaLASettings:
        """Settings from the YAML mapping, or the defaults for `None`.

        Raises:
            SettingsError: one line that names every offending key, what was found and what was
            wanted.
        """
        if mapping is not None and not isinstance(mapping, dict):
            raise SettingsError(
                f"metala: found {mapping!r}, wanted a mapping of {', '.join(cls.model_fields)}"
            )
        try:
            return cls(**(mapping or {}))
        except ValidationError as error:
            raise SettingsError("; ".join(cls._describe(e) for e in error.errors())) from None

    @classmethod
    def _describe(cls, error: dict) -> str:
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            return f"metala.{key}: unknown key, the known ones are {', '.join(cls.model_fields)}"
        return f"metala.{key}: found {error['input']!r}: {error['msg']}"


def metala_intermediate_size(args) -> int:
    """Width f of a MetaLA block's MLP: `intermediate_size`, else `expansion_factor` times the
    hidden size, else 8/3 of it rounded up to a multiple of 256 (2816 for 1024, as in the authors'
    0.38B)."""
    if args.intermediate_size:
        return args.intermediate_size
    if args.expansion_factor:
        return int(args.expansion_factor * args.hidden_size)
    return -(-8 * args.hidden_size // (3 * 256)) * 256


def attention_intermediate_size(args) -> int:
    """Width of the gated MLP that GPT-NeoX gives the attention layers of a hybrid: a third of
    `intermediate_size` (else of `expansion_factor` times the hidden size, else of four times it),
    rounded up to a multiple of `mlp_multiple_of`.

    Raises:
        SettingsError: GPT-NeoX's roundings do not meet, its two matrices would not fit each other.
    """
    if args.intermediate_size:
        total = args.intermediate_size
    elif args.expansion_factor:
        total = int(args.expansion_factor * args.hidden_size)
    else:
        total = 4 * args.hidden_size
    multiple, gate_and_up = args.mlp_multiple_of, int(total * 2 / 3)
    width = -(-(gate_and_up // 2) // multiple) * multiple
    if 2 * width != -(-gate_and_up // (2 * multiple)) * 2 * multiple:
        raise SettingsError(
            f"mlp_multiple_of: found {multiple} with an MLP of {total}, of which GPT-NeoX cannot "
            "build the attention layers' third, wanted the width that theirs should have"
        )
    return width


def expand_attention_config(attention_config: list | None, num_layers: int) -> list[str]:
    """One layer type per layer from GPT-NeoX's shorthand, e.g. `[[["metala", "global"], 8]]`.

    Raises:
        SettingsError: the shorthand is malformed, or gives another number of layers.
    """
    if attention_config is None:
        return ["global"] * num_layers
    if not isinstance(attention_config, (list, tuple)):
        raise SettingsError(
            f"attention_config: found {attention_config!r}, wanted a list of layer types"
        )
    if all(isinstance(item, str) for item in attention_config):
        layers = list(attention_config)
    else:
        layers = []
        for item in attention_config:
            if not (
                isinstance(item, (list, tuple))
                and len(item) == 2
                and isinstance(item[0], list)
                and item[0]
                and (item[1] == "all" or isinstance(item[1], int))
            ):
                raise SettingsError(
                    f"attention_config: found {item!r}, wanted [[layer types], repetitions]"
                )
            pattern, repetitions = item
            if repetitions == "all":
                repetitions = num_layers // len(pattern)
            layers.extend(pattern * repetitions)
    if len(layers) != num_layers:
        raise SettingsError(
            f"attention_config: found {len(layers)} layers, wanted num_layers = {num_layers}"
        )
    return layers


def check_settings(args) -> MetaLASettings | None:
    """Checks a run's settings before anything is built.

    Args:
        args: any object with GPT-NeoX's settings as attributes, derived values not yet needed.

    Returns:
        The parsed `metala:` settings, or `None` where no layer is of type `metala`.

    Raises:
        SettingsError: one line that names the setting, what was found and what was wanted.
    """
    if args.num_layers is None or args.hidden_size is None or args.num_attention_heads is None:
        return None  # GPT-NeoX itself reports these
    layers = expand_attention_config(args.attention_config, args.num_layers)
    if "metala" not in layers:
        if args.metala is not None:
            raise SettingsError(
                "metala: found settings, but attention_config has no layer of type metala"
            )
        return None
    settings = MetaLASettings.parse(args.metala)
    tensor_parallel = max(args.model_parallel_size, 1)
    hidden_size, heads = args.hidden_size, args.num_attention_heads

    def refuse(setting: str, found: object, wanted: str) -> None:
        raise SettingsError(f"{setting}: found {found!r}, wanted {wanted}")

    if hidden_size % (2 * heads):
        refuse("hidden_size", hidden_size, f"a multiple of 2 * num_attention_heads = {2 * heads}")
    if heads % tensor_parallel:
        refuse(
            "num_attention_heads", heads, f"a multiple of model_parallel_size = {tensor_parallel}"
        )
    if args.intermediate_size and args.expansion_factor:
        refuse("expansion_factor", args.expansion_factor, "none, since intermediate_size is set")
    if metala_intermediate_size(args) % tensor_parallel:
        refuse(
            "intermediate_size",
            metala_intermediate_size(args),
            f"a multiple of model_parallel_size = {tensor_parallel}",
        )
    if args.activation != "swiglu":
        refuse("activation", args.activation, "swiglu, the MLP of a MetaLA block")
    if args.sequence_parallel:
        refuse(
            "sequence_parallel", True, "false: the convolution of a metala layer needs all tokens"
        )
    if args.gpt_j_residual:
        refuse("gpt_j_residual", True, "false: a metala layer's MLP follows its mixer")
    if args.use_mup:
        refuse("use_mup", True, "false: metala layers have no muP initialisation")
    if args.moe_num_experts > 1:
        refuse("moe_num_experts", args.moe_num_experts, "1: metala layers have a dense MLP")
    if args.te_columnparallel or args.te_rowparallel or args.te_layernorm_mlp:
        refuse(
            "te_columnparallel, te_rowparallel, te_layernorm_mlp", True, "false with metala layers"
        )
    others = set(layers) - {"metala"}
    if others & {"global", "flash"}:
        width = attention_intermediate_size(args)
        if width % tensor_parallel:
            refuse(
                "mlp_multiple_of",
                args.mlp_multiple_of,
                f"one that makes the attention layers' MLP, {width} wide, a multiple of "
                f"model_parallel_size = {tensor_parallel}",
            )
    key_heads = args.num_kv_heads or heads
    if others and key_heads != heads:
        if heads % key_heads:
            refuse("num_kv_heads", key_heads, f"a divisor of num_attention_heads = {heads}")
        if key_heads % tensor_parallel:
            refuse(
                "num_kv_heads", key_heads, f"a multiple of model_parallel_size = {tensor_parallel}"
            )
        if ungrouped := sorted(others - {"global", "flash"}):
            refuse("num_kv_heads", key_heads, f"none with layers of type {', '.join(ungrouped)}")
    if not others:
        if args.pos_emb != "none":
            refuse("pos_emb", args.pos_emb, "none: metala layers know the order of their tokens")
        if args.attention_dropout:
            refuse("attention_dropout", args.attention_dropout, "0: no layer has attention weights")
        if args.num_kv_heads and args.num_kv_heads != heads:
            refuse("num_kv_heads", args.num_kv_heads, "none: no layer has key heads")
    method = args.pipe_partition_method
    if method.startswith("type:") and not re.search(
        method.removeprefix("type:"), "ParallelMetaLALayerPipe", re.IGNORECASE
    ):
        refuse(
            "pipe_partition_method", method, "a pattern that matches metala layers, type:metala say"
        )
    return settings
