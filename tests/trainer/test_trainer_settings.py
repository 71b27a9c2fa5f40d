"""The Trainer reads, ignores or refuses each of GPT-NeoX's settings."""

from __future__ import annotations

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.trainer.settings import IGNORED_SETTINGS, TrainerSettings, read_settings
from megatron_patch.trainer.training import find_checkpoint


def test_defaults_are_gpt_neoxs(small_run):
    settings, ignored = read_settings([small_run(metala={"tau": 8})])
    assert ignored == ["distributed_backend"]
    assert settings.metala_options.tau == 8
    assert settings.weight_decay == 0.1
    assert settings.gradient_clipping == 1.0
    assert settings.seed == 1234
    assert settings.optimizer.params.eps == 1e-8
    assert settings.batch(world_size=2) == (4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_parallel_size": 2},
            "model_parallel_size: found 2, wanted 0 or 1 with the Hugging",
        ),
        ({"pipe_parallel_size": 2}, "pipe_parallel_size: found 2, wanted 0 or 1 with the Hugging"),
        (
            {"metala": {"context_parallel_size": 2}},
            "metala.context_parallel_size: found 2, wanted 1 with the Hugging Face Trainer",
        ),
        ({"sequence_parallel": True}, "sequence_parallel: found True, wanted False"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: found 3, wanted 0 or 1"),
        (
            {"optimizer": {"type": "Lion", "params": {"lr": 1}}},
            "optimizer.type: found 'Lion', want",
        ),
        ({"optimizer": {"params": {"lr": 1, "x": 2}}}, "optimizer.params.x: not a setting"),
        ({"optimizer": None}, "optimizer: found nothing, wanted a value"),
        (
            {"no_such_key": 1},
            "no_such_key: not a setting for the Hugging Face Trainer; remove it or",
        ),
        ({"train_epochs": 1}, "train_epochs: not a setting for the Hugging Face Trainer"),
        (
            {"hidden_dropout": 0.1},
            "hidden_dropout: found 0.1, wanted 0 with the Hugging Face Trainer",
        ),
        ({"norm": "scalenorm"}, "norm: found 'scalenorm', wanted simplermsnorm or rmsnorm or"),
        ({"pos_emb": "rotary"}, "pos_emb: found 'rotary', wanted none"),
        ({"tokenizer_type": "SPMTokenizer"}, "tokenizer_type: found 'SPMTokenizer', wanted HFTok"),
        ({"train_iters": -1}, "train_iters: found -1, input should be greater than 0"),
        ({"warmup": "much"}, "warmup: found 'much', input should be a valid number"),
        ({"warmup": 1.5}, "warmup: found 1.5, input should be less than or equal to 1"),
        ({"warmup": 1.0, "lr_decay_iters": 9}, "warmup: found 1, wanted less, since training"),
        ({"seed": 2**32}, "seed: found 4294967296, input should be less than 4294967296"),
        (
            {"precision": "bf16"},
            "precision: found 'bf16', wanted fp32 or bfloat16 with the Hugging",
        ),
        (
            {"precision": "fp16"},
            "precision: found 'fp16', wanted fp32 or bfloat16 with the Hugging",
        ),
        ({"precision": "BFLOAT16"}, "precision: found 'BFLOAT16', wanted fp32 or bfloat16"),
        ({"precision": "bfloat16"}, "zero_optimization.stage: found nothing, wanted 1 with prec"),
        (
            {"precision": "bfloat16", "zero_optimization": {"stage": 0}},
            "zero_optimization.stage: found 0, wanted 1 with precision bfloat16",
        ),
        (
            {"lr_decay_style": "Cosine"},
            "lr_decay_style: found 'Cosine', input should be 'constant'",
        ),
        ({"pos_emb": "None"}, "pos_emb: found 'None', wanted none with the Hugging Face Trainer"),
        ({"min_lr": "1e-6"}, "min_lr: found '1e-6', input should be a valid number (YAML reads it"),
        (
            {"optimizer": {"params": {"lr": "3E4"}}},
            "optimizer.params.lr: found '3E4', input should be a valid number (YAML reads it as "
            "text; 3.0e+4 is a number",
        ),
        ({"min_lr": float("nan")}, "min_lr: found nan, input should be "),
        ({"weight_decay": float("inf")}, "weight_decay: found inf, input should be a finite"),
        (
            {"optimizer": {"params": {"lr": 1, "betas": [0.9, 1]}}},
            "optimizer.params.betas.1: found",
        ),
        ({"num_layers": "2"}, "num_layers: found '2', input should be a valid integer"),
        ({"train_iters": 16.5}, "train_iters: found 16.5, input should be a valid integer"),
        ({"train_iters": True}, "train_iters: found True, input should be a valid integer"),
        ({"no_weight_tying": "yes, please"}, "no_weight_tying: found 'yes, please', input should"),
        ({"pipe_parallel_size": True}, "pipe_parallel_size: found True, wanted 0 or 1"),
        (
            {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
            "override_lr_scheduler: found True, wanted False beside use_checkpoint_lr_scheduler",
        ),
        ({"metala": {"tua": 1}}, "metala.tua: unknown key"),
        ({"metala": {"backend": "triton"}}, "metala.backend: found 'triton', wanted auto"),
        ({"hidden_size": 66}, "hidden_size: found 66, with metala.expand_k = 0.5"),
        (
            {"attention_config": [[["metala", "global"], 1]]},
            "attention_config: found layers of type global, wanted metala alone with the Hugging",
        ),
        ({"data_path": None}, "data_path: wanted either it or train_data_paths"),
        ({"train_data_paths": ["a"]}, "data_path: wanted either it or train_data_paths"),
        (
            {"data_path": None, "train_data_paths": ["a"], "train_data_weights": [1, 2]},
            "train_data_weights: wanted one for each of train_data_paths",
        ),
        ({"vocab_file": "no-such.json"}, "vocab_file: found no file no-such.json"),
        ({"save": "~/run"}, "save: found '~/run', wanted a path in full"),
        ({"data_path": "$DATA/text"}, "data_path: found '$DATA/text', wanted a path in full"),
        ({"save": ""}, "save: found '', wanted the name of a folder"),
        ({"train_batch_size": 7}, "train_batch_size: found 7, wanted train_micro_batch_size_per"),
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu: found nothing"),
    ],
)
def test_refused(small_run, changes, message):
    with pytest.raises(SettingsError) as error:
        read_settings([small_run(**changes)])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_several_mistakes_are_told_at_once(small_run):
    with pytest.raises(SettingsError, match="model_parallel_size: .*; .*no_such_key: "):
        read_settings([small_run(model_parallel_size=2, no_such_key=1)])


