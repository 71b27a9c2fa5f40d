"""MetaLAConfig: the authors' keys, the standard names, and values that are refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import megatron_patch.hf
from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM, MetaLAModel
from megatron_patch.hf.configuration_metala import HYBRID_KEYS
from megatron_patch.hf.remote_code import AUTO_MAP
from tests.hf.conftest import HYBRID

# Every key of the authors' configuration class, and some that transformers adds.
AUTHORS_CONFIG = {
    "add_bos_token": False,
    "architectures": ["MetaLAForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_metala.MetaLAConfig",
        "AutoModelForCausalLM": "modeling_metala.MetaLAForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "causal": True,
    "decoder_attention_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_layers": 2,
    "eos_token_id": 2,
    "glu_act": "swish",
    "glu_dim": 40,
    "init_std": 0.02,
    "model_type": "metala",
    "no_scale_embedding": True,
    "norm_type": "simplermsnorm",
    "pad_token_id": 2,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 61,
}


def test_authors_config_file_loads_and_is_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS_CONFIG))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MetaLAConfig
    assert config.add_bos_token is False and config.causal is True
    assert (config.tau, config.conv_width, config.self_augmentation) == (16.0, 4, True)
    assert (config.norm_eps, config.output_norm_eps) == (1e-6, 1e-5)

    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    again = MetaLAConfig.from_pretrained(tmp_path / "again")
    for key, value in AUTHORS_CONFIG.items():
        if key not in ("transformers_version", "torch_dtype", "auto_map"):
            assert getattr(again, key, written.get(key)) == value, key
    assert again.auto_map == AUTO_MAP  # the code was written too
    assert not {"hidden_size", "num_hidden_layers", "intermediate_size"} & set(written)
    assert not set(HYBRID_KEYS) & set(written)


def test_standard_names_read_and_write_the_authors_keys():
    config = MetaLAConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
    )
    assert (config.decoder_embed_dim, config.decoder_layers) == (64, 3)
    assert (config.decoder_attention_heads, config.glu_dim) == (4, 96)
    config.decoder_layers = 5
    assert config.num_hidden_layers == 5
    assert (config.head_key_dim, config.head_value_dim) == (8, 16)


def test_glu_dim_of_minus_one_is_the_width():
    assert MetaLAConfig(decoder_embed_dim=64, glu_dim=-1).glu_dim == 64


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 3.5),
        ("decoder_embed_dim", 1000),  # not a multiple of 2 x 8
        ("decoder_layers", -1),
        ("decoder_attention_heads", "8"),
        ("glu_dim", 0),
        ("glu_act", "gelu"),
        ("norm_type", "scalenorm"),
        ("expand_k", "1"),
        ("vocab_size", None),
        ("bias", 1),
        ("no_scale_embedding", None),
        ("self_augmentation", "yes"),
        ("tie_word_embeddings", "no"),
        ("tau", 0),
        ("tau", float("nan")),
        ("norm_eps", -1e-6),
        ("output_norm_eps", "1e-5"),
        ("init_std", float("inf")),
        ("conv_width", 0),
    ],
)
def test_invalid_values_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key}: found .*wanted") as error:
        MetaLAConfig(**{key: value})
    assert "\n" not in str(error.value)


def test_a_hybrid_is_saved_and_loaded(tiny_config, tmp_path):
    tiny_config(**HYBRID).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in HYBRID} == HYBRID
    again = MetaLAConfig.from_pretrained(tmp_path)
    assert [again.is_attention(layer) for layer in range(2)] == [True, False]
    assert again.rotary_dim == 8

    plain = tiny_config(layer_types=["linear_attention", "full_attention"], glu_dim=-1)
    assert (plain.num_key_value_heads, plain.attention_glu_dim) == (2, 32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "metala"]),
        ("layer_types", "full_attention"),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("attention_bias", 1),
        ("attention_glu_dim", 2.5),
        ("attention_glu_bias", "no"),
        ("rope_theta", -1),
        ("rope_theta", "10000"),
        ("partial_rotary_factor", 0),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.2),  # 3 of 16 channels
    ],
)
def test_invalid_values_of_a_hybrid_are_refused(tiny_config, key, value):
    with pytest.raises(ValueError, match=rf"^{key}: found .*wanted") as error:
        tiny_config(**{**HYBRID, key: value})
    assert "\n" not in str(error.value)


def test_the_model_refuses_a_value_set_later(tiny_config):
    config = tiny_config()
    config.glu_act = "gelu"
    with pytest.raises(ValueError, match="^glu_act: found 'gelu'"):
        MetaLAModel(config)


def test_registration_can_be_repeated(tiny_config):
    import importlib

    importlib.reload(megatron_patch.hf)
    config = tiny_config()
    assert type(AutoConfig.for_model("metala")) is MetaLAConfig
    assert type(AutoModel.from_config(config)) is MetaLAModel
    assert type(AutoModelForCausalLM.from_config(config)) is MetaLAForCausalLM


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("norm_type", "parameters"), [("simplermsnorm", 373_952_512), ("rmsnorm", 374_002_688)]
)
def test_parameter_count_of_the_released_size(norm_type, parameters, tied):
    sizes = dict(decoder_embed_dim=1024, decoder_layers=24, decoder_attention_heads=8)
    sizes |= dict(vocab_size=32000, glu_dim=2816)
    config = MetaLAConfig(**sizes, norm_type=norm_type, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = MetaLAForCausalLM(config)
    if tied:
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == parameters - tied * 32000 * 1024


def test_the_defaults_are_the_released_size():
    config = MetaLAConfig()
    sizes = (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    assert sizes == (32000, 1024, 24, 8) and config.intermediate_size == 2816
    assert config.norm_type == "simplermsnorm" and not config.tie_word_embeddings
