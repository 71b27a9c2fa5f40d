"""The description of a MetaLA model: its sizes and options, their names in GPT-NeoX's settings and
in a Hugging Face configuration, their defaults and their ranges.

The layers, the checks, the conversion and the FLOP count all read it. A new option of MetaLA layers
is one line in :class:`MetaLAOptions`. `architecture_neox.py` reads and writes GPT-NeoX's settings.

This file imports the standard library alone, because exported model folders carry a copy of it.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, NamedTuple, NoReturn

METALA = "metala"
# GPT-NeoX's names for causal softmax attention. They compute the same; an import writes the first.
SOFTMAX_TYPES = ("global", "flash")
# The layer types of transformers that an exported model can have.
HF_METALA, HF_ATTENTION = "linear_attention", "full_attention"
# GPT-NeoX's norms, each with the setting that holds its epsilon.
NORM_EPSILON = {
    "simplermsnorm": "rms_norm_epsilon",
    "rmsnorm": "rms_norm_epsilon",
    "layernorm": "layernorm_epsilon",
    "non_parametric_layernorm": "layernorm_epsilon",
    "scalenorm": "scalenorm_epsilon",
    "te_rmsnorm": "rms_norm_epsilon",
    "te_layernorm": "layernorm_epsilon",
}
# The norms that the Hugging Face model has.
EXPORTED_NORMS = ("simplermsnorm", "rmsnorm", "layernorm")
# The gain of the authors' Xavier-uniform initialisation of W_q and W_a.
QUERY_GATE_GAIN = 2**-2.5
# Layers are listed one by one, so a mistyped number must not fill the memory.
MAX_LAYERS = 10_000
MAX_WHOLE = 2**63 - 1


class SettingsError(ValueError):
    """A setting, or a combination of settings, that makes no sense. The message is one line: its
    name, what was found and what was wanted."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


def one_line(text: str) -> str:
    """Returns text that quotes foreign names and values as one line that a terminal can show."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= 4000 else f"{line[:4000]} ..."


class _ShortRepr(reprlib.Repr):
    """Limits the text of a value: YAML aliases can nest values without end, and Python refuses to
    print an integer of more than 4,300 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12
        self.maxstring = self.maxother = 300

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


shown = _ShortRepr().repr  # formats a value for an error message


def refuse(name: str, found: object, wanted: str) -> NoReturn:
    """Raises a SettingsError that names the setting, its value and the value wanted."""
    hint = yaml_number_hint(found) if "number" in wanted else ""
    raise SettingsError(f"{name}: found {shown(found)}, wanted {wanted}{hint}")


def yaml_number_hint(found: object) -> str:
    """Returns how to write a number that YAML 1.1 reads as text, "" for any other value. YAML 1.1
    wants a dot in the mantissa and a sign in the exponent: 1.0e-6, 3.0e+4."""
    pattern = r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?)(\d+)"
    match = re.fullmatch(pattern, found) if isinstance(found, str) else None
    if match is None:
        return ""
    mantissa, sign, exponent = match.groups()
    mantissa += "" if "." in mantissa else ".0"
    return f" (YAML reads it as text; {mantissa}e{sign or '+'}{exponent} is a number)"


class Kind(NamedTuple):
    """The values that a setting may have: their description, and the test for them."""

    wanted: str
    accepts: Callable[[Any], bool]


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MAX_WHOLE
    return isinstance(value, float) and math.isfinite(value)


def one_of(*values: str) -> Kind:
    """Returns the kind of a choice between words."""
    return Kind(f"one of {', '.join(values)}", lambda value: value in values)


def optional(kind: Kind) -> Kind:
    """Returns the kind that also accepts `None`."""
    return Kind(f"{kind.wanted}, or none", lambda value: value is None or kind.accepts(value))


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


def _described(kind: Kind, neox: str, hf: str, **default: Any) -> Any:
    """Declares a dataclass field with its kind and its names in GPT-NeoX and in Hugging Face."""
    return field(**default, metadata={"kind": kind, "neox": neox, "hf": hf})


def _option(default: Any, kind: Kind, of_model: bool = True) -> Any:
    return field(default=default, metadata={"kind": kind, "of_model": of_model})


def _hf_fields(described: Any) -> list[tuple[Any, str]]:
    return [(item, item.metadata["hf"]) for item in fields(described) if "hf" in item.metadata]


