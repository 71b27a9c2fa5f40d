"""The one description of a MetaLA model: sizes and options, their names in GPT-NeoX's settings and
in a Hugging Face configuration, their defaults and ranges, and what can be exported.

Checks before a training, the layers, conversion both ways, the Hugging Face configuration and the
FLOP count all read it. A new option of MetaLA layers is one line in :class:`MetaLAOptions`.

This file needs Python's standard library alone: exported model folders carry a copy.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

METALA = "metala"
# GPT-NeoX's types of causal softmax attention with one mathematics; the first is written.
SOFTMAX_TYPES = ("global", "flash")
# GPT-NeoX's types that are not its ordinary transformer layer with another attention.
OTHER_BLOCKS = ("gmlp", "amlp", "rwkv", "mamba")
# transformers' names of the two types that can be exported.
HF_METALA, HF_ATTENTION = "linear_attention", "full_attention"
# GPT-NeoX's setting of each norm's epsilon, and the norms that the Hugging Face model has.
NORM_EPSILON = {
    "simplermsnorm": "rms_norm_epsilon",
    "rmsnorm": "rms_norm_epsilon",
    "layernorm": "layernorm_epsilon",
    "non_parametric_layernorm": "layernorm_epsilon",
    "scalenorm": "scalenorm_epsilon",
    "te_rmsnorm": "rms_norm_epsilon",
    "te_layernorm": "layernorm_epsilon",
}
EXPORTED_NORMS = ("simplermsnorm", "rmsnorm", "layernorm")
# Gain of the authors' Xavier-uniform initialisation of queries and gate logits.
QUERY_GATE_GAIN = 2**-2.5


# Far beyond any model: layers are listed one by one, which must end.
MAX_LAYERS = 10_000
MAX_WHOLE = 2**63 - 1


class SettingsError(ValueError):
    """A setting, or a combination of settings, with which a MetaLA model or run makes no sense."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


def one_line(text: str) -> str:
    """Text that holds names and values of others as one line that a terminal can show."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= 4000 else f"{line[:4000]} ..."


class _Shown(reprlib.Repr):
    """Values may be nested into each other so often that their text has no end, or be numbers of
    more digits than Python writes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12
        self.maxstring = self.maxother = 300

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


shown = _Shown().repr  # a value as errors show it


def refuse(name: str, found: object, wanted: str) -> None:
    """Raises a SettingsError of one line."""
    hint = ""
    if isinstance(found, str) and "number" in wanted and _reads_as_number(found):
        hint = " (text to YAML; a number such as 1e-6 needs a dot there: 1.0e-6)"
    raise SettingsError(f"{name}: found {shown(found)}, wanted {wanted}{hint}")


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Kind(NamedTuple):
    """What a value may be, in words and as a test."""

    wanted: str
    accepts: Callable[[Any], bool]


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MAX_WHOLE
    return isinstance(value, float) and math.isfinite(value)


def one_of(*values: str) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(values)}", lambda value: value in values)


WHOLE = Kind(
    "a whole number of at least 1",
    lambda value: isinstance(value, int) and _is_finite(value) and value >= 1,
)
LAYERS = Kind(
    f"a whole number from 1 to {MAX_LAYERS:,}",
    lambda value: WHOLE.accepts(value) and value <= MAX_LAYERS,
)
POSITIVE = Kind("a number above 0", lambda value: _is_finite(value) and value > 0)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))


def optional(kind: Kind) -> Kind:
    """The same or nothing."""
    return Kind(f"{kind.wanted}, or none", lambda value: value is None or kind.accepts(value))


def _described(kind: Kind | None, neox: str, hf: str | None, **default: Any) -> Any:
    """A field with its kind and its names on both sides (`hf` is `None` where it has none)."""
    return field(**default, metadata={"kind": kind, "neox": neox, "hf": hf})


def _option(default: Any, kind: Kind, about: str, of_model: bool = True) -> Any:
    return field(default=default, metadata={"kind": kind, "about": about, "of_model": of_model})


def _check_kinds(instance: Any, side: str, prefix: str = "") -> None:
    """Refuses the first value that is not of its field's kind; whole numbers become floats."""
    for item in fields(instance):
        kind, value = item.metadata.get("kind"), getattr(instance, item.name)
        if kind is not None and not kind.accepts(value):
            name = item.metadata.get(side) or item.name
            refuse(prefix + name, value, kind.wanted)
        if isinstance(value, int) and item.type.startswith("float"):
            object.__setattr__(instance, item.name, float(value))


