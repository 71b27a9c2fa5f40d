"""A rank lets PyTorch lengthen its segments of GPU memory, unless the user says how to allocate."""

from __future__ import annotations

import os

import pytest

from megatron_patch.neox.gpu_memory import VARIABLES, grow_segments
from tests.neox.training import neox

RANK = """
import os, sys
sys.path.insert(0, os.getcwd())
from megatron.neox_arguments import NeoXArgs
NeoXArgs.consume_neox_args()
print("allocates by", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""


@pytest.fixture
def nothing_said(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_segments_grow(nothing_said):
    grow_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", VARIABLES)
def test_what_a_user_says_stays(nothing_said, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    grow_segments()
    assert {x: os.environ[x] for x in VARIABLES if x in os.environ} == {
        name: "max_split_size_mb:512"
    }


def test_ranks_do_so(neox_checkout, config, tmp_path, nothing_said):
    (tmp_path / "rank.py").write_text(RANK)
    run = neox(neox_checkout, str(tmp_path / "rank.py"), config, tmp_path)
    assert "allocates by expandable_segments:True\n" in run.output, run.output[-6000:]