def _check_fields(instance: Any, side: str, prefix: str = "") -> None:
    """Refuses the first value that is not of its field's kind, and turns whole numbers of float
    fields into floats."""
    for item in fields(instance):
        kind, value = item.metadata.get("kind"), getattr(instance, item.name)
        if kind is not None and not kind.accepts(value):
            name = item.metadata.get(side) or item.name
            refuse(prefix + name, value, kind.wanted)
        if isinstance(value, int) and item.type.startswith("float"):
            object.__setattr__(instance, item.name, float(value))


@dataclass(frozen=True)
class MetaLAOptions:
    """The options of MetaLA layers: the keys under `metala:` in GPT-NeoX's settings, all optional.

    An option of the model itself has the same name in `MetaLAConfig`. The others (`of_model` false)
    concern training alone.

    Attributes:
        tau: divides the log decay: logsigmoid(gate logits) / tau.
        conv_width: kernel size of the causal depthwise convolution.
        expand_k: columns of queries and gate logits, as a multiple of the hidden size.
        self_augmentation: whether the read-out has the term sigmoid((q . (w * k)) v), w learned.
        output_norm_eps: epsilon of each head's LayerNorm.
        reset_at_document: whether state and convolution begin anew after each end-of-document token
            of a packed sample, and attention stays within a document.
        init: "authors": normal with init_method_std, Xavier-uniform with gain 2**-2.5 for queries
            and gate logits; "neox": init_method and output_layer_init_method.
        backend: implementation of the operator.
        cuda_graphs: "auto": a training step launches its layers as CUDA graphs where it can;
            "never".
        recompute: what the backward pass computes again, so that it is not kept: "cheap": norms and
            SwiGLU; "most": the convolution and the operator too; "nothing".
        context_parallel_size: ranks over which the tokens of each sequence are split.
    """

    tau: float = _option(16.0, POSITIVE)
    conv_width: int = _option(4, WHOLE)
    expand_k: float = _option(0.5, POSITIVE)
    self_augmentation: bool = _option(True, SWITCH)
    output_norm_eps: float = _option(1e-5, POSITIVE)
    reset_at_document: bool = _option(False, SWITCH)
    init: str = _option("authors", one_of("authors", "neox"), of_model=False)
    backend: str = _option("auto", TEXT, of_model=False)
    cuda_graphs: str = _option("auto", one_of("auto", "never"), of_model=False)
    recompute: str = _option("cheap", one_of("cheap", "most", "nothing"), of_model=False)
    context_parallel_size: int = _option(1, WHOLE, of_model=False)
    side: InitVar[str] = "neox"

    def __post_init__(self, side: str) -> None:
        _check_fields(self, side, "metala." if side == "neox" else "")

    @classmethod
    def parse(cls, mapping: Any) -> MetaLAOptions:
        """Returns the options in the mapping under `metala:`; `None` gives the defaults. Raises a
        SettingsError if a key is unknown or a value cannot be used."""
        names = [item.name for item in fields(cls)]
        known = ", ".join(names)
        if mapping is not None and not isinstance(mapping, Mapping):
            refuse("metala", mapping, f"a mapping of {known}")
        for key in mapping or {}:
            if key not in names:
                raise SettingsError(f"metala.{key}: unknown key, the known ones are {known}")
        return cls(**(mapping or {}))

    def of_model(self) -> dict[str, Any]:
        """Returns the options of the model itself, by name."""
        return {name: getattr(self, name) for name in MODEL_OPTIONS}


# The options of the model itself, with their defaults.
MODEL_OPTIONS = {
    item.name: item.default for item in fields(MetaLAOptions) if item.metadata["of_model"]
}


