"""`--verify` accepts right conversions and rejects wrong ones; GPT-NeoX's layers are the oracle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from convert import verify
from convert.neox_reader import NeoXCheckpoint
from convert.neox_to_hf import main, neox_to_hf
from convert.tensor_table import Piece, TensorRule
from tests.convert.synthetic import TOKENS, Model, write


@pytest.fixture(scope="module")
def two_ranks(vocab_file, tmp_path_factory) -> Path:
    """A layer-file checkpoint with two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("two_ranks") / "neox"
    write(folder, Model(norm="rmsnorm"), 2, 2, vocab_file)
    return folder


@pytest.fixture(scope="module")
def neox_logits(neox_checkout, two_ranks, tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits of GPT-NeoX's own model on two ranks."""
    tokens = torch.randint(TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    work = tmp_path_factory.mktemp("work")
    source = NeoXCheckpoint(two_ranks)
    return tokens, verify._neox_logits(neox_checkout, source, tokens, work)


@pytest.fixture(scope="module")
def hybrid(vocab_file, tmp_path_factory) -> Path:
    """An mp_rank checkpoint of a hybrid on two ranks, with grouped-query attention, partial rotary
    embedding, and GPU kernels in its settings."""
    folder = tmp_path_factory.mktemp("hybrid") / "neox"
    settings = {
        "attention_config": ["metala", "flash", "metala"],
        "pos_emb": "rotary",
        "rotary_pct": 0.5,
        "rotary_emb_base": 100,
        "rope_fusion": True,
        "scaled_upper_triang_masked_softmax_fusion": True,
        "bias_dropout_fusion": True,
    }
    model = Model(
        layers=3, norm="layernorm", expand_k=1.0, attention=(1,), kv_heads=2, settings=settings
    )
    write(folder, model, 2, 0, vocab_file)
    return folder


@pytest.fixture(scope="module")
def hybrid_logits(neox_checkout, hybrid, tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits of the hybrid, as `neox_logits`."""
    tokens = torch.randint(TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    work = tmp_path_factory.mktemp("work")
    return tokens, verify._neox_logits(neox_checkout, NeoXCheckpoint(hybrid), tokens, work)


def comparison(folder: Path, neox_logits) -> verify.Comparison:
    tokens, expected = neox_logits
    found, rounding = verify._hf_logits(folder, tokens)
    return verify.compare(expected[..., : found.shape[-1]], found, rounding, None)


def test_a_right_conversion_is_equal(two_ranks, neox_logits, tmp_path):
    neox_to_hf(two_ranks, tmp_path / "hf")
    result = comparison(tmp_path / "hf", neox_logits)
    assert result.is_equal and result.largest_difference < 1e-5 * result.largest_logit
    assert result.largest_logit > 1


def test_a_right_conversion_of_a_hybrid_is_equal(hybrid, hybrid_logits, tmp_path):
    neox_to_hf(hybrid, tmp_path / "hf")
    result = comparison(tmp_path / "hf", hybrid_logits)
    assert result.is_equal and result.largest_difference < 1e-5 * result.largest_logit


def in_swapped_order(rule: TensorRule, shards: list[torch.Tensor]) -> torch.Tensor:
    return dataclasses.replace(rule).merge(shards[::-1], ["", ""])


def as_one_part(rule: TensorRule, shards: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates the ranks' [w1; w3], as other converters do with a gated MLP."""
    return torch.cat(shards)


def averaged(rule: TensorRule, shards: list[torch.Tensor]) -> torch.Tensor:
    return 1.001 * shards[0]


WRONG = [
    ("word_embeddings.weight", in_swapped_order),
    ("mixer.in_proj.weight", in_swapped_order),
    ("mixer.out_gate_bias", in_swapped_order),
    ("mixer.aug_balance", in_swapped_order),
    ("mixer.out_proj.weight", in_swapped_order),
    ("mlp.gate_up_proj.weight", in_swapped_order),
    ("mlp.gate_up_proj.weight", as_one_part),
    ("mlp.down_proj.weight", in_swapped_order),
    ("final_linear.weight", in_swapped_order),
    ("mixer.conv1d.weight", averaged),
    ("input_norm.scale", averaged),
]
WRONG_IN_HYBRIDS = [
    ("attention.query_key_value.weight", in_swapped_order),
    ("attention.query_key_value.weight", as_one_part),
    ("attention.query_key_value.bias", in_swapped_order),
    ("attention.dense.weight", in_swapped_order),
    ("attention.dense.bias", averaged),
    ("mlp.linear1.weight", in_swapped_order),
    ("mlp.linear1.bias", as_one_part),
    ("mlp.linear2.weight", in_swapped_order),
    ("mlp.linear2.bias", averaged),
    ("input_layernorm.weight", averaged),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_every_wrong_merge_is_found(name, wrong, two_ranks, neox_logits, tmp_path, monkeypatch):
    find_wrong_merge(name, wrong, two_ranks, neox_logits, tmp_path, monkeypatch)


@pytest.mark.parametrize(("name", "wrong"), WRONG_IN_HYBRIDS)
def test_every_wrong_merge_of_a_hybrid_is_found(
    name, wrong, hybrid, hybrid_logits, tmp_path, monkeypatch
):
    find_wrong_merge(name, wrong, hybrid, hybrid_logits, tmp_path, monkeypatch)


def find_wrong_merge(name, wrong, checkpoint, logits, tmp_path, monkeypatch):
    merge = TensorRule.merge

    def merge_wrongly(rule, shards, files, out=None):
        if rule.name != name:
            return merge(rule, shards, files)
        with monkeypatch.context() as undone:
            undone.setattr(TensorRule, "merge", merge)
            return wrong(rule, shards)

    monkeypatch.setattr(TensorRule, "merge", merge_wrongly)
    neox_to_hf(checkpoint, tmp_path / "hf")
    assert not comparison(tmp_path / "hf", logits).is_equal


@pytest.mark.parametrize(("one", "other"), [("q_proj", "k_gate"), ("v_proj", "g_proj")])
def test_a_wrong_order_inside_a_head_is_found(
    one, other, two_ranks, neox_logits, tmp_path, monkeypatch
):
    to_hf = TensorRule.to_hf

    def exchanged(rule, full):
        def name(piece: Piece) -> str:
            pair = {f".{one}.weight": f".{other}.weight", f".{other}.weight": f".{one}.weight"}
            for end, new_end in pair.items():
                if piece.name.endswith(end):
                    return piece.name.removesuffix(end) + new_end
            return piece.name

        found = to_hf(rule, full)
        return {piece.name: found[name(piece)] for piece in rule.pieces}

    monkeypatch.setattr(TensorRule, "to_hf", exchanged)
    neox_to_hf(two_ranks, tmp_path / "hf")
    assert not comparison(tmp_path / "hf", neox_logits).is_equal


def test_the_command_fails_and_leaves_nothing_if_the_models_differ(
    neox_checkout, run_main, vocab_file, tmp_path, monkeypatch
):
    write(tmp_path / "neox", Model(layers=1, dtype=torch.bfloat16), 2, 0, vocab_file)
    merge = TensorRule.merge

    def swapped(rule, shards, files, out=None):
        return merge(rule, shards[::-1] if "out_proj" in rule.name else shards, files)

    monkeypatch.setattr(TensorRule, "merge", swapped)
    monkeypatch.setenv("GPT_NEOX_PATH", str(neox_checkout))
    flags = ("--checkpoint", tmp_path / "neox", "--output", tmp_path / "hf", "--verify")
    process = run_main(main, *flags)
    assert process.returncode == 1
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith("command: not equal to the GPT-NeoX model: largest logit difference")
    assert "Traceback" not in process.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["neox"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_measured_by_their_dtype(dtype, two_ranks, neox_logits, tmp_path):
    neox_to_hf(two_ranks, tmp_path / "hf", dtype=dtype)
    tokens, expected = neox_logits
    found, rounding = verify._hf_logits(tmp_path / "hf", tokens)
    expected = expected[..., : found.shape[-1]]
    assert not verify.compare(expected, found, rounding, None).is_equal
    assert verify.compare(expected, found, rounding, dtype).is_equal
    assert not verify.compare(expected, found.flip(1), rounding, dtype).is_equal
    assert not verify.compare(expected, found * float("nan"), rounding, dtype).is_equal


def test_without_gpt_neox_it_says_so(run_main, vocab_file, tmp_path, monkeypatch):
    write(tmp_path / "neox", Model(layers=1), 1, 0, vocab_file)
    flags = ("--checkpoint", tmp_path / "neox", "--output", tmp_path / "hf", "--verify")
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("GPT_NEOX_PATH", str(tmp_path / "other"))
    process = run_main(main, *flags)
    assert process.returncode == 1
    line = f"command: GPT_NEOX_PATH={tmp_path / 'other'} is no GPT-NeoX checkout"
    assert process.stderr.strip().splitlines()[-1] == line
    assert not (tmp_path / "hf").exists()
