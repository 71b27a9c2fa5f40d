"""The description of a model: from and to GPT-NeoX's settings and Hugging Face configurations, what
either side refuses, and where a new option has to be added."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from megatron_patch.architecture import (
    MODEL_OPTIONS,
    Architecture,
    AttentionLayers,
    MetaLAOptions,
    SettingsError,
)
from megatron_patch.architecture_neox import (
    GPT_NEOX_DEFAULTS,
    attention_intermediate_size,
    expand_attention_config,
    from_neox,
    metala_intermediate_size,
    to_neox,
    why_not_exportable,
    with_defaults,
)
from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM

SIZES = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 96}
PURE = {
    **SIZES,
    "norm": "simplermsnorm",
    "pos_emb": "none",
    "activation": "swiglu",
    "attention_config": [[["metala"], 4]],
}
HYBRID = {**PURE, "attention_config": [[["metala", "flash"], 2]]}


def described(settings: dict) -> Architecture:
    return from_neox(with_defaults(settings), 96)


@pytest.mark.parametrize(
    "settings",
    [
        PURE,
        {**PURE, "metala": {"expand_k": 1.0, "tau": 8, "self_augmentation": False}},
        {**PURE, "norm": "layernorm", "layernorm_epsilon": 1e-4},
        {**PURE, "norm": "rmsnorm", "no_weight_tying": True, "init_method_std": 0.01},
        HYBRID,
        {**HYBRID, "pos_emb": "rotary", "rotary_pct": 0.25, "rotary_emb_base": 500},
        {**HYBRID, "num_kv_heads": 2, "use_bias_in_mlp": False, "mlp_multiple_of": 40},
        # The default widths: 256 beside 64, less than a third of it.
        {**HYBRID, "hidden_size": 48, "intermediate_size": None},
        {**HYBRID, "hidden_size": 48, "intermediate_size": None, "mlp_multiple_of": 8},
    ],
)
def test_a_model_goes_there_and_back(settings):
    """From settings to a configuration and back to settings, the model stays the same."""
    model = described(settings)
    config = MetaLAConfig(**model.to_hf())
    again = Architecture.from_hf(config)
    if model.attention:  # flash is written as global
        model = dataclasses.replace(model, layer_types=("metala", "global") * 2)
        if model.attention.rope_theta is None:
            attention = dataclasses.replace(again.attention, partial_rotary_factor=1.0)
            again = dataclasses.replace(again, attention=attention)
    assert again == model
    assert described(to_neox(again)) == model


@pytest.mark.parametrize(("expand_k", "heads"), [(0.5, 4), (1.0, 4), (0.25, 2), (1 / 3, 2)])
def test_expand_k_is_the_key_columns_share_of_the_width(expand_k, heads):
    config = MetaLAConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=heads,
        intermediate_size=32, expand_k=expand_k,
    )  # fmt: skip
    mixer = MetaLAForCausalLM(config).model.layers[0].token_mixer
    columns = round(expand_k * 48)
    assert mixer.q_proj.out_features == mixer.k_gate.out_features == columns
    assert mixer.aug_balance.shape == (columns,)
    assert mixer.scale == pytest.approx((columns / heads) ** -0.5)
    assert Architecture.from_hf(config).key_width == columns // heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 20}, r"hidden_size: found 20, with metala.expand_k = 0.5 .*: 2.5 columns"),
        ({"metala": {"expand_k": 0.3}}, "metala.expand_k = 0.3 and num_attention_heads = 4: 2.4"),
        ({"num_attention_heads": 5}, "hidden_size: found 32, wanted a multiple of .* = 5"),
        ({"num_attention_heads": "4"}, "num_attention_heads: found '4', wanted a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0, wanted a whole number"),
        ({"num_layers": True}, "num_layers: found True, wanted a whole number"),
        ({"hidden_size": -32}, "hidden_size: found -32, wanted a whole number"),
        ({"intermediate_size": "wide"}, "intermediate_size: found 'wide', wanted a whole number"),
        ({"intermediate_size": None, "expansion_factor": -1.0}, "expansion_factor: found -1.0"),
        ({"norm": "RMSNorm"}, "norm: found 'RMSNorm', wanted one of simplermsnorm, rmsnorm"),
        ({"rms_norm_epsilon": "1e-6"}, r"found '1e-6', wanted a number .*YAML .*; 1\.0e-6"),
        ({"rms_norm_epsilon": -1e-6}, "rms_norm_epsilon: found -1e-06, wanted a number above 0"),
        ({"init_method_std": math.nan}, "init_method_std: found nan, wanted a number above 0"),
        ({"attention_config": None}, "attention_config: found no layer of type metala"),
        ({"attention_config": [[["metala"], 10**11]]}, "found 100000000000 layers, wanted num_lay"),
        ({"attention_config": [[["metala"], -1]]}, r"found \[\['metala'\], -1\], wanted"),
        ({"attention_config": [[[["metala"]], 4]]}, "attention_config: found .*, wanted"),
    ],
)
def test_impossible_models_are_named_as_gpt_neox_names_them(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        described({**PURE, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_multiple_of": 0}, "mlp_multiple_of: found 0, wanted a whole number"),
        ({"mlp_multiple_of": "8"}, "mlp_multiple_of: found '8', wanted a whole number"),
        ({"num_kv_heads": 3}, "num_kv_heads: found 3, wanted a divisor of num_attention_heads = 4"),
        ({"pos_emb": "rotary", "rotary_pct": 0.4}, "rotary_pct: found 0.4, which rotates 3 of"),
        ({"pos_emb": "rotary", "rotary_pct": 0.1}, "rotary_pct: found 0.1, which rotates 0 of"),
        ({"pos_emb": "rotary", "rotary_pct": 1.5}, "rotary_pct: found 1.5, which rotates 12 of"),
        ({"pos_emb": "rotary", "rotary_emb_base": 0}, "rotary_emb_base: found 0, wanted a number"),
    ],
)
def test_impossible_hybrids_are_named(changes, message):
    with pytest.raises(SettingsError, match=message):
        described({**HYBRID, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_glu_dim": 8}, "attention_glu_dim: found 8, .* third of it"),
        ({"rope_theta": 10.5}, "rope_theta: found 10.5, wanted a whole number"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: found no linear_attention"),
    ],
)
def test_what_gpt_neox_has_no_settings_for(changes, message):
    hybrid = {"decoder_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    sizes = {"decoder_embed_dim": 32, "decoder_attention_heads": 4, "glu_dim": 40}
    config = MetaLAConfig(**{**sizes, **hybrid, **changes})
    with pytest.raises(SettingsError, match=message):
        to_neox(Architecture.from_hf(config))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"tua": 8}, r"metala\.tua: unknown key, the known ones are tau, conv_width, expand_k"),
        ({"tau": "big"}, r"metala\.tau: found 'big', wanted a number above 0$"),
        ({"tau": math.inf}, r"metala\.tau: found inf, wanted a number above 0"),
        ({"tau": True}, r"metala\.tau: found True, wanted a number above 0"),
        ({"output_norm_eps": math.nan}, r"metala\.output_norm_eps: found nan, wanted a number"),
        (
            {"output_norm_eps": "1e-5"},
            r"metala\.output_norm_eps: .*YAML reads it as text; 1\.0e-5 is a number",
        ),
        ({"conv_width": 0}, r"metala\.conv_width: found 0, wanted a whole number of at least 1"),
        ({"conv_width": 4.0}, r"metala\.conv_width: found 4.0"),
        ({"expand_k": 0}, r"metala\.expand_k: found 0"),
        ({"self_augmentation": 1}, r"metala\.self_augmentation: found 1, wanted true or false"),
        ({"init": "xavier"}, r"metala\.init: found 'xavier', wanted one of authors, neox"),
        (16, "metala: found 16, wanted a mapping of tau"),
    ],
)
def test_wrong_options_are_named(mapping, message):
    with pytest.raises(SettingsError, match=message):
        MetaLAOptions.parse(mapping)


def test_the_initialisation_is_the_authors_by_default():
    assert MetaLAOptions.parse(None).init == MetaLAOptions.parse({}).init == "authors"


def test_every_option_of_a_model_is_in_its_configuration():
    """A new option is one line in `MetaLAOptions`; configuration and conversion pick it up."""
    of_training = {"init", "backend", "cuda_graphs", "recompute", "context_parallel_size"}
    names = {item.name for item in dataclasses.fields(MetaLAOptions)}
    assert set(MODEL_OPTIONS) | of_training == names
    changed = {"tau": 8.0, "conv_width": 3, "expand_k": 1.0, "output_norm_eps": 1e-4}
    switched = {"self_augmentation": False, "reset_at_document": True}
    options = MetaLAOptions.parse({**changed, **switched})
    assert all(getattr(options, name) != default for name, default in MODEL_OPTIONS.items())
    model = dataclasses.replace(described(PURE), metala=options)
    config = MetaLAConfig(**model.to_hf())
    assert {name: getattr(config, name) for name in MODEL_OPTIONS} == options.of_model()
    assert Architecture.from_hf(config).metala == options
    assert described(to_neox(model)).metala == options


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        (PURE, []),
        ({**PURE, "norm": "layernorm"}, []),
        ({**HYBRID, "pos_emb": "rotary"}, []),
        ({**PURE, "norm": "scalenorm"}, ["norm"]),
        ({**HYBRID, "pos_emb": "alibi", "use_qk_layernorm": True}, ["pos_emb", "use_qk_layernorm"]),
        ({**PURE, "attention_config": ["metala", "local"] * 2}, ["attention_config"]),
    ],
)
def test_what_cannot_be_exported_is_listed(settings, reasons):
    assert [name for name, _, _ in why_not_exportable(with_defaults(settings))] == reasons


def test_defaults_are_gpt_neoxs(neox_checkout):
    """Our list of defaults equals GPT-NeoX's own."""
    import ast

    source = (neox_checkout / "megatron/neox_arguments/neox_args.py").read_text()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and node.target.id in GPT_NEOX_DEFAULTS:
            found[node.target.id] = ast.literal_eval(node.value)
    assert found == GPT_NEOX_DEFAULTS


