"""A run whose model is not that of the checkpoint which it loads is refused in one line; other data
are told."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from megatron_patch.architecture import SettingsError
from megatron_patch.architecture_neox import expand_attention_config, with_defaults
from megatron_patch.neox.loaded_model import OF_DATA, check_model
from megatron_patch.neox.upstream_fixes.resume import check_load
from tests.neox.test_resume import STATES
from tests.neox.test_resume import settings as run_settings
from tests.neox.training import MODEL

HYBRID = {"attention_config": ["metala", "global"], "pos_emb": "rotary", "mlp_multiple_of": 32}


def described(*, finetune: bool = False, **changes) -> SimpleNamespace:
    """The settings of a run, as GPT-NeoX has expanded them."""
    args = with_defaults({**MODEL, **changes})
    args.attention_config = expand_attention_config(args.attention_config, args.num_layers)
    args.finetune = finetune
    return args


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            {},
            {"metala": {"self_augmentation": False}},
            "metala.self_augmentation: found False, wan",
        ),
        ({}, {"metala": {"conv_width": 3}}, "metala.conv_width: found 3, wanted 4, as in s"),
        ({}, {"metala": {"expand_k": 1.0}}, "metala.expand_k: found 1.0, wanted 0.5, as in s"),
        ({}, {"no_weight_tying": False}, "no_weight_tying: found False, wanted True, as in s"),
        ({}, {"intermediate_size": 128}, "intermediate_size: found 128, wanted 96, as in s"),
        ({}, {"norm": "rmsnorm"}, "norm: found 'rmsnorm', wanted 'simplermsnorm', as in s"),
        ({}, HYBRID, r"attention_config: found \['metala', 'global'\], wanted \['metala', 'met"),
        (HYBRID, {**HYBRID, "num_kv_heads": 2}, "num_kv_heads: found 2, wanted 4, as in s"),
        (HYBRID, {**HYBRID, "mlp_multiple_of": 96}, "mlp_multiple_of: found 96, wanted 32, as in"),
        (HYBRID, {**HYBRID, "pos_emb": "learned"}, "pos_emb: found 'learned', wanted 'rotary', a"),
    ],
)
def test_tensors_of_other_shapes_are_named(before, now, message):
    """GPT-NeoX would end in a traceback."""
    for run in ({}, {"finetune": True}):
        with pytest.raises(SettingsError, match=message):
            check_model(described(**now, **run), {**MODEL, **before}, "s", is_training=True)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"metala": {"tau": 8}}, "metala.tau: found 8.0, wanted 16.0, as in s"),
        ({}, {"rms_norm_epsilon": 1e-5}, "rms_norm_epsilon: found 1e-05, wanted 1e-06, as in s"),
        (
            HYBRID,
            {**HYBRID, "rotary_emb_base": 500},
            "rotary_emb_base: found 500.0, wanted 10000.0",
        ),
    ],
)
def test_another_function_of_the_same_weights_is_named(capsys, monkeypatch, before, now, message):
    """GPT-NeoX would train on, or generate, without a word. A fine-tuning may change it."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    saved = {**MODEL, **before}
    for is_training in (True, False):
        with pytest.raises(SettingsError, match=message):
            check_model(described(**now), saved, "s", is_training)
    check_model(described(**now, finetune=True), saved, "s", is_training=True)
    name, _, found, _, was, *_ = message.split()
    assert capsys.readouterr().out == f"MetaLA: {name} found {found} and {was.strip(',')} in s\n"


def test_documents_are_of_training_alone():
    documents = described(metala={"reset_at_document": True})
    check_model(documents, MODEL, "s", is_training=False)
    with pytest.raises(SettingsError, match="metala.reset_at_document: found True, wanted False"):
        check_model(documents, MODEL, "s", is_training=True)


def test_the_same_model_in_other_words_passes(capsys):
    same = {"attention_config": [[["metala"], "all"]], "metala": {"tau": 16, "backend": "chunked"}}
    check_model(described(**same), {**MODEL, "rms_norm_epsilon": 1e-6}, "s", is_training=True)
    flash = {**HYBRID, "attention_config": ["metala", "flash"]}
    check_model(described(**HYBRID), {**MODEL, **flash}, "s", is_training=False)
    no_positions = {**HYBRID, "pos_emb": "none"}
    check_model(described(**no_positions, rotary_pct=0.25), {**MODEL, **no_positions}, "s", True)
    assert not capsys.readouterr().out


def test_another_tokenizer_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    files = {name: tmp_path / f"{name}.json" for name in ("old", "copy", "new", "gone")}
    for name, file in files.items():
        file.write_text("{}" if name == "new" else "[]")
    files["gone"].unlink()

    def told(now: str, before: str) -> str:
        saved = {**MODEL, "vocab_file": str(files[before])}
        check_model(described(vocab_file=str(files[now])), saved, "s", is_training=False)
        return capsys.readouterr().out

    assert told("copy", "old") == told("new", "gone") == ""
    start = f"MetaLA: vocab_file: found {files['new']}, and {files['old']} in s, which is another"
    assert told("new", "old").startswith(start)


def test_a_run_that_goes_on_compares_model_and_data(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    step = tmp_path / "global_step10"
    (step / "configs").mkdir(parents=True)
    torch.save(STATES, step / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step10")
    run = run_settings(str(tmp_path))
    saved = {**MODEL, "optimizer": run.optimizer, "train_iters": 20, **dict.fromkeys(OF_DATA)}
    (step / "configs/run.yml").write_text(yaml.safe_dump(saved))

    def load(**changes) -> str:
        check_load(SimpleNamespace(**{**vars(described()), **vars(run), **changes}))
        return capsys.readouterr().out

    assert load() == ""
    assert load(train_data_weights=[1.0, 1.0]) == ""  # which GPT-NeoX fills in
    assert load(train_data_weights=[1.0, 2.0]).startswith("MetaLA: train_data_weights: found [1.0,")
    longer = {"train_iters": 40, "lr_decay_iters": 20}
    told = load(seed=7, **longer).splitlines()
    assert told[0].startswith("MetaLA: seed: found 7, and None in ")
    assert told[1].startswith("MetaLA: train_iters: found 40, and 20 in ")
    with pytest.raises(SettingsError, match="metala.tau: found 8.0, wanted 16.0, as in .*step10"):
        load(metala={"tau": 8})
