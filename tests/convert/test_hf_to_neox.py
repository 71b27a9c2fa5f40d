"""Hugging Face folders to GPT-NeoX: round trips, real GPT-NeoX, and errors."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from convert.command import ConvertError
from convert.hf_to_neox import hf_to_neox
from convert.neox_to_hf import FOLDED_INTO, neox_to_hf
from convert.reshape_neox import reshape_neox
from megatron_patch.hf import MetaLAForCausalLM
from megatron_patch.indexed_dataset import IndexedDatasetWriter
from tests.conftest import small_config
from tests.convert.conftest import write_tokenizer
from tests.convert.synthetic import Model, write
from tests.neox.training import TRAINING, train

LAYOUTS = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2, 3]))
LENGTH = 64


@hypothesis_settings(max_examples=12, deadline=None)
@given(
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    tied=st.booleans(),
    norm=st.sampled_from(["simplermsnorm", "rmsnorm", "layernorm"]),
    tokens=st.integers(60, 130),
    attention=st.sampled_from([(), (1,), (0, 2)]),
    expand_k=st.sampled_from([0.5, 1.0]),
)
def test_there_and_back_is_the_same_folder(layouts, tied, norm, tokens, attention, expand_k):
    model = Model(3, tied=tied, norm=norm, tokens=tokens, attention=attention, expand_k=expand_k)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_file = write_tokenizer(folder / "tokenizer.json", ("<|endoftext|>",), tokens)
        write(folder / "source", model, *layouts[0], vocab_file)
        neox_to_hf(folder / "source", folder / "hf")
        hf_to_neox(folder / "hf", folder / "imported", *layouts[1])
        reshape_neox(folder / "imported", folder / "reshaped", *layouts[2])
        neox_to_hf(folder / "reshaped", folder / "back")
        # The model card describes the training, which an import does not keep.
        about = ("README.md", "SHA256SUMS")
        files = [
            {p.name: p.read_bytes() for p in (folder / end).iterdir() if p.name not in about}
            for end in ("hf", "back")
        ]
        assert files[0] == files[1]


def test_a_hybrid_with_the_default_widths_of_its_mlps_comes_back(vocab_file, tmp_path):
    """The width of 64 for attention layers is less than a third of metala's 256."""
    sizes = {"d": 48, "f": 256, "attention": (1,), "attention_f": 64}
    write(tmp_path / "neox", Model(**sizes, settings={"intermediate_size": None}), 1, 0, vocab_file)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    written = hf_to_neox(tmp_path / "hf", tmp_path / "back", 2, 0)
    assert written.settings["intermediate_size"] is None
    neox_to_hf(tmp_path / "back", tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_new_rows_are_told(vocab_file, tmp_path, capfd):
    words = write_tokenizer(tmp_path / "tokenizer.json", (), tokens=91)
    write(tmp_path / "neox", Model(tokens=91, layers=1), 1, 0, words)
    neox_to_hf(tmp_path / "neox", tmp_path / "hf")
    hf_to_neox(tmp_path / "hf", tmp_path / "one", 1, 0)
    assert "new vocabulary rows" not in capfd.readouterr().err
    hf_to_neox(tmp_path / "hf", tmp_path / "two", 2, 0)
    assert "note: 1 new vocabulary rows of zeros" in capfd.readouterr().err


def test_what_a_tokenizer_json_cannot_hold_is_told(folder, tmp_path, capfd):
    hf_to_neox(folder, tmp_path / "plain", 1, 0)
    assert "note:" not in capfd.readouterr().err

    (folder / "SHA256SUMS").unlink()
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    end = next(token for token, number in vocabulary.items() if number == 7)
    for name, value in (
        ("config.json", {"eos_token_id": 7}),
        ("tokenizer_config.json", {"eos_token": end, "chat_template": "{{ messages }}"}),
        ("special_tokens_map.json", {"eos_token": end}),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **value}))
    hf_to_neox(folder, tmp_path / "chat", 1, 0)
    said = capfd.readouterr().err
    assert "note: the checkpoint does not keep eos_token_id 7 and chat template: export" in said
    assert f"--tokenizer {folder}" in said
    neox_to_hf(tmp_path / "chat", tmp_path / "again", tokenizer=folder)
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.eos_token_id == 7 and again.chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("tp", "pp", "values", "safe"),
    [
        (2, 0, {"no_scale_embedding": False}, True),
        (1, 2, {"norm_type": "rmsnorm", "tie_word_embeddings": True}, False),
    ],
)
def test_gpt_neox_starts_with_the_loss_of_hugging_face(
    tp, pp, values, safe, neox_checkout, tokenizer_file, tmp_path
):
    sizes = dict(decoder_embed_dim=64, decoder_attention_heads=4, glu_dim=96)
    config = small_config(vocab_size=512, **sizes, **values)
    torch.manual_seed(0)
    model = MetaLAForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no tensor stays all zeros or ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    if not safe:
        state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
        torch.save(state, tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()
    shutil.copyfile(tokenizer_file, tmp_path / "hf/tokenizer.json")
    hf_to_neox(tmp_path / "hf", tmp_path / "neox", tp, pp)

    # All documents repeat one period, so that samples are equal in whatever order they are drawn.
    period = torch.randint(512, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with IndexedDatasetWriter(tmp_path / "tokens", vocab_size=512) as writer:
        for _ in range(64):
            writer.add_document(period.repeat(8).numpy())
    sequence = torch.cat([period, period[:1]])[None]
    with torch.no_grad():
        expected = model(sequence, labels=sequence).loss.item()

    written = {}
    for name in ("model.yml", "training.yml"):
        written |= yaml.safe_load((tmp_path / "neox/configs" / name).read_text())
    lengths = {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
    own = {"data_path": str(tmp_path / "tokens"), "num_gpus": tp * max(pp, 1), "train_iters": 1}
    without_zero = {"zero_optimization": {"stage": 0}}
    run = train(neox_checkout, {**written, **TRAINING, **lengths, **own, **without_zero}, tmp_path)
    assert run.losses[1] == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def folder(vocab_file, tmp_path) -> Path:
    write(tmp_path / "source", Model(layers=1), 1, 0, vocab_file)
    neox_to_hf(tmp_path / "source", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"glu_act": "gelu"}, "config.json: glu_act: found 'gelu'"),
        ({"bias": True}, "config.json: bias: found true"),
        ({"norm_type": "scalenorm"}, "config.json: norm_type: found 'scalenorm'"),
        ({"model_type": "llama"}, "config.json: model_type: found 'llama', wanted metala"),
        ({"no_scale_embedding": False, "tie_word_embeddings": True}, "no_scale_embedding: found"),
        ({"decoder_layers": 2}, "layers.1.* is missing"),
        ({"vocab_size": "90"}, "config.json: "),
        ({"dtype": "abc"}, "config.json: "),
        ({"glu_dim": 25}, r"has shape \(24, 32\), wanted \(25, 32\)"),
        ({"self_augmentation": False}, "aug_balance is no tensor of this model"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"vocab_size": 80}, r"has shape|90 tokens, but the model has 80 rows"),
    ],
)
def test_refusals(values, message, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(ConvertError, match=message):
        hf_to_neox(folder, tmp_path / "neox", 1, 0)
    assert not (tmp_path / "neox").exists()


def test_an_adapter_alone_is_refused(folder, tmp_path):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ConvertError, match="adapter_config.json: found an adapter, wanted it merg"):
        hf_to_neox(folder, tmp_path / "neox", 1, 0)


