"""A flipped bit in a checkpoint is found before the checkpoint is loaded."""

from __future__ import annotations

import torch

from megatron_patch.torch_file import damaged_record
from tests.damage import flip_bit
from tests.neox.training import neox, settings, train


def test_every_record_is_compared(tmp_path):
    content = {"weight": torch.randn(100, 10), "args": {"lr": 0.1}, "step": torch.tensor(3)}
    for record in ("data/0", "data/1", "data.pkl"):
        torch.save(content, tmp_path / "states.pt")
        assert damaged_record(tmp_path / "states.pt") is None
        assert flip_bit(tmp_path / "states.pt", record) == f"states/{record}"
        assert damaged_record(tmp_path / "states.pt") == f"states/{record}"


def test_files_without_a_crc_are_taken(tmp_path):
    """The format before PyTorch 1.6, and no zip at all."""
    torch.save({"weight": torch.randn(9)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert damaged_record(tmp_path / "a.pt") is None
    (tmp_path / "b.pt").write_bytes(b"PK\3\4 is no zip")
    assert damaged_record(tmp_path / "b.pt") is None


def test_a_damaged_checkpoint_is_not_gone_on_from(
    neox_checkout, token_data, tokenizer_file, tmp_path
):
    """The second rank's share of the optimizer alone; that rank ends the run."""
    config = settings(
        token_data,
        tokenizer_file,
        tp=2,
        pp=1,
        zero_optimization={"stage": 1},
        save=str(tmp_path / "save"),
        load=str(tmp_path / "save"),
        checkpoint_factor=2,
        train_iters=2,
        lr_decay_iters=4,
        num_gpus=2,
    )
    train(neox_checkout, config, tmp_path)
    step = tmp_path / "save/global_step2"
    assert all(damaged_record(file) is None for file in step.glob("*.pt"))
    (file,) = step.glob("*zero_pp_rank_0_mp_rank_01_optim_states.pt")
    record = flip_bit(file)
    run = neox(neox_checkout, "train.py", {**config, "train_iters": 4}, tmp_path)
    assert run.returncode != 0 and not run.losses
    assert f"MetaLA: load: found {file} damaged, its {record} is not what was saved" in run.output
