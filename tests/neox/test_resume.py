"""A `load` that finds no checkpoint stops the run, unless the run is a first start."""

from types import SimpleNamespace

import pytest

from megatron_patch.neox.resume import check_load
from megatron_patch.neox.settings import SettingsError


def settings(load, **changes) -> SimpleNamespace:
    values = dict(save=load, iteration=None, finetune=False, no_load_optim=None)
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
    "changes", [{"save": None}, {"save": "elsewhere"}, {"finetune": True}, {"no_load_optim": True}]
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
