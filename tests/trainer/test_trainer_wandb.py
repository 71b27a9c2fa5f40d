"""wandb in a training by the Trainer, where the module is another one or broken."""

import sys
from types import SimpleNamespace

import pytest

from megatron_patch.architecture import SettingsError


@pytest.mark.parametrize("text", ["", "raise OSError('no libcuda')", "1 / 0"])
def test_a_wandb_that_does_not_work_is_said(tmp_path, monkeypatch, text):
    from megatron_patch.trainer.training import wandb_wanted

    (tmp_path / "wandb.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that monkeypatch restores it
    del sys.modules["wandb"]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(
        SettingsError, match=r"^use_wandb: found no wandb that works \(.+\), wanted"
    ):
        wandb_wanted(SimpleNamespace(use_wandb=True))
