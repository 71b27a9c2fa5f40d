"""What GPT-NeoX logs arrives whole and in order. tests/neox/test_training.py reads wandb's file."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_patch.neox.late_logging import LateLog, log_late


def test_values_are_held_back_as_they_are():
    logged = []
    late = LateLog(lambda *args, **kwargs: logged.append((*args, kwargs)))
    loss = torch.tensor(1.0)
    late("rate", 0.1, 1, use=True)
    late("loss", loss, 1, use=True)
    loss += 1  # the sum that is printed later
    assert logged == []
    late.flush()
    late.flush()
    assert logged == [("rate", 0.1, 1, {"use": True}), ("loss", 1.0, 1, {"use": True})]


@pytest.fixture
def megatron(monkeypatch) -> SimpleNamespace:
    """Stands for GPT-NeoX's modules: a training of two iterations that may break."""
    logging, training = ModuleType("megatron.logging"), ModuleType("megatron.training")
    checkpointing = ModuleType("megatron.checkpointing")
    logged = []

    def tb_wandb_log(key, value, iteration_no, use_wandb=False):
        logged.append((key, value, iteration_no))

    def training_log(neox_args, iteration):
        logged.append(iteration)  # as the timers are: directly
        training.tb_wandb_log("loss", 0.5, iteration_no=iteration, use_wandb=True)

    def save_checkpoint(neox_args):
        logged.append("saved")

    def evaluate_and_print_results(neox_args):
        training.tb_wandb_log("validation loss", 0.75, iteration_no=2)

    def train(neox_args, breaks):
        for iteration in (1, 2):
            training.training_log(neox_args, iteration=iteration)
        if breaks == "killed":  # and what is held back is lost
            training.save_checkpoint(neox_args)
            training.evaluate_and_print_results(neox_args)
            assert logged[-2:] == ["saved", ("validation loss", 0.75, 2)]
        if breaks:
            raise KeyError("broken")

    logging.tb_wandb_log = training.tb_wandb_log = tb_wandb_log
    logging.training_log = training.training_log = training_log
    checkpointing.save_checkpoint = training.save_checkpoint = save_checkpoint
    training.evaluate_and_print_results = evaluate_and_print_results
    training.train = train
    for module in (ModuleType("megatron"), logging, training, checkpointing):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    log_late()
    return SimpleNamespace(training=training, logged=logged)


def test_all_is_logged_when_training_ends(megatron):
    args = SimpleNamespace(
        attention_config=["metala"], use_wandb=True, tensorboard_writer=None, comet_experiment=None
    )
    megatron.training.train(args, breaks=False)
    assert megatron.logged == [1, ("loss", 0.5, 1), 2, ("loss", 0.5, 2)]
    with pytest.raises(KeyError, match="broken"):
        megatron.training.train(args, breaks=True)
    assert megatron.logged == [1, ("loss", 0.5, 1), 2, ("loss", 0.5, 2)] * 2
    megatron.logged.clear()
    with pytest.raises(KeyError, match="broken"):
        megatron.training.train(args, breaks="killed")
    assert megatron.logged[:5] == [1, ("loss", 0.5, 1), 2, ("loss", 0.5, 2), "saved"]
    megatron.training.tb_wandb_log("test loss", 0.25, 2)  # after training: at once
    assert megatron.logged[-1] == ("test loss", 0.25, 2)
