"""The ablations: each variant is what its name says, sizes are equal, and --tiny."""

from __future__ import annotations

import ablations
import numpy as np
import pytest
import torch

from megatron_patch.indexed_dataset import IndexedDatasetWriter
from megatron_patch.ops.torch_ops import decay_and_key

CASE = {**ablations.USUAL, **ablations.TINY, "width": 32, "layers": 4, "heads": 2}


def build(variant: str, **others) -> torch.nn.Module:
    torch.manual_seed(0)
    return ablations.equal_model(CASE | {"variant": variant} | others, 256)


def test_the_mixer_with_a_key_projection_is_metala_for_metalas_keys(monkeypatch):
    full = build("full").double().body.layers[0].token_mixer
    mixer = build("key_projection").double().body.layers[0].token_mixer
    torch.nn.init.normal_(full.aug_balance)
    mixer.load_state_dict(full.state_dict(), strict=False)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    x = torch.randn(2, 70, 32, dtype=torch.float64)

    def key_of(x: torch.Tensor) -> torch.Tensor:
        return decay_and_key(mixer.k_gate(x), mixer.tau)[1]

    monkeypatch.setattr(mixer.k_proj, "forward", key_of)
    with torch.no_grad():
        found = mixer(x)[0]
        wanted = full(x, None, None, None, None, None, False, False)[0]
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 16, 55])
def test_the_recurrence_with_keys_is_the_recurrence(tokens):
    """Token by token in float64, with gates that forget at once and others that keep all."""
    torch.manual_seed(0)
    q, k, gates = (torch.randn(2, tokens, 3, 4, dtype=torch.float64) for _ in range(3))
    v = torch.randn(2, tokens, 3, 5, dtype=torch.float64)
    g = torch.nn.functional.logsigmoid(20 * gates) / 16
    inputs = [x.requires_grad_() for x in (q, k, v, g.detach())]
    found = ablations.recurrence_with_keys(*inputs, 0.5)
    q, k, v, g = inputs
    state, outputs = torch.zeros(2, 3, 4, 5, dtype=torch.float64), []
    for t in range(tokens):
        state = g[:, t].exp()[..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(0.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    wanted = torch.stack(outputs, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_variants_have():
    def has(variant: str, part: str) -> list[bool]:
        return [getattr(layer.token_mixer, part, None) is not None
                for layer in build(variant).body.layers]  # fmt: skip

    assert all(has("full", "aug_balance")) and not any(has("full", "k_proj"))
    assert not any(has("no_augmentation", "aug_balance"))
    assert all(has("key_projection", "aug_balance")) and all(has("key_projection", "k_proj"))
    assert has("hybrid", "k_gate") == [True, True, True, False]
    assert not any(has("softmax", "k_gate"))
    names = dict(build("no_convolution").named_parameters())
    assert not any("conv1d" in name for name in names)


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_sizes_are_equal_and_models_causal(variant):
    width = dict(width=256, layers=8, heads=4)
    with torch.device("meta"):
        wanted, found = (
            sum(x.numel() for x in build(name, **width).parameters()) for name in ("full", variant)
        )
    assert found == pytest.approx(wanted, rel=0.003)
    model = build(variant).eval()
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.allclose(before[:10], after[:10], rtol=0, atol=1e-6)
    assert not torch.allclose(before[10:], after[10:], rtol=0, atol=1e-6)


def test_data(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"Words.")
    assert ablations.read_tokens(str(text), 4).tolist() == list(b"Word")
    with IndexedDatasetWriter(tmp_path / "pair", 1000) as writer:
        writer.add_document(np.array([999, 1]))
        writer.add_document(np.array([2, 3, 4]))
    assert ablations.read_tokens(str(tmp_path / "pair"), 4).tolist() == [999, 1, 2, 3]
    assert b"import" in bytes(ablations.read_tokens(None, 10_000).tolist())


def test_the_convolution_matters(command):
    runs = command(ablations, "--tiny")
    found = {run["settings"]["variant"]: run["loss"] for run in runs}
    assert found["full"] < found["no_convolution"] - ablations.MARGIN
    assert found["no_convolution"] < 3.0  # it learns too
    assert len(found) == 2 and len(runs[0]["curve"]) == len(runs[0]["at"]) == 20


def test_no_data(command, capsys):
    with pytest.raises(SystemExit):
        command(ablations, "--data", "nothing/there")
    assert "--data: found no file nothing/there" in capsys.readouterr().err
