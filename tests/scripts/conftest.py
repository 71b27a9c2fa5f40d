"""A small MetaLA model, and folders of it that chat.py and evaluate.sh can load."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import small_config


@pytest.fixture(scope="module")
def model():
    """A MetaLA model whose likeliest token depends on what came before."""
    from megatron_patch.hf import MetaLAForCausalLM

    torch.manual_seed(0)
    special = dict(bos_token_id=None, eos_token_id=0, pad_token_id=1)
    config = small_config(vocab_size=512, init_std=0.3, **special)
    return MetaLAForCausalLM(config).eval()


@pytest.fixture
def folder(model, tokenizer_file, tmp_path):
    """Function: a model's folder with the chat template given."""
    from tests.scripts.talking import build_tokenizer

    def build(template=None, name="model"):
        model.save_pretrained(tmp_path / name)
        build_tokenizer(tokenizer_file, template).save_pretrained(tmp_path / name)
        return tmp_path / name

    return build
