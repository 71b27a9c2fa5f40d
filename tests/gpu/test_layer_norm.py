"""The experiments' LayerNorm on a GPU, beside PyTorch in float64, and in a captured step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.reproduce.layer_norm_case import results

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "reproduce"))

import models
from layer_norm import layer_norm
from mqar import Recall
from training import Recipe, Run, train_epochs

CUDA = torch.device("cuda")


@pytest.mark.parametrize("rows, width", [((128, 512), 128), ((128, 1999), 32), ((3, 5), 24)])
def test_it_is_layer_norm(rows, width, nan_in_new_memory):
    """The shapes of MQAR and ListOps, and rows that fill no tile. The gradients of weight and bias
    are compared with the size of their largest: each is a sum over all rows."""
    norm, *gradients = results(layer_norm, rows, width, "cuda")
    torch.testing.assert_close(*norm, rtol=1e-5, atol=1e-5)
    for found, true in gradients:
        assert (found - true).abs().max() < 1e-5 * true.abs().max()


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_captured_step_trains_with_it(bfloat16, monkeypatch):
    data = Recall(length=64, pairs=8, vocabulary=256).draw(496, torch.Generator().manual_seed(0))
    recipe, results = Recipe(1e-3, decay=0.1, bfloat16=bfloat16), []
    for fused in (True, False):
        monkeypatch.setattr(models, "FUSED_LAYER_NORM", fused)
        torch.manual_seed(0)
        body = models.build("metala", models.Sizes(vocabulary=256, width=128))
        assert ("forward" in vars(body.final_norm)) == fused
        model = models.LanguageModel(body)
        results.append(train_epochs(model, data, data, recipe, Run(CUDA), epochs=5, batch=64))
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], rel=2e-3)
    assert results[0]["losses"][-1] < results[0]["losses"][0] - 0.1  # it learns
