"""A `load` that finds no checkpoint stops the run, unless the run is a first start."""

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.resume import check_load


def settings(load, **changes) -> SimpleNamespace:
    values = dict(
        save=load,
        iteration=None,
        finetune=False,
        no_load_optim=None,
        no_load_rng=False,
        checkpoint=None,
        model_parallel_size=1,
        pipe_parallel_size=0,
        user_script="./train.py",
    )
    return SimpleNamespace(load=load, **{**values, **changes})


def save_step(folder, step: int, latest: bool = True) -> None:
    (folder / f"global_step{step}").mkdir(parents=True)
    if latest:
        (folder / "latest").write_text(f"global_step{step}")


def test_a_first_start_and_a_resumption_pass(tmp_path):
    check_load(settings(None))
    folder = tmp_path / "checkpoints"
    check_load(settings(str(folder)))
    save_step(folder, 10)
    check_load(settings(str(folder)))
    check_load(settings(str(folder), save=None, finetune=True))
    check_load(settings(str(folder), iteration=10))


@pytest.mark.parametrize(
    "changes",
    [
        {"save": None},
        {"save": "elsewhere"},
        {"finetune": True},
        {"no_load_optim": True, "user_script": "./generate.py"},
    ],
)
def test_a_checkpoint_that_was_meant_must_exist(tmp_path, changes):
    with pytest.raises(SettingsError, match=f"load: found no checkpoint in {tmp_path}"):
        check_load(settings(str(tmp_path), **changes))


def test_the_asked_iteration_must_exist(tmp_path):
    save_step(tmp_path, 10)
    with pytest.raises(SettingsError, match=r"found \['global_step10'\].*wanted global_step20"):
        check_load(settings(str(tmp_path), iteration=20))


def test_checkpoints_without_latest_do_not_start_anew(tmp_path):
    save_step(tmp_path, 10, latest=False)
    with pytest.raises(SettingsError, match=r"found \['global_step10'\].*wanted a file `latest`"):
        check_load(settings(str(tmp_path)))


def test_latest_must_name_a_checkpoint(tmp_path):
    save_step(tmp_path, 10)
    (tmp_path / "latest").write_text("global_step20")
    with pytest.raises(SettingsError, match="latest names 'global_step20', which is not there"):
        check_load(settings(str(tmp_path)))


@pytest.mark.parametrize("load", [None, "folder"])
def test_training_is_not_told_to_load_no_optimizer(load):
    """GPT-NeoX takes it for inference and optimises the first of the model's tensors alone."""
    with pytest.raises(SettingsError, match="no_load_optim: found true, wanted false"):
        check_load(settings(load, no_load_optim=True))


def save_states(folder, **changes) -> None:
    save_step(folder, 10)
    states = {
        "module": {},
        "lr_scheduler": {},
        "random_rng_state": (3, (1, 2), None),
        "args": {"model_parallel_size": 1},
        **changes,
    }
    states = {key: value for key, value in states.items() if value != "absent"}
    torch.save(states, folder / "global_step10/mp_rank_00_model_states.pt")


def test_a_checkpoint_in_the_layout_of_the_settings_passes(tmp_path):
    save_states(tmp_path / "whole")
    check_load(settings(str(tmp_path / "whole")))
    save_states(tmp_path / "two", module=None, args={"model_parallel_size": 2})
    check_load(settings(str(tmp_path / "two"), model_parallel_size=2, pipe_parallel_size=2))
    universal = {"checkpoint": {"load_universal": True}, "model_parallel_size": 4}
    check_load(settings(str(tmp_path / "two"), **universal))


@pytest.mark.parametrize(
    ("states", "changes", "message"),
    [
        ({}, {"pipe_parallel_size": 1}, "pipe_parallel_size: found 1, wanted 0, as in"),
        ({"module": None}, {}, "pipe_parallel_size: found 0, wanted at least 1, as in"),
        ({}, {"model_parallel_size": 2}, "model_parallel_size: found 2, wanted 1, as in"),
    ],
)
def test_a_checkpoint_in_another_layout_is_named(tmp_path, states, changes, message):
    save_states(tmp_path, **states)
    with pytest.raises(SettingsError, match=message):
        check_load(settings(str(tmp_path), **changes))


def test_weights_alone_are_not_a_run_to_resume(tmp_path):
    save_states(tmp_path, lr_scheduler=None, random_rng_state="absent")
    load, generate = str(tmp_path), {"user_script": "./generate.py", "no_load_optim": True}
    with pytest.raises(SettingsError, match="finetune: found False, wanted True: .* no optimizer "):
        check_load(settings(load))
    with pytest.raises(SettingsError, match="finetune: found False, .* has no random states"):
        check_load(settings(load, **generate))
    check_load(settings(load, finetune=True))
    check_load(settings(load, **generate, no_load_rng=True))
