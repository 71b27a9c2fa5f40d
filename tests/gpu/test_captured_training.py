"""Training steps of the experiments, captured as CUDA graphs, beside the same steps launched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "reproduce"))

import training
from kept import Kept
from models import LanguageModel, Sizes, build
from mqar import Recall
from training import Recipe, Run, train_epochs

CUDA = torch.device("cuda")


def new_model(name: str, width: int) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(build(name, Sizes(vocabulary=256, width=width)))


@pytest.mark.parametrize("name", ["metala", "softmax"])
@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("width", [64, 128])
def test_captured_steps_train_as_launched_ones(name, bfloat16, width, monkeypatch):
    """K = V = 32 and 64. The losses of four epochs, the learning rate another in each, agree to
    what atomic additions in another order change. The last batch of an epoch is a smaller one, in a
    graph of its own."""
    data = Recall(length=64, pairs=8, vocabulary=256).draw(496, torch.Generator().manual_seed(0))
    recipe = Recipe(1e-3, decay=0.1, bfloat16=bfloat16, by_part=True)
    results = []
    for eager_steps in (3, 1000):
        monkeypatch.setattr(training, "EAGER_STEPS", eager_steps)
        model = new_model(name, width)
        results.append(train_epochs(model, data, data, recipe, Run(CUDA), epochs=5, batch=64))
    captured, launched = results
    assert captured["losses"] == pytest.approx(launched["losses"], rel=2e-3)
    assert captured["losses"][-1] < captured["losses"][0] - 0.1  # it learns
    assert captured["steps"] == launched["steps"] == 40


def test_a_run_goes_on_with_graphs(monkeypatch, tmp_path):
    """As many steps, and losses that agree to what atomic additions change."""
    data = Recall(length=64, pairs=8, vocabulary=256).draw(512, torch.Generator().manual_seed(0))
    recipe = Recipe(1e-3, decay=0.1)

    def run(until: float) -> dict:
        now = iter(range(1000))
        monkeypatch.setattr(training.time, "time", lambda: next(now))
        where = Run(CUDA, until, kept=Kept(tmp_path / "run"))
        return train_epochs(new_model("metala", 64), data, data, recipe, where, epochs=4, batch=64)

    cut = run(20)
    assert cut["partial"] and 8 < cut["steps"] < 20
    rest = run(1e9)
    Kept(tmp_path / "run").remove()
    whole = run(1e9)
    assert rest["losses"] == pytest.approx(whole["losses"], rel=2e-3)
    assert rest["steps"] == whole["steps"] == 32


@pytest.mark.parametrize("name", ["gla", "mamba"])
def test_other_libraries_mixers_are_captured(name):
    """It learns from a captured step as from the first, launched ones."""
    if name == "gla":
        pytest.importorskip("fla", reason="flash-linear-attention is not here")
    data = Recall(length=64, pairs=8, vocabulary=256).draw(512, torch.Generator().manual_seed(0))
    recipe = Recipe(3e-3, decay=0.1)
    result = train_epochs(new_model(name, 64), data, data, recipe, Run(CUDA), epochs=4, batch=64)
    assert result["losses"][-1] < result["losses"][0] - 0.1
