"""A training step of the experiments, captured as one CUDA graph, beside the same step launched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "reproduce"))

import training
from models import Sizes, build
from mqar import Recall


@pytest.mark.parametrize("name", ["metala", "softmax"])
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("width", [64, 128])
def test_captured_steps_train_as_launched_ones(name, bfloat16, width, monkeypatch):
    """K = V = 32 and 64. The losses of four epochs, the learning rate another in each, agree to
    what atomic additions in another order change."""
    data = Recall(length=64, pairs=8, vocabulary=256).draw(512, torch.Generator().manual_seed(0))
    recipe = training.Recipe(1e-3, 4, batch_size=64, weight_decay=0.1, bfloat16=bfloat16)
    results = []
    for eager_steps in (3, 1000):
        monkeypatch.setattr(training, "EAGER_STEPS", eager_steps)
        torch.manual_seed(0)
        model = build(name, Sizes(vocabulary=256, width=width))
        results.append(training.train(model, data, data, recipe, torch.device("cuda")))
    captured, launched = results
    assert captured["losses"] == pytest.approx(launched["losses"], rel=2e-3)
    assert captured["losses"][-1] < captured["losses"][0] - 0.1  # it learns
    assert captured["steps"] == launched["steps"] == 32