@dataclass(frozen=True)
class MetaLAOptions:
    """The options of MetaLA layers: the keys under `metala:` in GPT-NeoX's settings, each optional.

    Options of the model itself have the same name in `MetaLAConfig`; the others (`of_model` false)
    concern a training alone.
    """

    tau: float = _option(16.0, POSITIVE, "divides the log decay: logsigmoid(gate logits) / tau")
    conv_width: int = _option(4, WHOLE, "kernel size of the causal depthwise convolution")
    expand_k: float = _option(
        0.5, POSITIVE, "columns of queries and gate logits, as a multiple of the hidden size"
    )
    self_augmentation: bool = _option(
        True, SWITCH, "whether the read-out has the term sigmoid((q . (w * k)) v), w learned"
    )
    output_norm_eps: float = _option(1e-5, POSITIVE, "epsilon of each head's LayerNorm")
    init: str = _option(
        "authors",
        one_of("authors", "neox"),
        "'authors': normal with init_method_std, Xavier-uniform with gain 2**-2.5 for queries and "
        "gate logits; 'neox': init_method and output_layer_init_method",
        of_model=False,
    )
    backend: str = _option("auto", TEXT, "implementation of the operator", of_model=False)
    side: InitVar[str] = "neox"

    def __post_init__(self, side: str) -> None:
        _check_kinds(self, side, "metala." if side == "neox" else "")

    @classmethod
    def parse(cls, mapping: Any) -> MetaLAOptions:
        """Options from the mapping under `metala:`, the defaults for `None`.

        Raises:
            SettingsError: names the key, what was found and what was wanted.
        """
        known = ", ".join(item.name for item in fields(cls))
        if mapping is not None and not isinstance(mapping, Mapping):
            refuse("metala", mapping, f"a mapping of {known}")
        for key in mapping or {}:
            if key not in {item.name for item in fields(cls)}:
                raise SettingsError(f"metala.{key}: unknown key, the known ones are {known}")
        return cls(**(mapping or {}))

    def of_model(self) -> dict[str, Any]:
        """The options of the model itself, by name."""
        return {name: getattr(self, name) for name in MODEL_OPTIONS}


# The names of a model's own options, with their defaults.
MODEL_OPTIONS = {
    item.name: item.default for item in fields(MetaLAOptions) if item.metadata["of_model"]
}


@dataclass(frozen=True)
class AttentionLayers:
    """Sizes and options of the attention layers of a hybrid.

    Attributes:
        num_kv_heads: heads of keys and of values.
        intermediate_size: width of their MLP.
        has_bias, mlp_has_bias: whether the projections, and the MLP's, have biases.
        rope_theta: base of the rotary positions, `None` for no positions.
        partial_rotary_factor: share of a head's channels that are rotated.
    """

    num_kv_heads: int = _described(WHOLE, "num_kv_heads", "num_key_value_heads")
    intermediate_size: int = _described(WHOLE, "intermediate_size", "attention_glu_dim")
    has_bias: bool = _described(SWITCH, "use_bias_in_attn_linear", "attention_bias")
    mlp_has_bias: bool = _described(SWITCH, "use_bias_in_mlp", "attention_glu_bias")
    rope_theta: float | None = _described(
        optional(POSITIVE), "rotary_emb_base", "rope_theta", default=None
    )
    partial_rotary_factor: float = _described(
        POSITIVE, "rotary_pct", "partial_rotary_factor", default=1.0
    )
    side: InitVar[str] = "neox"

    def __post_init__(self, side: str) -> None:
        _check_kinds(self, side)


