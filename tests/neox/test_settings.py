"""Every setting with which a MetaLA run makes no sense is refused with a line that names it."""

from types import SimpleNamespace

import pytest

from megatron_patch.neox.settings import (
    MetaLASettings,
    SettingsError,
    attention_intermediate_size,
    check_settings,
    expand_attention_config,
    metala_intermediate_size,
)


def settings(**changes) -> SimpleNamespace:
    values = dict(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        attention_config=[[["metala"], 4]],
        metala=None,
        model_parallel_size=1,
        intermediate_size=None,
        expansion_factor=None,
        activation="swiglu",
        sequence_parallel=False,
        gpt_j_residual=False,
        use_mup=False,
        moe_num_experts=1,
        te_columnparallel=False,
        te_rowparallel=False,
        te_layernorm_mlp=False,
        pos_emb="none",
        attention_dropout=0.0,
        num_kv_heads=None,
        mlp_multiple_of=1,
        pipe_partition_method="type:transformer|mlp|metala",
    )
    return SimpleNamespace(**{**values, **changes})


def test_sensible_settings_are_parsed():
    assert check_settings(settings(metala={"tau": 8})) == MetaLASettings(tau=8.0)
    assert check_settings(settings()) == MetaLASettings()


def test_a_run_without_metala_layers_is_left_alone():
    neox_default = settings(attention_config=None, activation="gelu", pos_emb="learned")
    assert check_settings(neox_default) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metala": {"tua": 8}}, r"metala\.tua: unknown key, the known ones are tau, conv_width"),
        ({"metala": {"tau": "big"}}, r"metala\.tau: found 'big'"),
        ({"metala": {"tau": 0}}, r"metala\.tau: found 0"),
        ({"metala": {"conv_width": 0}}, r"metala\.conv_width: found 0"),
        ({"metala": {"init": "xavier"}}, r"metala\.init: found 'xavier'.*'neox' or 'authors'"),
        ({"metala": {"backend": "cuda"}}, r"metala\.backend: found 'cuda'"),
        ({"metala": 16}, "metala: found 16, wanted a mapping of tau"),
        ({"metala": {}, "attention_config": None}, "metala: found settings, but attention_config"),
        ({"num_attention_heads": 5}, "hidden_size: found 64, wanted a multiple of .* = 10"),
        (
            {"num_attention_heads": 2, "model_parallel_size": 4},
            "num_attention_heads: found 2, wanted a multiple of model_parallel_size = 4",
        ),
        (
            {"intermediate_size": 99, "model_parallel_size": 2},
            "intermediate_size: found 99, wanted a multiple of model_parallel_size = 2",
        ),
        ({"intermediate_size": 96, "expansion_factor": 2.0}, "expansion_factor: found 2.0"),
        ({"pos_emb": "learned"}, "pos_emb: found 'learned', wanted none"),
        ({"activation": "gelu"}, "activation: found 'gelu', wanted swiglu"),
        ({"sequence_parallel": True}, "sequence_parallel: found True, wanted false"),
        ({"gpt_j_residual": True}, "gpt_j_residual: found True, wanted false"),
        ({"use_mup": True}, "use_mup: found True, wanted false"),
        ({"moe_num_experts": 8}, "moe_num_experts: found 8, wanted 1"),
        ({"te_columnparallel": True}, "te_columnparallel.*: found True, wanted false"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1, wanted 0"),
        ({"num_kv_heads": 2}, "num_kv_heads: found 2, wanted none"),
        ({"pipe_partition_method": "type:mlp"}, "pipe_partition_method: found 'type:mlp'"),
        ({"num_layers": 6}, "attention_config: found 4 layers, wanted num_layers = 6"),
        ({"attention_config": [["metala", 4]]}, r"attention_config: found \['metala', 4\], wanted"),
        ({"attention_config": [[["metala"], "4"]]}, r"found \[\['metala'\], '4'\], wanted"),
        ({"attention_config": [[[], "all"]]}, r"attention_config: found \[\[\], 'all'\], wanted"),
        ({"attention_config": "metala"}, "attention_config: found 'metala', wanted a list"),
    ],
)
def test_senseless_settings_are_named(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        check_settings(settings(**changes))
    assert "\n" not in str(error.value)


def test_hybrids_keep_what_their_attention_layers_need():
    hybrid = settings(
        attention_config=[[["metala", "global"], 2]], pos_emb="rotary", attention_dropout=0.1
    )
    assert check_settings(hybrid) == MetaLASettings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 2816}, "mlp_multiple_of: found 1 with an MLP of 2816"),
        ({"model_parallel_size": 2, "intermediate_size": 94}, "mlp_multiple_of: .* 31 wide"),
        ({"num_kv_heads": 3}, "num_kv_heads: found 3, wanted a divisor of num_attention_heads = 4"),
        (
            {"num_kv_heads": 1, "model_parallel_size": 2, "intermediate_size": 96},
            "num_kv_heads: found 1, wanted a multiple of model_parallel_size = 2",
        ),
        (
            {"num_kv_heads": 2, "attention_config": [[["metala", "local"], 2]]},
            "num_kv_heads: found 2, wanted none with layers of type local",
        ),
    ],
)
def test_senseless_hybrids_are_named(changes, message):
    hybrid = {"attention_config": [[["metala", "global"], 2]], **changes}
    with pytest.raises(SettingsError, match=message) as error:
        check_settings(settings(**hybrid))
    assert "\n" not in str(error.value)


def test_attention_config_shorthand():
    assert expand_attention_config([[["metala", "global"], 2]], 4) == ["metala", "global"] * 2
    assert expand_attention_config([[["metala"], "all"]], 3) == ["metala"] * 3
    assert expand_attention_config(["metala", "global"], 2) == ["metala", "global"]


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 1024}, 2816),
        ({"hidden_size": 2048}, 5632),
        ({"intermediate_size": 100}, 100),
        ({"expansion_factor": 3.5}, 224),
    ],
)
def test_intermediate_size(changes, width):
    assert metala_intermediate_size(settings(**changes)) == width


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"intermediate_size": 96}, 32),
        ({"intermediate_size": 94}, 31),
        ({"hidden_size": 96}, 128),
        ({"intermediate_size": 2816, "mlp_multiple_of": 2816}, 2816),
        ({"intermediate_size": 2816, "mlp_multiple_of": 64}, 960),
    ],
)
def test_intermediate_size_of_attention_layers(changes, width):
    assert attention_intermediate_size(settings(**changes)) == width