def test_no_setting_is_both_read_and_ignored():
    assert not IGNORED_SETTINGS & set(TrainerSettings.model_fields)


def test_batch_settings_as_in_gpt_neox(small_run):
    def batch(world_size, **changes):
        return read_settings([small_run(**changes)])[0].batch(world_size)

    assert batch(1, gradient_accumulation_steps=3) == (4, 3)
    assert batch(1, train_batch_size=4) == (4, 1)
    total = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": None}
    assert batch(2, **total) == (6, 1)
    assert batch(2, **total, gradient_accumulation_steps=3) == (2, 3)


def test_a_run_that_was_to_go_on_needs_its_checkpoint(small_run, tmp_path):
    def find(**changes):
        return find_checkpoint(read_settings([small_run(**changes)])[0])

    assert find() is None  # `load` is `save`: a first start is no error
    assert find(load=None) is None
    with pytest.raises(SettingsError, match="load: found no checkpoint in .*elsewhere, wanted one"):
        find(load=str(tmp_path / "elsewhere"))

    states = {8: "{}", 16: "{}", 24: None, 32: '{"epoch": 1.'}  # killed while it wrote the last two
    for step, state in states.items():
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        if state:
            (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert find() == tmp_path / "run" / "checkpoint-16"

    (tmp_path / "neox" / "global_step5").mkdir(parents=True)
    (tmp_path / "base" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "base" / "checkpoint-4" / "trainer_state.json").write_text("{}")
    for load in (None, str(tmp_path / "base")):
        with pytest.raises(SettingsError, match="save: found .*checkpoint-16, which this run"):
            find(load=load)
    found = find(load=str(tmp_path / "base"), save=str(tmp_path / "new"))
    assert found == tmp_path / "base" / "checkpoint-4"

    with pytest.raises(SettingsError, match="load: found a GPT-NeoX checkpoint in .*neox_to_hf.py"):
        find(load=str(tmp_path / "neox"))
