"""What a training prints after a start in the middle of an interval, its learning rate behind the
schedule's end, its last checkpoint, and its batches behind the last one."""

from __future__ import annotations

import re

import pytest
import torch

from tests.neox.training import settings, train

RATE = re.compile(r"iteration\s+(\d+)/.*?learning rate: (\S+) \|")


def test_a_run_that_goes_on_reports_what_it_did(
    neox_checkout, token_data, tokenizer_file, tmp_path
):
    """13 iterations, then 7 more, with a report every five; beside 20 with one each."""
    config = settings(token_data, tokenizer_file, lr_decay_iters=8, split="100", num_gpus=1)
    unbroken = train(neox_checkout, config, tmp_path / "unbroken")
    rates = {int(step): float(rate) for step, rate in RATE.findall(unbroken.output)}
    assert rates[7] > rates[8] == config["min_lr"]
    assert {rates[step] for step in range(9, 21)} == {config["min_lr"]}

    save = tmp_path / "save"
    config |= {"save": str(save), "load": str(save), "checkpoint_factor": 1000, "log_interval": 5}
    train(neox_checkout, {**config, "train_iters": 13}, tmp_path / "begun")
    resumed = train(neox_checkout, config, tmp_path / "resumed")
    assert sorted(resumed.losses) == [15, 20]
    losses = unbroken.losses
    assert resumed.losses[15] == pytest.approx((losses[14] + losses[15]) / 2, abs=2e-6)
    assert resumed.losses[20] == pytest.approx(sum(losses[s] for s in range(16, 21)) / 5, abs=2e-6)

    files = [file for file in (save / "global_step20").rglob("*") if file.is_file()]
    written = {file: file.stat().st_mtime_ns for file in files}
    train(neox_checkout, config, tmp_path / "finished")
    assert written == {file: file.stat().st_mtime_ns for file in files}


def test_the_first_step_of_a_run_that_goes_on_has_the_new_rate(
    neox_checkout, token_data, tokenizer_file, tmp_path
):
    """`override_lr_scheduler` with a rate that changes no weight, in ZeRO 1."""
    config = settings(
        token_data,
        tokenizer_file,
        train_iters=2,
        lr_decay_iters=4,
        num_gpus=1,
        zero_optimization={"stage": 1},
        split="100",
        save=str(tmp_path / "save"),
        checkpoint_factor=1,
    )
    train(neox_checkout, config, tmp_path / "begun")
    params = {**config["optimizer"]["params"], "lr": 1e-12}
    config |= {"optimizer": {**config["optimizer"], "params": params}, "min_lr": 0.0}
    config |= {"load": config["save"], "override_lr_scheduler": True, "train_iters": 3}
    train(neox_checkout, config, tmp_path / "resumed")
    before, after = (
        torch.load(
            tmp_path / f"save/global_step{step}/mp_rank_00_model_states.pt", weights_only=False
        )["module"]
        for step in (2, 3)
    )
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-10)


def test_a_model_writes_a_checkpoint_once(in_neox, config, tmp_path):
    """A second model of the process may write to the same folder."""
    code = """
    from types import SimpleNamespace
    from megatron import checkpointing, training
    steps = []
    checkpointing.save_ds_checkpoint = lambda step, *_: steps.append(step)
    models = [SimpleNamespace(module=torch.nn.Linear(1, 1)) for _ in range(2)]
    for model, step in ((0, 5), (0, 5), (0, 6), (0, 7), (0, 6), (1, 6), (1, 6)):
        training.save_checkpoint(
            neox_args=neox_args, iteration=step, model=models[model], optimizer=None,
            lr_scheduler=None,
        )
    answer(steps)
    """
    config |= {"save": str(tmp_path), "checkpoint_factor": 1}
    assert in_neox(config, code) == [5, 6, 7, 6, 6]


def test_batches_are_read_again_from_the_first_and_none_is_kept(in_neox, config):
    """A run that begins two batches before the end of an epoch."""
    code = """
    import gc, weakref
    from megatron import training
    loaders = training.build_train_valid_test_data_loaders(neox_args=neox_args)
    loader = loaders["train"]
    epoch = [batch["text"] for batch in loader]
    neox_args.iteration = len(epoch) - 2
    batches, *_ = training.shift_and_wrap_data_loaders(neox_args=neox_args, data_loaders=loaders)
    read = [next(batches)["text"] for _ in range(len(epoch) + 3)]
    wanted = epoch[-2:] + epoch + epoch[:1]
    equal = all(map(torch.equal, read, wanted))
    kept = [weakref.ref(batch) for batch in read[:-1]]
    del read
    gc.collect()
    answer([len(epoch), equal, sum(batch() is not None for batch in kept)])
    """
    changes = {"train_iters": None, "train_epochs": 3, "split": "100", "seq_length": 64}
    number, are_equal, kept = in_neox({**config, **changes}, code)
    assert number > 2 and are_equal and kept == 0


def test_validation_goes_on_where_it_was(in_neox, config):
    """Three micro-batches a step; the run stopped at step 6, after the validation at step 4."""
    code = """
    from megatron import training
    loaders = training.build_train_valid_test_data_loaders(neox_args=neox_args)
    before = [batch["text"] for batch in loaders["valid"]]
    neox_args.iteration = 6
    _, batches, _ = training.shift_and_wrap_data_loaders(neox_args=neox_args, data_loaders=loaders)
    answer(torch.equal(next(batches)["text"], before[2 * 3]))
    """
    changes = {"gradient_accumulation_steps": 3, "eval_interval": 4, "eval_iters": 2}
    assert in_neox({**config, **changes}, code)


@pytest.mark.parametrize("largest", [299, 300])
def test_a_token_that_has_no_row_ends_the_rank(in_neox, config, largest):
    """Tensor-parallel ranks would look it up as zeros."""
    code = """
    from megatron import training
    neox_args.padded_vocab_size = 300
    loader = [{"text": torch.tensor([[5, %d]])}]
    class Loader(list):
        batch_sampler = neox_args
    loaders = {"train": Loader(loader), "valid": None, "test": None}
    batches, *_ = training.shift_and_wrap_data_loaders(neox_args=neox_args, data_loaders=loaders)
    try:
        answer(next(batches)["text"].tolist())
    except SystemExit as end:
        answer(end.code)
    """
    line = "MetaLA: data: found the token 300, wanted one below 300, the number of the embedding's"
    answer = in_neox({**config, "iteration": 0}, code % largest)
    assert answer == [[5, 299]] if largest < 300 else answer.startswith(line)
