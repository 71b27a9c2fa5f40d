"""A rank lets PyTorch lengthen its segments of GPU memory, unless the user says how to allocate."""

from __future__ import annotations

import os

import pytest

from megatron_patch.neox.gpu_memory import VARIABLES, grow_segments


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