@dataclass(frozen=True)
class Architecture:
    """Sizes and options of a model of MetaLA layers, or of a hybrid with other layers.

    Attributes:
        num_layers, hidden_size, num_heads: L, d and H.
        intermediate_size: width of the MLP of MetaLA layers.
        padded_vocab_size: rows of the embedding and of the head; `None` where not known yet.
        norm: GPT-NeoX's name of the norm.
        norm_eps: its epsilon.
        tied: whether the head is the embedding.
        init_std: standard deviation of new weights.
        metala: the options of the MetaLA layers.
        layer_types: each layer's type by GPT-NeoX's name; empty for MetaLA layers alone.
        attention: of the other layers, `None` where there are none.

    Raises:
        SettingsError: a value cannot be used. It is named as `side` names it, "neox" or "hf".
    """

    num_layers: int = _described(LAYERS, "num_layers", "decoder_layers")
    hidden_size: int = _described(WHOLE, "hidden_size", "decoder_embed_dim")
    num_heads: int = _described(WHOLE, "num_attention_heads", "decoder_attention_heads")
    intermediate_size: int = _described(WHOLE, "intermediate_size", "glu_dim")
    padded_vocab_size: int | None = _described(
        optional(WHOLE), "padded_vocab_size", "vocab_size", default=None
    )
    norm: str = _described(one_of(*NORM_EPSILON), "norm", "norm_type", default="simplermsnorm")
    norm_eps: float = _described(POSITIVE, "rms_norm_epsilon", "norm_eps", default=1e-6)
    tied: bool = _described(SWITCH, "no_weight_tying", "tie_word_embeddings", default=False)
    init_std: float = _described(POSITIVE, "init_method_std", "init_std", default=0.02)
    metala: MetaLAOptions = MetaLAOptions()
    layer_types: tuple[str, ...] = ()
    attention: AttentionLayers | None = None
    side: InitVar[str] = "neox"

    def __post_init__(self, side: str) -> None:
        _check_kinds(self, side)
        names = {item.name: item.metadata.get(side) for item in fields(self)}
        if side == "hf":
            if self.norm not in EXPORTED_NORMS:
                refuse(names["norm"], self.norm, one_of(*EXPORTED_NORMS).wanted)
            if self.padded_vocab_size is None:
                refuse(names["padded_vocab_size"], None, WHOLE.wanted)
        if self.hidden_size % self.num_heads:
            wanted = f"a multiple of {names['num_heads']} = {self.num_heads}"
            refuse(names["hidden_size"], self.hidden_size, wanted)
        columns = self.metala.expand_k * self.hidden_size / self.num_heads
        is_whole = columns <= MAX_WHOLE and math.isclose(columns, round(columns), rel_tol=1e-6)
        if not is_whole or round(columns) < 1:
            expand_k = "metala.expand_k" if side == "neox" else "expand_k"
            raise SettingsError(
                f"{names['hidden_size']}: found {self.hidden_size}, with {expand_k} = "
                f"{self.metala.expand_k} and {names['num_heads']} = {self.num_heads}: {columns:g} "
                "columns for a head's keys, wanted a whole number of them"
            )
        if self.attention:
            self._check_attention(self.attention, side)

    def _check_attention(self, of: AttentionLayers, side: str) -> None:
        names = {item.name: item.metadata.get(side) for item in fields(of)}
        if self.num_heads % of.num_kv_heads:
            heads = "num_attention_heads" if side == "neox" else "decoder_attention_heads"
            wanted = f"a divisor of {heads} = {self.num_heads}"
            refuse(names["num_kv_heads"], of.num_kv_heads, wanted)
        rotated = self.value_width * of.partial_rotary_factor
        rotated = self.rotary_width if rotated <= self.value_width else rotated
        if of.rope_theta is not None and (rotated % 2 or not 2 <= rotated <= self.value_width):
            raise SettingsError(
                f"{names['partial_rotary_factor']}: found {of.partial_rotary_factor}, which "
                f"rotates {rotated:g} of a head's {self.value_width} channels, wanted an even "
                "number of them"
            )

    @property
    def key_width(self) -> int:
        """K: columns of one head's queries, and of its gate logits."""
        return round(self.metala.expand_k * self.hidden_size / self.num_heads)

    @property
    def value_width(self) -> int:
        """V: columns of one head's values, and of its output gate."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_width(self) -> int:
        """Channels of an attention head that are rotated where there are positions."""
        return int(self.value_width * self.attention.partial_rotary_factor)

    def is_attention(self, block: int) -> bool:
        """Whether a block is none of MetaLA."""
        return bool(self.layer_types) and self.layer_types[block] != METALA

    # ---- GPT-NeoX

    @classmethod
    def from_neox(cls, settings: Any, padded_vocab_size: int | None = None) -> Architecture:
        """The model that GPT-NeoX's settings describe.

        Args:
            settings: has them as attributes: GPT-NeoX's own object, or that of `with_defaults`.
            padded_vocab_size: rows of the embedding over all tensor-parallel ranks.

        Raises:
            SettingsError: they describe none; the line names the setting.
        """
        for item in fields(cls)[:3]:  # the sizes that have no default
            name, kind = item.metadata["neox"], item.metadata["kind"]
            if not kind.accepts(getattr(settings, name)):
                refuse(name, getattr(settings, name), kind.wanted)
        layer_types = expand_attention_config(settings.attention_config, settings.num_layers)
        if METALA not in layer_types:
            raise SettingsError("attention_config: found no layer of type metala, wanted one")
        if not one_of(*NORM_EPSILON).accepts(settings.norm):
            refuse("norm", settings.norm, one_of(*NORM_EPSILON).wanted)
        epsilon = NORM_EPSILON[settings.norm]
        if not POSITIVE.accepts(getattr(settings, epsilon)):
            refuse(epsilon, getattr(settings, epsilon), POSITIVE.wanted)
        return cls(
            num_layers=settings.num_layers,
            hidden_size=settings.hidden_size,
            num_heads=settings.num_attention_heads,
            intermediate_size=metala_intermediate_size(settings),
            padded_vocab_size=padded_vocab_size,
            norm=settings.norm,
            norm_eps=getattr(settings, epsilon),
            tied=not settings.no_weight_tying,
            init_std=settings.init_method_std,
            metala=MetaLAOptions.parse(settings.metala),
            layer_types=tuple(layer_types) if set(layer_types) != {METALA} else (),
            attention=_attention_of_neox(settings, set(layer_types) - {METALA}),
        )

    def to_neox(self) -> dict[str, Any]:
        """GPT-NeoX's settings of the model, without layout and files.

        Raises:
            SettingsError: GPT-NeoX has no settings for it; named as in a Hugging Face
                configuration.
        """
        settings = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "attention_config": list(self.layer_types) or [[[METALA], self.num_layers]],
            METALA: {**self.metala.of_model(), "init": "authors"},
            "norm": self.norm,
            NORM_EPSILON[self.norm]: self.norm_eps,
            "activation": "swiglu",
            "pos_emb": "none",
            "no_weight_tying": not self.tied,
            "init_method": "normal",
            "output_layer_init_method": "normal",
            "init_method_std": self.init_std,
        }
        return settings | self._attention_to_neox(settings)

    def _attention_to_neox(self, settings: dict[str, Any]) -> dict[str, Any]:
        of = self.attention
        if of is None:
            return {}
        if METALA not in self.layer_types:
            raise SettingsError("layer_types: found no linear_attention, wanted at least one")
        found: dict[str, Any] = {
            "num_kv_heads": of.num_kv_heads,
            "use_bias_in_attn_linear": of.has_bias,
            "use_bias_in_mlp": of.mlp_has_bias,
            **self._mlp_widths_in_neox(of),
        }
        if of.rope_theta is not None:
            if not float(of.rope_theta).is_integer():
                refuse("rope_theta", of.rope_theta, "a whole number")
            found |= {
                "pos_emb": "rotary",
                "rotary_emb_base": int(of.rope_theta),
                "rotary_pct": of.partial_rotary_factor,
            }
        return found

    def _mlp_widths_in_neox(self, of: AttentionLayers) -> dict[str, Any]:
        """The settings that give MLPs of MetaLA and of attention layers their widths: GPT-NeoX
        rounds a third of `intermediate_size` up to a multiple of `mlp_multiple_of`, or both have
        their defaults."""
        widths = (self.intermediate_size, of.intermediate_size)
        for size in (self.intermediate_size, None):
            settings = {"intermediate_size": size, "mlp_multiple_of": of.intermediate_size}
            args = SimpleNamespace(hidden_size=self.hidden_size, expansion_factor=None, **settings)
            try:
                if (metala_intermediate_size(args), attention_intermediate_size(args)) == widths:
                    return settings
            except SettingsError:
                continue
        raise SettingsError(
            f"attention_glu_dim: found {of.intermediate_size}, which no settings of GPT-NeoX give "
            f"beside glu_dim = {self.intermediate_size}, wanted at least a third of it"
        )

    # ---- Hugging Face

    @classmethod
    def from_hf(cls, config: Any) -> Architecture:
        """The model that a `MetaLAConfig` describes.

        Raises:
            SettingsError: a value cannot be used; the line names the configuration's key.
        """
        types: tuple[str, ...] = ()
        if config.layer_types is not None:
            known = {HF_METALA: METALA, HF_ATTENTION: SOFTMAX_TYPES[0]}
            given, count = config.layer_types, config.decoder_layers
            if not isinstance(given, (list, tuple)) or len(given) != count:
                refuse("layer_types", given, f"decoder_layers = {shown(count)} entries")
            found = [known.get(kind) if isinstance(kind, str) else None for kind in given]
            if None in found:
                refuse("layer_types", given[found.index(None)], f"one of {', '.join(known)}")
            types = tuple(found)
            if set(types) == {METALA}:
                types = ()

        def read(described: type) -> dict[str, Any]:
            named = [item for item in fields(described) if item.metadata.get("hf")]
            return {item.name: getattr(config, item.metadata["hf"]) for item in named}

        options = {name: getattr(config, name) for name in MODEL_OPTIONS}
        return cls(
            **read(cls),
            metala=MetaLAOptions(**options, side="hf"),
            layer_types=types,
            attention=AttentionLayers(**read(AttentionLayers), side="hf") if types else None,
            side="hf",
        )

    def to_hf(self) -> dict[str, Any]:
        """The keys of `MetaLAConfig`; those of hybrids only where this is one."""

        def written(instance: Any) -> dict[str, Any]:
            named = [item for item in fields(instance) if item.metadata.get("hf")]
            return {item.metadata["hf"]: getattr(instance, item.name) for item in named}

        keys = {**written(self), **self.metala.of_model()}
        if self.attention:
            blocks = range(self.num_layers)
            keys |= written(self.attention)
            keys["layer_types"] = [
                HF_ATTENTION if self.is_attention(block) else HF_METALA for block in blocks
            ]
        # What GPT-NeoX does: it has no biases in these MLPs and does not scale embeddings.
        return {**keys, "glu_act": "silu", "bias": False, "no_scale_embedding": True}


# ---- What GPT-NeoX's settings mean

# GPT-NeoX's values for the settings of a model that YAML files leave out.
GPT_NEOX_DEFAULTS = {
    "activation": "gelu",
    "apply_query_key_layer_scaling": False,
    "attention_config": None,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "expansion_factor": None,
    "gmlp_attn_dim": 64,
    "gpt_j_residual": False,
    "gpt_j_tied": False,
    "init_method": "normal",
    "init_method_std": 0.02,
    "intermediate_size": None,
    "layernorm_epsilon": 1e-5,
    "layernorm_fusion": False,
    "make_vocab_size_divisible_by": 128,
    "mlp_multiple_of": 1,
    "model_parallel_size": 1,
    "moe_num_experts": 1,
    "no_weight_tying": False,
    "norm": "layernorm",
    "num_kv_heads": None,
    "num_unique_layers": None,
    "opt_pos_emb_offset": 0,
    "output_layer_init_method": "scaled_normal",
    "pipe_parallel_size": 0,
    "pipe_partition_method": "type:transformer|mlp",
    "pos_emb": "learned",
    "rms_norm_epsilon": 1e-8,
    "rmsnorm_fusion": False,
    "rope_fusion": False,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "rotary_save_freqs_buffer": False,
    "rpe_max_distance": 128,
    "rpe_num_buckets": 32,
    "scaled_masked_softmax_fusion": False,
    "scaled_upper_triang_masked_softmax_fusion": False,
    "scalenorm_epsilon": 1e-8,
    "sequence_parallel": False,
    "sliding_window_width": None,
    "sparsity_config": None,
    "te_columnparallel": False,
    "te_fp8_mha": False,
    "te_layernorm_mlp": False,
    "te_mha": False,
    "te_rowparallel": False,
    "tokenizer_type": "GPT2BPETokenizer",
    "use_bias_in_attn_linear": True,
    "use_bias_in_mlp": True,
    "use_flashattn_swiglu": False,
    "use_mup": False,
    "use_qk_layernorm": False,
    "vocab_file": None,
}


# Of settings that describe no model but are read with it.
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
    """Settings of YAML files as attributes, GPT-NeoX's defaults filled in.

    Raises:
        SettingsError: a size that has no default is missing, or a size is no positive whole number.
    """
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


def expand_attention_config(attention_config: Any, num_layers: int) -> list[str]:
    """One layer type per layer from GPT-NeoX's shorthand, e.g. `[[["metala", "global"], 8]]`.

    Raises:
        SettingsError: the shorthand is malformed, or gives another number of layers.
    """
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


def _check_mlp_settings(settings: Any) -> None:
    for name, kind in (("intermediate_size", WHOLE), ("expansion_factor", POSITIVE)):
        if not optional(kind).accepts(getattr(settings, name)):
            refuse(name, getattr(settings, name), kind.wanted)


def _expanded(settings: Any) -> int:
    width = settings.expansion_factor * settings.hidden_size
    if not 1 <= width <= MAX_WHOLE:
        refuse("expansion_factor", settings.expansion_factor, "one that gives an MLP of some width")
    return int(width)


def metala_intermediate_size(settings: Any) -> int:
    """Width f of a MetaLA block's MLP: `intermediate_size`, else `expansion_factor` times the
    hidden size, else 8/3 of it rounded up to a multiple of 256 (2816 for 1024, as in the authors'
    0.38B).

    Raises:
        SettingsError: one of the two is no positive number.
    """
    _check_mlp_settings(settings)
    if settings.intermediate_size:
        return settings.intermediate_size
    if settings.expansion_factor:
        return _expanded(settings)
    return -(-8 * settings.hidden_size // (3 * 256)) * 256


def attention_intermediate_size(settings: Any) -> int:
    """Width of the gated MLP that GPT-NeoX gives the attention layers of a hybrid: a third of
    `intermediate_size` (else of `expansion_factor` times the hidden size, else of four times it),
    rounded up to a multiple of `mlp_multiple_of`.

    Raises:
        SettingsError: GPT-NeoX's roundings do not meet, its two matrices would not fit each other.
    """
    _check_mlp_settings(settings)
    multiple = settings.mlp_multiple_of
    if not WHOLE.accepts(multiple):
        refuse("mlp_multiple_of", multiple, WHOLE.wanted)
    if settings.intermediate_size:
        total = settings.intermediate_size
    elif settings.expansion_factor:
        total = _expanded(settings)
    else:
        total = 4 * settings.hidden_size
    gate_and_up = int(total * 2 / 3)
    width = -(-(gate_and_up // 2) // multiple) * multiple
    if 2 * width != -(-gate_and_up // (2 * multiple)) * 2 * multiple:
        raise SettingsError(
            f"mlp_multiple_of: found {multiple} with an MLP of {total}, of which GPT-NeoX cannot "
            "build the attention layers' third, wanted the width that theirs should have"
        )
    return width


def _attention_of_neox(settings: Any, types: set[str]) -> AttentionLayers | None:
    if not types:
        return None
    blocks = types - set(OTHER_BLOCKS)
    return AttentionLayers(
        num_kv_heads=settings.num_kv_heads or settings.num_attention_heads,
        # Layers that are no transformer blocks have an MLP of their own, or none.
        intermediate_size=attention_intermediate_size(settings)
        if blocks
        else metala_intermediate_size(settings),
        has_bias=settings.use_bias_in_attn_linear,
        mlp_has_bias=settings.use_bias_in_mlp,
        rope_theta=settings.rotary_emb_base if settings.pos_emb == "rotary" else None,
        partial_rotary_factor=settings.rotary_pct,
    )


# What a setting must be, so that the model can be exported: in any model, and in one with attention
# layers.
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


def export_obstacles(settings: Any) -> list[tuple[str, str, str]]:
    """Why the Hugging Face model has no counterpart of a model: (setting, what was found, what was
    wanted) of each obstacle. The converter refuses by it, and a training says it at its start.

    Args:
        settings: GPT-NeoX's, of a model that `Architecture.from_neox` describes.
    """
    layer_types = expand_attention_config(settings.attention_config, settings.num_layers)
    known = (METALA, *SOFTMAX_TYPES)
    obstacles = []
    if others := [f"{i} ({kind})" for i, kind in enumerate(layer_types) if kind not in known]:
        listed = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        obstacles.append(("attention_config", f"layers {listed}", ", ".join(known)))
    table = dict(EXPORTED)
    if set(layer_types) != {METALA}:
        table |= EXPORTED_WITH_ATTENTION
    for name, values in table.items():
        if (found := getattr(settings, name)) not in values:
            obstacles.append((name, shown(found), " or ".join(map(str, values))))
    return obstacles


def tokenizer_obstacles(settings: Any) -> list[tuple[str, str, str]]:
    """The same for the tokenizer: the converter reads `vocab_file` of two types, and must be given
    the tokenizer's Hugging Face form where a run has another."""
    known = ("HFTokenizer", "HFGPT2Tokenizer")
    if settings.tokenizer_type.lower() in map(str.lower, known) and settings.vocab_file:
        return []
    found = f"{shown(settings.tokenizer_type)} with vocab_file {settings.vocab_file}"
    wanted = f"{known[0]} with a tokenizer.json (else give one by --tokenizer at export)"
    return [("tokenizer_type", found, wanted)]
