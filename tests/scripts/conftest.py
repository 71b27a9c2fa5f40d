"""How these tests run scripts, and a small run for the embedded engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

# 16 iterations of a model of two layers: seconds on one core.
SMALL_RUN = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "seq_length": 32,
    "attention_config": [[["metala"], 2]],
    "norm": "simplermsnorm",
    "rms_norm_epsilon": 1.0e-6,
    "activation": "swiglu",
    "pos_emb": "none",
    "no_weight_tying": True,
    "tokenizer_type": "HFTokenizer",
    "train_micro_batch_size_per_gpu": 4,
    "train_iters": 16,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-2, "betas": [0.9, 0.95]}},
    "lr_decay_style": "cosine",
    "min_lr": 1.0e-3,
    "warmup": 0.1,
    "split": "80,20,0",
    "checkpoint_factor": 8,
    "eval_interval": 8,
    "eval_iters": 2,
    "log_interval": 1,
    "distributed_backend": "gloo",
}


@pytest.fixture
def run_script():
    """Runs scripts/NAME with arguments; returns the finished process, its output as text."""

    def run(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, SCRIPTS / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        )

    return run


@pytest.fixture
def small_run(tmp_path, tokenizer_file, token_data):
    """Writes SMALL_RUN with changes (`None` removes a key) as a YAML file and returns its path."""

    def write(name: str = "run", **changes: object) -> Path:
        folder = tmp_path / name
        settings = {
            **SMALL_RUN,
            "vocab_file": str(tokenizer_file),
            "data_path": str(token_data),
            "save": str(folder),
            "load": str(folder),
            **changes,
        }
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return path

    return write


@pytest.fixture
def script_modules(monkeypatch):
    """Makes the scripts importable by their names."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture(scope="module")
def script_path():
    """As `script_modules`, for a whole file of tests, as property-based ones need it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield


@pytest.fixture(scope="module")
def model():
    """A MetaLA model whose likeliest token depends on what came before."""
    from megatron_patch.hf import MetaLAConfig, MetaLAForCausalLM

    torch.manual_seed(0)
    config = MetaLAConfig(
        vocab_size=512,
        decoder_embed_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        glu_dim=40,
        init_std=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
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