def test_embedding_scale_and_damage(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"no_scale_embedding": False}))
    hf_to_neox(folder, tmp_path / "neox", 1, 1)
    layer = torch.load(tmp_path / "neox/global_step0/layer_00-model_00-model_states.pt")
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(layer["word_embeddings.weight"][:90], rows * 32**0.5)
    with pytest.raises(ConvertError, match="exists already"):
        hf_to_neox(folder, tmp_path / "neox", 1, 1)

    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(ConvertError, match="model.safetensors: truncated"):
        hf_to_neox(folder, tmp_path / "new", 1, 1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match="holds no weights"):
        hf_to_neox(folder, tmp_path / "new", 1, 1)


def test_sharded_safetensors_and_its_index(folder, tmp_path):
    neox_to_hf(tmp_path / "source", tmp_path / "sharded", max_shard_bytes=5000)
    hf_to_neox(tmp_path / "sharded", tmp_path / "neox", 2, 1)
    neox_to_hf(tmp_path / "neox", tmp_path / "back")
    one, other = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    shard = next((tmp_path / "sharded").glob("model-00002*"))
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(ConvertError, match="model-00002-of-.*tensor"):
        hf_to_neox(tmp_path / "sharded", tmp_path / "new", 1, 0)


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float32, ()), (torch.bfloat16, ()), (torch.float32, (1,))],
)
def test_folded_norms_are_the_same_model(
    dtype, attention, neox_checkout, vocab_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("GPT_NEOX_PATH", str(neox_checkout))
    model = Model(norm="rmsnorm", dtype=dtype, attention=attention)
    write(tmp_path / "neox", model, 2, 1, vocab_file)
    found = neox_to_hf(tmp_path / "neox", tmp_path / "hf", check=True, fold_norms=True)
    assert found.is_equal
    if dtype == torch.float32:
        assert found.largest_difference < 1e-5 * found.largest_logit
    assert not [n for n in load_file(tmp_path / "hf/model.safetensors") if "norm" in n]
    assert json.loads((tmp_path / "hf/config.json").read_text())["norm_type"] == "simplermsnorm"


@pytest.mark.parametrize("tensor", sorted(FOLDED_INTO))
def test_no_scale_is_lost(tensor, vocab_file, tmp_path, monkeypatch):
    write(tmp_path / "neox", Model(norm="rmsnorm", attention=(1,)), 1, 0, vocab_file)
    scale = FOLDED_INTO[tensor][0]
    monkeypatch.delitem(FOLDED_INTO, tensor)
    with pytest.raises(ConvertError, match=f"--fold-norms: layer .*: no place for {scale}"):
        neox_to_hf(tmp_path / "neox", tmp_path / "hf", fold_norms=True)
    assert not (tmp_path / "hf").exists()


def test_tied_norms_cannot_be_folded(vocab_file, tmp_path):
    write(tmp_path / "neox", Model(norm="rmsnorm", tied=True, layers=1), 1, 0, vocab_file)
    with pytest.raises(ConvertError, match="--fold-norms: no_weight_tying is false"):
        neox_to_hf(tmp_path / "neox", tmp_path / "hf", fold_norms=True)
    assert not (tmp_path / "hf").exists()
