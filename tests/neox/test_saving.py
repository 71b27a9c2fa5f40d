"""The settings of checkpoints, and which of them are deleted."""

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.architecture import SettingsError
from megatron_patch.neox.run_settings import check_saving
from megatron_patch.neox.upstream_fixes.saving import delete_old_checkpoints
from tests.neox.training import stand_in


def settings(save, **changes) -> SimpleNamespace:
    values = dict(
        checkpoint_factor=10,
        checkpoint_scale="linear",
        extra_save_iters=None,
        keep_last_n_checkpoints=None,
    )
    return stand_in(values, save=save, **changes)


@pytest.mark.parametrize(
    ("given", "wanted"), [("a/b", "a/b"), ("a/b/", "a/b"), ("/a//", "/a"), (None, None)]
)
def test_a_slash_at_the_end_is_none(given, wanted):
    args = settings(given)
    check_saving(args)
    assert args.save == wanted


def test_what_saves_passes():
    check_saving(settings(None, checkpoint_factor=None))
    check_saving(settings("a", checkpoint_factor=None, extra_save_iters=[3]))
    check_saving(settings("a", checkpoint_factor=1.5, checkpoint_scale="log"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_factor": None}, "checkpoint_factor: found none, wanted the number of steps"),
        ({"checkpoint_factor": 0}, "checkpoint_factor: found 0, wanted a whole number >= 1"),
        ({"checkpoint_factor": 1.5}, "checkpoint_factor: found 1.5, wanted a whole number >= 1"),
        ({"checkpoint_factor": 1, "checkpoint_scale": "log"}, "found 1, wanted more than 1, with"),
    ],
)
def test_what_would_save_nothing_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        check_saving(settings("a", **changes))


@pytest.fixture
def save(tmp_path, monkeypatch):
    """A folder with characters that mean something to `glob`, below one named like a step."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    folder = tmp_path / "global_step_size[1]" / "run"
    for step in (9, 10, 100, 200):
        (folder / f"global_step{step}" / "configs").mkdir(parents=True)
    (folder / "global_step10_kept").mkdir()
    (folder / "logs").mkdir()
    return folder


@pytest.mark.parametrize(
    ("latest", "left"), [(200, {100, 200}), (100, {10, 100, 200}), (9, {9, 10, 100, 200})]
)
def test_old_steps_alone_are_deleted(save, latest, left):
    """The later ones are of a run that was taken back to an earlier step."""
    (save / "latest").write_text(f"global_step{latest}")
    delete_old_checkpoints(str(save), 2)
    steps = {f"global_step{step}" for step in left}
    assert {path.name for path in save.iterdir()} == steps | {
        "latest",
        "logs",
        "global_step10_kept",
    }


def test_other_ranks_delete_nothing(save, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    (save / "latest").write_text("global_step200")
    delete_old_checkpoints(str(save), 1)
    assert (save / "global_step9").is_dir()


def test_a_step_that_cannot_be_deleted_is_named(save, monkeypatch, capsys):
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    (save / "latest").write_text("global_step200")
    delete_old_checkpoints(str(save), 3)
    assert f"{save}/global_step9 cannot be deleted whole" in capsys.readouterr().out