@dataclass(frozen=True)
class AttentionLayers:
    """The sizes and options of a hybrid's attention layers.

    Attributes:
        num_kv_heads: number of key heads, and of value heads.
        intermediate_size: width of the MLP in attention layers.
        has_bias, mlp_has_bias: whether the projections, and the MLP, have biases.
        rope_theta: base of the rotary embedding, `None` for no positions.
        partial_rotary_factor: fraction of a head's channels that are rotated.
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
        _check_fields(self, side)


@dataclass(frozen=True)
class Architecture:
    """The sizes and options of a model of MetaLA layers, or of a hybrid with other layers.

    Attributes:
        num_layers, hidden_size, num_heads: L, d and H.
        intermediate_size: width of the MLP in MetaLA layers.
        padded_vocab_size: rows of the embedding and of the head; `None` where not known yet.
        norm: GPT-NeoX's name of the norm.
        norm_eps: epsilon of the norm.
        tied: whether the head shares the embedding's weight.
        rewards: whether it is a reward model, whose head gives one number.
        init_std: standard deviation of new weights.
        metala: the options of the MetaLA layers.
        layer_types: GPT-NeoX's name of each layer's type; empty where all layers are MetaLA's.
        attention: the other layers' description, `None` where there are none.
        side: "neox" or "hf": whose names an error uses.

    Raises:
        SettingsError: a value cannot be used.
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
    rewards: bool = False
    metala: MetaLAOptions = MetaLAOptions()
    layer_types: tuple[str, ...] = ()
    attention: AttentionLayers | None = None
    side: InitVar[str] = "neox"

    def __post_init__(self, side: str) -> None:
        _check_fields(self, side)
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
            self._check_attention(self.attention, side, names["num_heads"])

    def _check_attention(self, attention: AttentionLayers, side: str, heads: str) -> None:
        names = {item.name: item.metadata.get(side) for item in fields(attention)}
        if self.num_heads % attention.num_kv_heads:
            wanted = f"a divisor of {heads} = {self.num_heads}"
            refuse(names["num_kv_heads"], attention.num_kv_heads, wanted)
        rotated = self.value_width * attention.partial_rotary_factor
        rotated = self.rotary_width if rotated <= self.value_width else rotated
        is_usable = rotated % 2 == 0 and 2 <= rotated <= self.value_width
        if attention.rope_theta is not None and not is_usable:
            raise SettingsError(
                f"{names['partial_rotary_factor']}: found {attention.partial_rotary_factor}, which "
                f"rotates {rotated:g} of a head's {self.value_width} channels, wanted an even "
                "number of them"
            )

    @property
    def key_width(self) -> int:
        """K: the columns of one head's queries, and of its gate logits."""
        return round(self.metala.expand_k * self.hidden_size / self.num_heads)

    @property
    def value_width(self) -> int:
        """V: the columns of one head's values, and of its output gate."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_width(self) -> int:
        """The channels of an attention head that the rotary embedding rotates."""
        return int(self.value_width * self.attention.partial_rotary_factor)

    def is_attention(self, block: int) -> bool:
        """Returns whether a block is not one of MetaLA's."""
        return bool(self.layer_types) and self.layer_types[block] != METALA

    @classmethod
    def from_hf(cls, config: Any) -> Architecture:
        """Returns the description of the model that a `MetaLAConfig` builds. Raises a SettingsError
        if a value cannot be used; the line names the configuration's key."""
        types: tuple[str, ...] = ()
        if config.layer_types is not None:
            known = {HF_METALA: METALA, HF_ATTENTION: SOFTMAX_TYPES[0]}
            given, count = config.layer_types, config.decoder_layers
            if not isinstance(given, (list, tuple)) or len(given) != count:
                refuse("layer_types", given, f"decoder_layers = {shown(count)} entries")
            found = [known.get(kind) if isinstance(kind, str) else None for kind in given]
            if None in found:
                refuse("layer_types", given[found.index(None)], f"one of {', '.join(known)}")
            types = tuple(found) if set(found) != {METALA} else ()

        def read(described: type) -> dict[str, Any]:
            return {item.name: getattr(config, hf) for item, hf in _hf_fields(described)}

        options = {name: getattr(config, name) for name in MODEL_OPTIONS}
        return cls(
            **read(cls),
            metala=MetaLAOptions(**options, side="hf"),
            layer_types=types,
            attention=AttentionLayers(**read(AttentionLayers), side="hf") if types else None,
            side="hf",
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the keys of `MetaLAConfig`; those of attention layers only for a hybrid."""

        def written(instance: Any) -> dict[str, Any]:
            return {hf: getattr(instance, item.name) for item, hf in _hf_fields(instance)}

        keys = {**written(self), **self.metala.of_model()}
        if self.attention:
            blocks = range(self.num_layers)
            keys |= written(self.attention)
            keys["layer_types"] = [
                HF_ATTENTION if self.is_attention(block) else HF_METALA for block in blocks
            ]
        # GPT-NeoX's MetaLA layers have no biases in their MLP, and it does not scale embeddings.
        return {**keys, "glu_act": "silu", "bias": False, "no_scale_embedding": True}