def test_attention_config_shorthand():
    assert expand_attention_config([[["metala", "global"], 2]], 4) == ["metala", "global"] * 2
    assert expand_attention_config([[["metala"], "all"]], 3) == ["metala"] * 3
    assert expand_attention_config(["metala", "global"], 2) == ["metala", "global"]
    assert expand_attention_config(None, 2) == ["global"] * 2


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 1024, "intermediate_size": None}, 2816),
        ({"hidden_size": 2048, "intermediate_size": None}, 5632),
        ({"intermediate_size": 100}, 100),
        ({"hidden_size": 64, "intermediate_size": None, "expansion_factor": 3.5}, 224),
    ],
)
def test_intermediate_size(changes, width):
    assert metala_intermediate_size(with_defaults({**PURE, **changes})) == width


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"intermediate_size": 96}, 32),
        ({"intermediate_size": 94}, 31),
        ({"hidden_size": 96, "intermediate_size": None}, 128),
        ({"intermediate_size": 2816, "mlp_multiple_of": 2816}, 2816),
        ({"intermediate_size": 2816, "mlp_multiple_of": 64}, 960),
    ],
)
def test_intermediate_size_of_attention_layers(changes, width):
    assert attention_intermediate_size(with_defaults({**PURE, **changes})) == width


def test_values_are_checked_wherever_a_description_is_made():
    sizes = (2, 32, 4, 24)
    for wrong in itertools.product(range(4), (0, -1, "4", 2.0, True, None)):
        values = list(sizes)
        values[wrong[0]] = wrong[1]
        with pytest.raises(SettingsError):
            Architecture(*values)
    with pytest.raises(SettingsError, match="num_kv_heads"):
        Architecture(*sizes, attention=AttentionLayers(3, 8, True, True))
