"""The model card: the Hub's metadata, and the numbers of the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard

from convert import neox_to_hf as command
from convert.verify import Comparison
from tests.convert.synthetic import Model, write

SETTINGS = {
    "train_batch_size": 12,
    "optimizer": {"type": "Adam", "params": {"lr": 1.5e-4}},
    "data_path": "/home/somebody/data",
    "wandb_team": "secret",
}


def card(tmp_path: Path, **options) -> ModelCard:
    command.neox_to_hf(tmp_path / "neox", tmp_path / "hf", **options)
    return ModelCard.load(tmp_path / "hf/README.md")


def test_it_states_architecture_training_and_tokens(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(settings=SETTINGS), 2, 1, vocab_file, iteration=1500)
    found = card(tmp_path)
    assert found.data.library_name == "transformers"
    assert found.data.pipeline_tag == "text-generation"
    assert "metala" in found.data.tags
    for row in (
        "parameters | 18,912",
        "decoder_layers | 2",
        "decoder_embed_dim | 32",
        "vocab_size | 90",
    ):
        assert f"| {row} |" in found.text
    assert "| dtype | float32 |" in found.text
    assert "- iteration: 1,500\n" in found.text
    assert "- tokens seen: 576,000 (18,000 sequences of 32)\n" in found.text
    training = yaml.safe_load(re.search(r"```yaml\n(.*?)```", found.text, re.S)[1])
    assert training["optimizer"] == SETTINGS["optimizer"]
    assert training["train_batch_size"] == 12
    assert "Not done: exported without `--verify`." in found.text
    assert "somebody" not in found.text and "secret" not in found.text
    assert str(tmp_path) not in found.text


def test_tokens_are_counted_by_deepspeed_where_it_counted(vocab_file, tmp_path):
    """The batch size may have changed during training."""
    write(tmp_path / "neox", Model(settings=SETTINGS), 1, 0, vocab_file)
    file = tmp_path / "neox/global_step7/mp_rank_00_model_states.pt"
    torch.save({**torch.load(file, weights_only=False), "global_samples": 70}, file)
    assert "- tokens seen: 2,240 (70 sequences of 32)\n" in card(tmp_path).text


def test_tokens_that_nobody_counted(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    assert "- tokens seen: not recorded in the checkpoint\n" in card(tmp_path).text


def test_it_states_the_verification(vocab_file, tmp_path, monkeypatch):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    result = Comparison(1.25e-6, 1e-4, 3.5, 320)
    monkeypatch.setattr(command, "need_neox", lambda: Path("gpt-neox"))
    monkeypatch.setattr(command, "verify", lambda *arguments: result)
    text = card(tmp_path, check=True).text
    assert f"computed the logits of the same random tokens in float32 on a CPU:\n{result}." in text
    assert "Not done" not in text


def test_it_states_the_dtype_written(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(), 1, 0, vocab_file)
    assert "| dtype | bfloat16 |" in card(tmp_path, dtype=torch.bfloat16).text
