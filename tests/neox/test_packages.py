"""What a run needs of other packages is asked before the start."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest

from megatron_patch.architecture import SettingsError
from megatron_patch.neox import hybrid_settings, inference_settings, run_settings
from megatron_patch.neox.mapping_settings import check_mappings
from megatron_patch.neox.packages import is_installed
from tests.neox.training import stand_in


@pytest.mark.parametrize("found", [None, "0.4.1"])
def test_eval_without_its_lm_eval_is_refused_in_one_line(monkeypatch, found):
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(inference_settings, "version", version)
    wanted = f"eval_tasks: found {'lm_eval 0.4.1' if found else 'no lm_eval'}, wanted it installed"
    with pytest.raises(SettingsError, match=wanted):
        inference_settings.check_inference(stand_in({"eval_tasks": ["piqa"]}), "eval.py")


@pytest.mark.parametrize("name", ["use_wandb", "use_comet"])
def test_logging_needs_its_package(monkeypatch, name):
    monkeypatch.setattr(run_settings, "is_installed", lambda package: False)
    off = {"use_wandb": False, "use_comet": None}
    with pytest.raises(SettingsError, match=f"{name}: found True, wanted false without the packa"):
        run_settings._check_logging(stand_in(off, **{name: True}))


def test_an_older_deepspeed_describes_no_mappings(monkeypatch):
    """Such as DeeperSpeed, which takes the key that GPT-NeoX's own files have in `fp16`."""
    mappings = """
        activation_checkpointing bf16 checkpoint comms_logger csv_monitor data_types
        deepspeed_extra_args flops_profiler optimizer tensorboard wandb zero_optimization
    """
    none = dict.fromkeys(mappings.split())
    run = stand_in(none, use_bnb_optimizer=False, fp16={"fp16": True, "enabled": True})
    with pytest.raises(SettingsError, match="fp16.fp16: found a key that nothing reads, wanted no"):
        check_mappings(run)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.precision_config", None)
    check_mappings(run)


def test_a_folder_of_logs_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "logs_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("torch") and is_installed("yaml")
    assert not is_installed("logs_of_a_run") and not is_installed("no_such_package")
    monkeypatch.setitem(sys.modules, "logs_of_a_run", import_module("logs_of_a_run"))
    assert not is_installed("logs_of_a_run")  # GPT-NeoX imports wandb where it can
    monkeypatch.setitem(sys.modules, "made", ModuleType("made"))
    assert is_installed("made")


def test_layers_need_their_packages(monkeypatch):
    monkeypatch.setattr(hybrid_settings, "is_installed", lambda package: False)
    hybrid_settings.check_other_layers(["metala", "global", "rwkv"])
    for kind, package in (("flash", "flash_attn"), ("mamba", "mamba_ssm")):
        wanted = f"attention_config: found '{kind}', wanted another type, or the package {package}"
        with pytest.raises(SettingsError, match=wanted):
            hybrid_settings.check_other_layers(["metala", kind])
