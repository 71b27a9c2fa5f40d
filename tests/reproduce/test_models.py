"""The models that are compared: in each experiment, and what each of them is."""

from __future__ import annotations

import ablations
import images
import lra
import mad
import models
import mqar
import needle
import pytest
import torch
from models import MODELS, LanguageModel, Sizes, build
from training import cross_entropy

from megatron_patch.commands.command_line import CommandError

HERE = [name for name in MODELS if name != "gla"]  # those that a CPU runs
FEW = {
    mqar: "--layers 2 --kernel-size 2 --examples 96 --test-examples 64 --epochs 1",
    mad: "--epochs 1",
    lra: "--steps 2 --examples 96 --test-examples 64",
    needle: "--steps 2 --test-examples 2",
    images: "--examples 128 --epochs 1",
    ablations: "--steps 2 --test-sequences 2 --layers 2 --most 20000",
}


@pytest.mark.parametrize("experiment", FEW)
def test_each_experiment_trains_each_model(experiment, command, monkeypatch):
    name, models = "--model", HERE
    if experiment is images:
        models = images.MODELS
    elif experiment is ablations:
        name, models = "--variant", ablations.VARIANTS
    elif experiment is mad:  # the number of examples is the task's
        monkeypatch.setitem(mad.TINY, "examples", 96)
        monkeypatch.setitem(mad.TINY, "test_examples", 64)
    runs = command(experiment, "--tiny", name, *models, *FEW[experiment].split())
    assert [run["settings"][name[2:]] for run in runs] == list(models)
    for run in runs:
        assert run["steps"] == 2 and run["losses"][-1] > 0 and run["parameters"] > 1000
        assert not run.get("diverged") and not run.get("partial")


@pytest.mark.parametrize("name", ["metala", "softmax", "hybrid"])
def test_mixers_read_the_dtype_of_autocast(name, monkeypatch):
    """The gradients are as near to those in float32 as autocast alone brings them."""
    tokens = torch.randint(20, (4, 64))

    def gradients(is_cast: bool, bfloat16: bool) -> torch.Tensor:
        with monkeypatch.context() as patch:
            if not is_cast:
                patch.setattr(models, "in_autocast_dtype", lambda *_: None)
            torch.manual_seed(0)
            model = LanguageModel(build(name, Sizes(vocabulary=20, width=32, layers=2)))
        dtypes = []
        for layer in model.body.layers:
            for mixer in (layer.token_mixer, layer.channel_mixer):
                mixer.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden = model.hidden(tokens)
            loss = cross_entropy(model.head(hidden)[:, :-1], tokens[:, 1:])
        loss.backward()
        assert set(dtypes) == {torch.bfloat16 if is_cast and bfloat16 else torch.float32}
        assert hidden.dtype == torch.float32  # the residual stream stays as it is
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    wanted = gradients(True, False)
    assert torch.equal(wanted, gradients(False, False))
    found, plain = ((gradients(x, True) - wanted).norm() for x in (True, False))
    assert 0 < found < 1.3 * plain


def test_a_window_is_one_under_autocast():
    model = LanguageModel(build("window", Sizes(vocabulary=20, width=32)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randint(20, (1, 12))).isfinite().all()


@pytest.mark.parametrize("name", HERE)
def test_models_are_causal_and_score_positions(name):
    torch.manual_seed(0)
    model = LanguageModel(build(name, Sizes(vocabulary=20, width=32, layers=2))).eval()
    tokens = torch.randint(20, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 20
    with torch.no_grad():
        before, after = model(tokens), model(changed)
        some = model(tokens, torch.tensor([[3, 0], [9, 11]]))
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    later = (before - after)[:, 7:].abs().amax((0, 2))
    assert later[0] > 1e-4 and (later[3:].max() > 1e-6) == (name != "window")
    torch.testing.assert_close(some[0], before[0, [3, 0]])
    torch.testing.assert_close(some[1], before[1, [9, 11]])


def test_mamba_has_zoologys_sizes():
    """Inner width 2 d, state 16, convolution 4, rank d / 16; no SwiGLU unless it is asked for."""
    width, inner, state, rank = 32, 64, 16, 2
    mixer = width * 2 * inner + inner * 4 + inner + inner * (rank + 2 * state)
    mixer += rank * inner + inner + inner * state + inner + inner * width
    norms = 2 * width  # of LayerNorm

    def count(**others) -> int:
        model = build("mamba", Sizes(vocabulary=20, width=width, layers=2, **others))
        return sum(weight.numel() for weight in model.parameters())

    assert count() == 20 * width + 2 * (mixer + norms) + norms
    swiglu = 3 * width * (width * 11 // 4)
    assert count(mlp_beside_mamba=True) - count() == 2 * (swiglu + norms)


def test_a_hybrid_has_both_kinds_of_layers():
    def kinds(layers: int) -> list[bool]:
        model = build("hybrid", Sizes(vocabulary=8, width=16, layers=layers))
        return [layer.is_attention for layer in model.layers]

    assert kinds(2) == [False, True] and kinds(6) == [False, False, False, True, False, False]
    with pytest.raises(CommandError, match="hybrid: found 1 layer, wanted at least 2"):
        kinds(1)


def test_gla_runs_in_the_interpreter(monkeypatch):
    """One forward and backward pass. FLA's kernels choose their tiles by timing, which nothing but
    a GPU can do; here the first are taken. Its chunked kernels, for more than 64 tokens, do not
    run in the interpreter."""
    pytest.importorskip("fla", reason="flash-linear-attention is not here: gla is not tested")
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    if not getattr(pytest.importorskip("triton").knobs.runtime, "interpret", False):
        pytest.skip("gla is tested with TRITON_INTERPRET=1 alone")
    monkeypatch.setattr(autotuner.Autotuner, "_bench", lambda *args, **others: [1.0] * 3)
    torch.manual_seed(0)
    model = LanguageModel(build("gla", Sizes(vocabulary=16, width=32, layers=1)))
    logits = model(torch.randint(16, (1, 16)), torch.tensor([[3, 15]]))
    logits.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.body.layers[0].token_mixer.mixer.q_proj.weight.grad.abs().max() > 0
