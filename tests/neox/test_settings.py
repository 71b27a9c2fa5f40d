"""Every setting with which a MetaLA run makes no sense is refused with a line that names it."""

import re
from types import SimpleNamespace

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.architecture_neox import GPT_NEOX_DEFAULTS
from megatron_patch.neox.run_settings import check_backend
from megatron_patch.neox.settings import check_settings, export_warning


def settings(**changes) -> SimpleNamespace:
    values = dict(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        attention_config=[[["metala"], 4]],
        metala=None,
        activation="swiglu",
        norm="simplermsnorm",
        pos_emb="none",
        pipe_partition_method="type:transformer|mlp|metala",
        tokenizer_type="HFTokenizer",
        vocab_file="tokenizer.json",
    )
    return SimpleNamespace(**{**GPT_NEOX_DEFAULTS, **values, **changes})


def test_sensible_settings_are_parsed():
    assert check_settings(settings(metala={"tau": 8})).metala.tau == 8
    assert check_settings(settings()).intermediate_size == 256


def test_a_run_without_metala_layers_is_left_alone():
    neox_default = settings(attention_config=None, activation="gelu", pos_emb="learned")
    assert check_settings(neox_default) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metala": {"tua": 8}}, r"metala\.tua: unknown key, the known ones are tau, conv_width"),
        ({"metala": {"backend": "cuda"}}, r"metala\.backend: found 'cuda', wanted one of auto"),
        ({"metala": {}, "attention_config": None}, "metala: found settings, but attention_config"),
        ({"num_attention_heads": 5}, "hidden_size: found 64, wanted a multiple of .* = 5"),
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
        ({"gpt_j_residual": True}, "gpt_j_residual: found True, wanted false"),
        ({"use_mup": True}, "use_mup: found True, wanted false"),
        ({"moe_num_experts": 8}, "moe_num_experts: found 8, wanted 1"),
        ({"moe_num_experts": "abc"}, "moe_num_experts: found 'abc', wanted a whole number"),
        ({"num_unique_layers": 2}, "num_unique_layers: found 2, wanted none"),
        ({"num_kv_heads": "two"}, "num_kv_heads: found 'two', wanted a whole number"),
        ({"te_columnparallel": True}, "te_columnparallel: found True, wanted false"),
        (
            {"attention_dropout": 0.1},
            "attention_dropout: found 0.1, wanted 0.0: no layer is one of",
        ),
        ({"use_qk_layernorm": True}, "use_qk_layernorm: found True, wanted false: no layer is one"),
        ({"sliding_window_width": 128}, "sliding_window_width: found 128, wanted none: no layer"),
        ({"rotary_pct": 0.25}, "rotary_pct: found 0.25, wanted 1.0: no layer is one of attention"),
        ({"te_mha": True}, "te_mha: found True, wanted false: no layer is one of attention"),
        (
            {"apply_query_key_layer_scaling": True},
            "apply_query_key_layer_scaling: found True, wanted false: no layer is one of attention",
        ),
        ({"mlp_multiple_of": 64}, "mlp_multiple_of: found 64, wanted 1: no layer is one of"),
        ({"rope_fusion": True}, "rope_fusion: found True, wanted false: no layer is one of"),
        ({"gpt_j_tied": True}, "gpt_j_tied: found True, wanted false"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon: found 1e-06, wanted 1e-05: norm is simp"),
        ({"rmsnorm_fusion": True}, "rmsnorm_fusion: found True, wanted false: norm is simplerms"),
        (
            {"norm": "layernorm", "rms_norm_epsilon": 1e-6},
            "rms_norm_epsilon: .*: norm is layernorm",
        ),
        ({"init_method": "small_init"}, "init_method: found 'small_init', .* metala.init: neox"),
        ({"num_kv_heads": 2}, "num_kv_heads: found 2, wanted none"),
        ({"pipe_partition_method": "type:mlp"}, "pipe_partition_method: found 'type:mlp'"),
        ({"pipe_partition_method": "even"}, "pipe_partition_method: found 'even', wanted uniform"),
        ({"pipe_partition_method": "type:["}, r"pipe_partition_method: .* a regular expression"),
        (
            {"pipe_parallel_size": 5},
            r"pipe_partition_method: .* pipe_parallel_size = 5 .*matches 4",
        ),
        ({"num_layers": 6}, "attention_config: found 4 layers, wanted num_layers = 6"),
        ({"attention_config": [["metala", 4]]}, r"attention_config: found \['metala', 4\], wanted"),
        ({"attention_config": [[["metala"], "4"]]}, r"found \[\['metala'\], '4'\], wanted"),
        (
            {"attention_config": [[[], "all"]], "metala": {}},
            r"config: found \[\[\], 'all'\], wanted",
        ),
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
    assert check_settings(hybrid).attention.rope_theta == 10000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 2816}, "mlp_multiple_of: found 1 with an MLP of 2816"),
        ({"model_parallel_size": 2, "intermediate_size": 94}, "mlp_multiple_of: .* 31 wide"),
        ({"num_kv_heads": 3}, "num_kv_heads: found 3, wanted a divisor of num_attention_heads = 4"),
        (
            {"pipe_partition_method": "type:metala", "pipe_parallel_size": 4},
            r"pipe_partition_method: found 'type:metala', .* pipe_parallel_size = 4 .*matches 2",
        ),
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


def test_initialisation_by_gpt_neox_counts_where_it_is_asked_for():
    assert check_settings(settings(init_method="small_init", metala={"init": "neox"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "scalenorm"}, "norm: found 'scalenorm', wanted simplermsnorm or rmsnorm or"),
        ({"attention_config": [[["metala", "local"], 2]]}, r"layers 1 \(local\), 3 \(local\)"),
        ({"attention_config": [[["metala", "global"], 2]], "pos_emb": "alibi"}, "pos_emb: found"),
        ({"tokenizer_type": "CharLevelTokenizer"}, "tokenizer_type: found 'CharLevelTokenizer'"),
    ],
)
def test_what_cannot_be_exported_is_said_before_the_training(changes, named):
    assert check_settings(settings(**changes))
    warning = export_warning(settings(**changes))
    assert "\n" not in warning
    assert re.search(named, warning)
    assert "trains, but cannot be exported" in warning
    assert export_warning(settings()) is None


@pytest.mark.parametrize("backend", ["triton", "fla"])
def test_a_backend_that_cannot_run_here_is_named(backend, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    here = {
        "attention_config": ["metala"] * 4,
        "distributed_backend": "gloo",
        "precision": "fp32",
        "local_rank": 0,
    }
    check_backend(settings(**here))
    check_backend(settings(**here, metala={"backend": "chunked"}))
    message = rf"metala.backend: found '{backend}', wanted auto or chunked: .* cpu, wanted cuda"
    with pytest.raises(SettingsError, match=message):
        check_backend(settings(**here, metala={"backend": backend}))
