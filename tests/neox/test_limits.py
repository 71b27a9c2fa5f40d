"""Values that GPT-NeoX takes, and with which it does not do what they say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.run_settings import check_limits
from tests.neox.training import neox, settings, stand_in


def limits(**changes) -> SimpleNamespace:
    values = dict(
        attention_config=["metala", "global"],
        user_script="train.py",
        train_iters=50,
        warmup=0.1,
        lr_decay_iters=None,
        lr_decay_fraction=None,
        train_impl="normal",
        train_micro_batch_size_per_gpu=1,
    )
    return stand_in(values, **changes)


@pytest.mark.parametrize("name", ["train_data_paths", "test_data_paths", "neg_valid_data_paths"])
def test_more_data_sets_than_gpt_neox_blends(name):
    check_limits(limits(**{name: ["a"] * 254}))
    with pytest.raises(SettingsError, match=f"^{name}: found 255, wanted at most 254: GPT-NeoX"):
        check_limits(limits(**{name: ["a"] * 255}))
    check_limits(limits(**{name: ["a"] * 255}, attention_config=["global"]))


@pytest.mark.parametrize(("kind", "samples"), [("rm", 1), ("kto", 3)])
def test_samples_that_do_not_suit_the_objective(kind, samples):
    changes = {"train_impl": kind, "train_micro_batch_size_per_gpu": samples}
    with pytest.raises(SettingsError, match=f"^train_micro_batch_size_per_gpu: found {samples}, "):
        check_limits(limits(**changes))
    check_limits(limits(**{**changes, "train_micro_batch_size_per_gpu": 4}))


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, None),
        ({"warmup": 0.0}, None),
        ({"warmup": 0.02}, None),
        ({"warmup": 0.01}, "2 times lr"),
        ({"lr_decay_iters": 4}, "2.5 times lr"),
        ({"lr_decay_fraction": 0.1}, "2 times lr"),
        ({"warmup": 0.01, "user_script": "generate.py"}, None),
    ],
)
def test_a_warm_up_of_less_than_a_step_is_told(capsys, changes, times):
    check_limits(limits(**changes))
    output = capsys.readouterr().out
    assert (f"the first learning rate {times}, as in GPT-NeoX" in output) if times else not output


def test_the_launcher_refuses_in_one_line(neox_checkout, token_data, tokenizer_file, tmp_path):
    paths = {f"{split}_data_paths": [str(token_data)] * 255 for split in ("train", "valid", "test")}
    config = {**settings(token_data, tokenizer_file), **paths}
    del config["data_path"]
    run = neox(neox_checkout, "train.py", config, tmp_path)
    assert run.returncode == 1
    assert run.output.splitlines()[-1].startswith("MetaLA: train_data_paths: found 255, wanted at")
    assert "Traceback" not in run.output
