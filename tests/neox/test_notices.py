"""What a run tells that does what its settings say, and not what its user may expect; its log
files."""

from __future__ import annotations

import numpy as np

from megatron_patch.indexed_dataset import IndexedDatasetWriter
from tests.neox.training import settings, train


def test_lines_about_a_run_and_its_logs(neox_checkout, tokenizer_file, tmp_path, monkeypatch):
    """Two ranks without a key for wandb, with five documents, that end before their second
    checkpoint; a second start, which goes on from the first."""
    for name in ("WANDB_API_KEY", "WANDB_LOCAL", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with IndexedDatasetWriter(tmp_path / "text", vocab_size=512) as writer:
        for _ in range(5):
            writer.add_document(np.arange(300))
    config = settings(
        tmp_path / "text",
        tokenizer_file,
        num_gpus=2,
        split="969,30,1",
        exit_interval=3,
        save=str(tmp_path / "save"),
        checkpoint_factor=2,
        log_dir=str(tmp_path / "logs"),
        use_wandb=True,
    )
    runs = [train(neox_checkout, config, tmp_path, HOME=str(tmp_path)) for _ in range(2)]
    assert [sorted(run.losses) for run in runs] == [[1, 2, 3], [3]]
    for run in runs:
        assert "MetaLA: use_wandb: nothing is logged to wandb, since there is no key" in run.output
        assert "MetaLA: exit_interval: the run ends at iteration 3 without a chec" in run.output
        line = "MetaLA: split: '969,30,1' leaves no document to validate on"
        assert run.output.count(line) == 1

    (file,) = (tmp_path / "logs").glob("*_stdout.txt")
    logged = file.read_text()
    for printed in ("---- end of arguments ----", "done with setups ...", "| lm_loss: "):
        assert logged.count(printed) == sum(run.output.count(printed) for run in runs), printed


def test_a_run_of_epochs_without_validation_is_saved(in_neox, config):
    """`eval_iters: 0` means what it means with `train_iters`."""
    code = """
    from megatron import training
    training.build_train_valid_test_data_loaders(neox_args=neox_args)
    answer([neox_args.do_train, neox_args.do_valid, neox_args.do_test])
    """
    changes = {"train_iters": None, "train_epochs": 1, "eval_iters": 0}
    assert in_neox({**config, **changes}, code) == [1, 0, 0]


def test_less_than_a_batch_is_refused(in_neox, config):
    """Three documents of 600 tokens to test on, which an epoch does not repeat."""
    code = """
    from megatron import training
    try:
        training.build_train_valid_test_data_loaders(neox_args=neox_args)
    except SystemExit as end:
        answer(end.code)
    """
    length = {"seq_length": 512, "max_position_embeddings": 512}
    changes = {"train_iters": None, "train_epochs": 2, "split": "950,0,50", **length}
    line = "MetaLA: test data: found 2 samples of 512 tokens, wanted one micro-batch for every rank"
    assert in_neox({**config, **changes}, code).startswith(line)


def test_masking_what_the_tokenizer_lacks_is_refused(in_neox, config):
    code = """
    from megatron import training
    neox_args.tokenizer.eod_id = None
    try:
        training.build_train_valid_test_data_loaders(neox_args=neox_args)
    except SystemExit as end:
        answer(end.code)
    """
    line = "MetaLA: eod_mask_loss: found true with a tokenizer that has no end-of-document token"
    assert in_neox({**config, "eod_mask_loss": True}, code).startswith(line)


def test_a_missing_tensorboard_is_told(in_neox, config):
    """GPT-NeoX's own `local_setup.yml` names a folder, and prints no line that is easy to find."""
    code = """
    from megatron_patch.neox import notices
    notices.is_installed = lambda package: False
    answer(list(notices.notices(neox_args)))
    """
    line = "tensorboard_dir: nothing is logged there without the package tensorboard"
    assert in_neox({**config, "tensorboard_dir": "tensorboard"}, code) == [line]
